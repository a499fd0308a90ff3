"""Last-token embedders in sentence-transformers' layout, with the vectors that it gives itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from llm2vec_fast import LLM2Vec

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from llm2vec_fast.integrations.sentence_transformers import load

PROMPTS = {
    "query": "Instruct: Given a question, find the answer\nQuery:",  # as of Qwen3-Embedding
    "web": "Instruct: Retrieve passages\nQuery: ",  # as of E5-Mistral
    "document": "",
}
LONG = "a set of words in a list " * 30


@pytest.fixture(scope="module")
def saved(tiny_model, add_tokenizer, tmp_path_factory):
    """saved(family, pooling, end=True, **config) -> (directory, SentenceTransformer)"""

    def make(family: str, pooling: str, end: bool = True, include_prompt: bool = True, **config):
        base = add_tokenizer(tiny_model(tmp_path_factory.mktemp("base"), family, **config))
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        around = "<s> $A </s>" if end else "<s> $A"
        specials = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=specials
        )
        tokenizer.save(str(base / "tokenizer.json"))
        first = Transformer(str(base), max_seq_length=64)
        pool = Pooling(first.get_embedding_dimension(), pooling, include_prompt=include_prompt)
        stock = SentenceTransformer(modules=[first, pool, Normalize()], prompts=PROMPTS)
        directory = tmp_path_factory.mktemp(f"{family}-{pooling}")
        stock.save_pretrained(str(directory))
        return directory, stock.to("cpu")

    return make


def ours(directory, **options) -> LLM2Vec:
    return LLM2Vec.from_pretrained(directory, dtype="float32", device="cpu", **options)


def close(got, expected) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize("end", [True, False])
def test_equal_to_sentence_transformers(saved, texts, family, config, end):
    directory, stock = saved(family, "lasttoken", end, **config)
    model, texts = ours(directory), [*texts, LONG, "  spaces  around "]
    assert model.settings["enable_bidirectional"] is False
    assert model.settings["pooling_mode"] == "last_token"
    assert model.settings["max_length"] == model.settings["doc_max_length"] == 64
    assert model.settings["prompts"] == PROMPTS
    close(model.encode(texts, normalize=True), stock.encode(texts))
    for name, prompt in PROMPTS.items():
        got = model.encode(texts, instruction=prompt, normalize=True)
        close(got, stock.encode(texts, prompt_name=name))


def test_end_token_by_a_flag_of_the_tokenizer(saved, texts):
    """E5-Mistral: tokenizer.json puts <s> in front, tokenizer_config.json asks for </s> behind.
    transformers 4 heard it, 5 does not (embeddings-benchmark/mteb#5237); the model was trained so.
    """
    directory, _ = saved("mistral", "lasttoken", end=False)
    file = directory / "tokenizer_config.json"
    flags = {"add_bos_token": True, "add_eos_token": True}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | flags | {"tokenizer_class": "LlamaTokenizer"})
    )
    stock = SentenceTransformer(str(directory), device="cpu", processor_kwargs=flags)
    assert stock.tokenizer("a cat").input_ids[-1] == stock.tokenizer.eos_token_id
    model, texts = ours(directory), [*texts, LONG]
    for name, prompt in PROMPTS.items():
        got = model.encode(texts, instruction=prompt, normalize=True)
        close(got, stock.encode(texts, prompt_name=name))


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "cls"])
def test_other_poolings(saved, texts, pooling):
    directory, stock = saved("qwen3", pooling)
    close(ours(directory).encode([*texts, LONG], normalize=True), stock.encode([*texts, LONG]))


def test_prompts_that_are_not_pooled(saved, texts):
    directory, stock = saved("qwen3", "mean", include_prompt=False)
    model = ours(directory)
    assert model.settings["skip_instruction"] is True
    got = model.encode(texts, instruction=PROMPTS["web"].rstrip() + "\n", normalize=True)
    close(got, stock.encode(texts, prompt=PROMPTS["web"].rstrip() + "\n"))


def test_load_gives_the_whole_sentence_transformer(saved, texts, tmp_path):
    directory, stock = saved("qwen3", "lasttoken")
    model = load(str(directory), "cpu", dtype="float32")
    close(model.encode_query(texts), stock.encode_query(texts))  # with its Normalize
    model.save_pretrained(str(tmp_path))
    close(
        load(str(tmp_path), "cpu", dtype="float32").encode_query(texts), stock.encode_query(texts)
    )


def test_what_the_user_says_counts_before_the_files(saved):
    directory, _ = saved("qwen3", "lasttoken")
    model = ours(directory, enable_bidirectional=True, pooling_mode="mean", max_length=16)
    told = model.settings
    assert told["enable_bidirectional"] and told["pooling_mode"] == "mean"
    assert told["max_length"] == told["doc_max_length"] == 16
    (directory / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "weighted_mean"}))
    told = ours(directory).settings  # then it is a model of LLM2Vec
    assert told["enable_bidirectional"] and told["pooling_mode"] == "weighted_mean"
    assert "prompts" not in told

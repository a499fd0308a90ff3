"""The module in a SentenceTransformer: vectors, files, processes, evaluators, training."""

from __future__ import annotations

import json
import pickle
import types

import numpy as np
import pytest
import torch

from llm2vec_fast import LLM2Vec

pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import quantize_embeddings

from llm2vec_fast.integrations.sentence_transformers import LLM2VecModule, load

PROMPTS = {"query": "Find the animal: ", "raw": "tag:", "document": ""}
PAIRS = [("a cat", "an animal"), ("a list", "many things"), ("x", "a letter"), ("dict()", "a map")]


def wrapped(encoder, **options) -> SentenceTransformer:
    return SentenceTransformer(modules=[LLM2VecModule(encoder)], device="cpu", **options)


@pytest.fixture
def model(encoder) -> SentenceTransformer:
    return wrapped(encoder, prompts=dict(PROMPTS))


def close(got, expected) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=1e-5)


def test_vectors_are_those_of_the_encoder(model, encoder, texts):
    texts = [*texts, "", "a <s> in a text"]
    close(model.encode(texts, batch_size=2), encoder.encode(texts))
    close(model.encode("a cat"), encoder.encode("a cat"))
    close(model.encode_document(texts), encoder.encode(texts))
    assert not model.encode(["", "  "]).any()
    assert model.get_embedding_dimension() == encoder.dimension


def test_prompts_stand_before_the_text_as_they_are(model, encoder, texts):
    close(model.encode_query(texts), encoder.encode(texts, instruction="Find the animal:"))
    raw = model.encode(texts, prompt_name="raw")
    assert np.abs(raw - encoder.encode(texts, instruction="tag:").numpy()).max() > 1e-3
    ids = model.preprocess(["a cat"], prompt="tag:")["input_ids"][0].tolist()
    assert ids == model.tokenizer.encode("tag:a cat").ids
    assert not encoder.tokenizer.verbatim_instruction  # the caller's own encoder is as it was


def test_forms(model, encoder, texts):
    full = encoder.encode(texts, convert_to_numpy=True)
    close(model.encode(texts, truncate_dim=8), full[:, :8])
    close(
        model.encode(texts, truncate_dim=8, normalize_embeddings=True),
        encoder.encode(texts, truncate_dim=8, normalize=True),
    )
    packed = model.encode(texts, precision="ubinary")
    np.testing.assert_array_equal(packed, quantize_embeddings(full, "ubinary"))
    assert isinstance(model.encode(texts, convert_to_tensor=True), torch.Tensor)


def test_max_seq_length(model, encoder):
    long = "word " * 400
    assert model.preprocess([long])["input_ids"].shape == (1, 401)  # <s>, and doc_max_length
    model.max_seq_length = 20
    assert model.max_seq_length == encoder.settings["doc_max_length"] == 20
    assert model.preprocess([long])["input_ids"].shape == (1, 20)
    assert model.preprocess([long], max_length=7)["input_ids"].shape == (1, 7)
    assert model.max_seq_length == 20


def test_what_is_no_text_is_refused_with_its_row(model):
    with pytest.raises(ValueError, match="row 1 is not a text: None"):
        model[0].preprocess(["a", None])
    with pytest.raises(ValueError, match="text"):
        model.encode([("a", "b")])


def test_saved_and_loaded(model, texts, tmp_path):
    model.truncate_dim = 16
    model.save_pretrained(str(tmp_path))
    expected = model.encode_query(texts)
    again = load(str(tmp_path), "cpu", dtype="float32")
    assert again.prompts == PROMPTS and again.truncate_dim == 16
    close(again.encode_query(texts), expected)
    options = {"device": "cpu", "model_kwargs": {"dtype": "float32", "device": "cpu"}}
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, **options)
    close(again.encode_query(texts), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):  # as of every class not its own
        SentenceTransformer(str(tmp_path), **options)
    direct = LLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu")
    close(direct.encode(texts, instruction="Find the animal:", truncate_dim=16), expected)


def test_load_takes_any_model_and_refuses_other_classes(directory, encoder, texts, tmp_path):
    close(load(str(directory), "cpu", dtype="float32").encode(texts), encoder.encode(texts))
    row = {"idx": 0, "name": "0", "path": "", "type": "somebody.Module"}
    (tmp_path / "modules.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"somebody\.Module"):
        load(str(tmp_path), "cpu")


def test_a_pickled_module_takes_special_tokens_for_text(model):
    again = pickle.loads(pickle.dumps(model))
    text = ["a <s> in a text"]
    assert torch.equal(again.preprocess(text)["input_ids"], model.preprocess(text)["input_ids"])
    close(again.encode(text), model.encode(text))


def test_several_processes(model, texts):
    expected = model.encode_query(texts)
    close(model.encode_query(texts, device=["cpu"]), expected)


def test_an_evaluator(model, encoder):
    first, second = zip(*PAIRS, strict=True)
    found = EmbeddingSimilarityEvaluator(list(first), list(second), [0.9, 0.5, 0.1, 0.2])(model)
    cosines = torch.cosine_similarity(encoder.encode(list(first)), encoder.encode(list(second)))
    ranks = cosines.argsort().argsort().double()
    expected = np.corrcoef(ranks, [3, 2, 0, 1])[0, 1]
    assert found["spearman_cosine"] == pytest.approx(expected)


def test_a_retrieval_evaluator(model, encoder):
    queries = {"q0": "a cat", "q1": "dict()", "q2": "x"}
    corpus = {f"d{n}": text for n, (_, text) in enumerate(PAIRS)}
    relevant = {"q0": {"d0"}, "q1": {"d3"}, "q2": {"d2"}}
    found = InformationRetrievalEvaluator(queries, corpus, relevant, write_csv=False)(model)
    asked = encoder.encode(list(queries.values()), instruction="Find the animal:", normalize=True)
    best = (asked @ encoder.encode(list(corpus.values()), normalize=True).T).argmax(dim=1)
    expected = np.mean([n in (0, 3, 2)[q : q + 1] for q, n in enumerate(best.tolist())])
    assert found["cosine_accuracy@1"] == pytest.approx(expected)


def gradients(loss, model) -> dict[str, torch.Tensor]:
    """Of a loss on PAIRS, by the name of the weight."""
    model.zero_grad()
    columns = [model.preprocess(list(column)) for column in zip(*PAIRS, strict=True)]
    torch.manual_seed(0)
    loss(columns, None).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got, expected) -> None:
    assert got.keys() == expected.keys() and got
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


def test_gradients_reach_all_weights_and_small_batches_give_the_same(model):
    model.train()
    whole = gradients(MultipleNegativesRankingLoss(model), model)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    same(gradients(CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), model), whole)
    model.gradient_checkpointing_enable()
    assert model[0].recompute
    same(gradients(MultipleNegativesRankingLoss(model), model), whole)


def test_dropout_is_replayed_and_drops(model):
    model.train()
    plain = gradients(MultipleNegativesRankingLoss(model), model)
    model[0].attention_dropout = 0.3
    one = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)
    first = gradients(one, model)
    same(gradients(one, model), first)
    name = "0.encoder.model.embed.weight"
    assert (first[name] - plain[name]).abs().max() > 1e-4
    model.eval()
    same(gradients(MultipleNegativesRankingLoss(model), model), plain)  # no dropout in inference


def test_autocast_changes_nothing(model, texts):
    model.train()
    plain = model(model.preprocess(texts))["sentence_embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        under = model(model.preprocess(texts))["sentence_embedding"]
    assert under.dtype == torch.float32 and torch.equal(under, plain)


def test_an_empty_text_in_training_changes_nothing(model):
    model.train()
    with_empty = model[0](model.preprocess(["a cat", "", "x"]))["sentence_embedding"]
    without = model[0](model.preprocess(["a cat", "x"]))["sentence_embedding"]
    assert not with_empty[1].any()
    torch.testing.assert_close(with_empty[[0, 2]], without)


def trained(model, output, *, rate: float, steps: int, resume=None, **options):
    pytest.importorskip("datasets")
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    anchors, positives = zip(*PAIRS, strict=True)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output), per_device_train_batch_size=4, max_steps=steps,
            learning_rate=rate, lr_scheduler_type="constant", logging_steps=1, report_to=[],
            disable_tqdm=True, use_cpu=True, prompts="Same: ", seed=1, **options,
        ),
        train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_trainer_trains_all_weights(model, tmp_path):
    losses = trained(model, tmp_path, rate=1e-3, steps=6, save_strategy="no")
    assert losses[-1] < losses[0] - 0.05


def test_the_trainer_trains_adapters_and_goes_on_from_a_checkpoint(directory, texts, tmp_path):
    def fresh() -> SentenceTransformer:
        encoder = LLM2Vec.from_pretrained(directory, dtype="float32", device="cpu")
        model = wrapped(encoder)
        model[0].add_lora(rank=4, alpha=16)
        return model

    model = fresh()
    frozen = model[0].encoder.model.layers[0].attn.qkv.weight.clone()
    options = {"rate": 1e-2, "save_steps": 2, "save_strategy": "steps"}
    losses = trained(model, tmp_path / "one", steps=4, **options)
    assert losses[-1] < losses[0] - 0.05
    assert torch.equal(model[0].encoder.model.layers[0].attn.qkv.weight, frozen)

    checkpoint = tmp_path / "one" / "checkpoint-2"
    resumed = fresh()
    again = trained(resumed, tmp_path / "two", steps=4, resume=str(checkpoint), **options)
    assert again == pytest.approx(losses, abs=1e-4)  # of all steps: the first two were kept
    close(resumed.encode(texts), model.encode(texts))

    model.save_pretrained(str(tmp_path / "saved"))  # adapters alone, merged when they are loaded
    assert not list((tmp_path / "saved").glob("model*.safetensors"))
    loaded = load(str(tmp_path / "saved"), "cpu", dtype="float32")
    assert not loaded[0].has_lora
    close(loaded.encode(texts), model.encode(texts))
    official = LLM2Vec.from_pretrained(tmp_path / "saved", dtype="float32", device="cpu")
    close(official.encode(texts), model.encode(texts))


def test_refusals_of_adapters(model, directory, tmp_path):
    model.save_pretrained(str(tmp_path))
    model[0].add_lora(rank=2)
    with pytest.raises(ValueError, match="whole weights"):
        model.save_pretrained(str(tmp_path))
    merged = types.SimpleNamespace(sources=types.SimpleNamespace(adapters=["one"]))
    module = LLM2VecModule.__new__(LLM2VecModule)
    torch.nn.Module.__init__(module)
    object.__setattr__(module, "encoder", merged)
    with pytest.raises(ValueError, match="merge_before_save=True"):
        module.add_lora()

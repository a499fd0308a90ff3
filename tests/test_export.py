"""What `export` writes gives equal vectors wherever it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import official
from llm2vec_fast import LLM2Vec
from llm2vec_fast.adapters import shipped
from llm2vec_fast.integrations import export as module
from llm2vec_fast.integrations.export import export

TEXTS = ["a cat", "The quick brown fox jumps over the lazy dog.", "x", "list of numbers " * 9]
FAMILIES = {
    "llama": {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
    "mistral": {"sliding_window": 4},  # which attention both ways must not keep
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}},
}


@pytest.fixture
def exported(tiny_model, add_tokenizer, tmp_path):
    """exported(family, **options of from_pretrained) -> (LLM2Vec, directory, what export said)"""

    def make(family: str, **options):
        source = add_tokenizer(tiny_model(tmp_path, family, **FAMILIES[family]))
        told = read(source / "tokenizer_config.json")
        del told["pad_token"]  # as LLaMA and Mistral have none
        (source / "tokenizer_config.json").write_text(json.dumps(told))
        model = LLM2Vec.from_pretrained(source, dtype="float32", device="cpu", **options)
        return model, tmp_path / "out", export(model, tmp_path / "out")

    return make


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def close(got, expected) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_looks_both_ways_by_itself(exported, family, attention):
    """Alone and in a padded batch; and each of the four families by config.json alone."""
    from transformers import AutoModel, AutoTokenizer

    model, out, _ = exported(family)
    stock = AutoModel.from_pretrained(out, attn_implementation=attention, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = stock(**{k: batch[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    tokens = model.tokenizer(TEXTS, [""] * len(TEXTS))
    starts = batch["attention_mask"].argmax(1).tolist()  # left of it there may be padding
    pooled = [
        h[s + t.start : s + t.end].mean(0) for h, s, t in zip(hidden, starts, tokens, strict=True)
    ]
    close(torch.stack(pooled), model.encode(TEXTS))
    causal = LLM2Vec.from_pretrained(out, enable_bidirectional=False, dtype="float32")
    assert (causal.encode(TEXTS) - model.encode(TEXTS)).abs().max() > 1e-2  # it does matter


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_reads_it_again(exported, family):
    model, out, _ = exported(family, pooling_mode="weighted_mean", max_length=99)
    again = LLM2Vec.from_pretrained(out, dtype="float32", device="cpu")
    assert again.settings == model.settings
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=0)


# |difference| / |vector| on the rows below, measured against the official library in fp64: official
# fp32 up to 1.2e-5, ours up to 1.9e-5 alone and 4.1e-5 in a batch, all of them for one row ("a cat"
# behind an instruction), which amplifies rounding; every other row stays below 5e-6. A span that
# begins one token late moves vectors of this model by 3e-3 or more.
TOLERANCE = 1e-4


@pytest.mark.skipif(not official.is_ready(), reason="no environment of the official llm2vec")
def test_the_official_library_gives_the_same_vectors(smollm2, tmp_path):
    """Of a model with two adapters merged; each text alone, so that no padding has a part in it."""
    rows = [["", text] for text in TEXTS] + [["Represent this:", text] for text in TEXTS]
    adapters = [str(shipped(f"smollm2-135m-{name}")) for name in ("mntp", "simcse")]
    options = {"dtype": "float32", "device": "cpu", "compat": "official"}
    model = LLM2Vec.from_pretrained(smollm2, adapters, **options)
    export(model, tmp_path / "out")
    asked = {"model": str(tmp_path / "out"), "rows": rows}
    read_as, encoded = official.run_many([
        asked | {"action": "tokenize"}, asked | {"action": "encode", "batch_size": 1}
    ])  # fmt: skip
    tokens = model.tokenizer([text for _, text in rows], [instruction for instruction, _ in rows])
    assert [t.ids.tolist() for t in tokens] == read_as["ids"]
    assert [[t.start, t.end] for t in tokens] == read_as["spans"]

    def apart(vectors) -> np.ndarray:
        truth = encoded["vectors"]
        return np.linalg.norm(vectors.numpy() - truth, axis=1) / np.linalg.norm(truth, axis=1)

    assert apart(model.encode(rows)).max() < TOLERANCE
    without = LLM2Vec.from_pretrained(smollm2, **options)
    assert apart(without.encode(rows)).min() > 100 * TOLERANCE  # the adapters are in the weights


EXACT = {"pooling_mode": "last_token"}, {"skip_instruction": False}, {"pooling_mode": "bos_token"}


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_sentence_transformers_gives_the_same_vectors(exported, options):
    transformers = pytest.importorskip("sentence_transformers")
    model, out, said = exported("llama", **options)
    assert said == []
    stock = transformers.SentenceTransformer(str(out), device="cpu")
    assert stock.max_seq_length == 512
    close(stock.encode(TEXTS), model.encode(TEXTS))


def test_where_others_pool_more_export_says_so(exported):
    transformers = pytest.importorskip("sentence_transformers")
    model, out, (said,) = exported("llama")
    assert "start token" in said
    stock = transformers.SentenceTransformer(str(out), device="cpu", prompts={"q": "Find: "})
    assert np.abs(stock.encode(TEXTS) - model.encode(TEXTS).numpy()).max() > 1e-3
    # With an instruction the start token is part of the prompt, which is not pooled. It counts the
    # prompt's tokens alone: where its last space becomes part of a word, the first token is lost.
    ids_of = model.tokenizer.ids_of
    apart = [ids_of("Find: " + t)[: len(ids_of("Find: "))] == ids_of("Find: ") for t in TEXTS]
    assert apart == [False, True, True, True]
    off = stock.encode(TEXTS, prompt_name="q") - model.encode(TEXTS, instruction="Find:").numpy()
    assert ((np.abs(off).max(axis=1) < 2e-5) == apart).all()


def test_templates_end_tokens_and_weighted_means_are_told(exported, tmp_path):
    *_, said = exported("llama", template="[INST] {text} [/INST]", pooling_mode="weighted_mean")
    assert len(said) == 3 and "[INST] {text} [/INST]" in said[0] and "weighted" in said[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_has_what_vllm_looks_for(exported, family):
    """vLLM itself cannot run here: these are the keys that its source reads."""
    _, out, _ = exported(family)
    config = read(out / "config.json")
    assert config["is_causal"] is False and config["torch_dtype"] == "float32"
    known = {"llama": "LlamaBidirectionalModel", "mistral": "MistralModel"}
    assert config["architectures"] == [known.get(family, f"{family.capitalize()}Model")]
    assert config.get("pooling") == ("avg" if family == "llama" else None)
    modules = json.loads((out / "modules.json").read_text())
    assert modules[1]["type"] == "sentence_transformers.models.Pooling"
    pooling = read(out / modules[1]["path"] / "config.json")
    assert next(key for key, on in pooling.items() if on is True) == "pooling_mode_mean_tokens"
    assert read(out / "sentence_bert_config.json")["max_seq_length"] == 512
    names = load_file(out / "model.safetensors")
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_causal_model_is_a_plain_one(exported):
    _, out, _ = exported("llama", enable_bidirectional=False)
    config = read(out / "config.json")
    assert config["architectures"] == ["LlamaModel"] and "is_causal" not in config


def test_rope_is_spelled_for_transformers_4_too(exported):
    _, out, _ = exported("qwen3")
    config = read(out / "config.json")
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_nothing_is_overwritten_and_nothing_is_left_half(exported, tmp_path, monkeypatch):
    model, out, _ = exported("llama")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ValueError, match="not empty: export into a new directory"):
        export(model, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / ".again.partial").mkdir()  # of an export that was killed
    (tmp_path / ".again.partial" / "junk").touch()

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_describe", full)
        with pytest.raises(OSError, match="No space"):
            export(model, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))
    (tmp_path / "again").mkdir()  # an empty one is as good as none
    export(model, tmp_path / "again")
    there = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert (
        sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*")) == there
    )
    assert not list(tmp_path.glob(".*"))


def test_verbatim_instructions_survive(tiny_model, add_tokenizer, tmp_path):
    """A model in sentence-transformers' layout, whose prompts stand before texts as they are."""
    source = add_tokenizer(tiny_model(tmp_path, "mistral"))
    prompts = {"query": "Instruct: Find it\nQuery:"}
    files = {
        "modules.json": [{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "1_Pooling"}],
        "config_sentence_transformers.json": {"prompts": prompts},
        "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
    }
    (source / "1_Pooling").mkdir()
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    model = LLM2Vec.from_pretrained(source, dtype="float32", device="cpu")
    export(model, tmp_path / "out")
    again = LLM2Vec.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    told = {"instruction": prompts["query"]}
    torch.testing.assert_close(again.encode(TEXTS, **told), model.encode(TEXTS, **told))
    assert read(tmp_path / "out" / "config_sentence_transformers.json") == {"prompts": prompts}


def test_the_command(tiny_model, add_tokenizer, tmp_path):
    source = add_tokenizer(tiny_model(tmp_path, "llama"))
    config = read(source / "config.json") | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))

    def run(*arguments):
        command = [sys.executable, "-m", "llm2vec_fast", "export", *map(str, arguments)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    done = run(tmp_path / "out", "--model", source)
    assert done.returncode == 0, done.stderr
    assert "start token" in done.stderr and "written" in done.stdout
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    again = run(tmp_path / "out", "--model", source, "--dtype", "float32")
    assert again.returncode == 1 and "not empty" in again.stderr

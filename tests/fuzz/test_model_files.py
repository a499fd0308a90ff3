"""Damaged and hostile model files: refused with a typed error, or read as the official reader does.

Not one may crash, hang, take gigabytes, lead out of its directory, or give other weights.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from llm2vec_fast import LLM2Vec
from llm2vec_fast.model import ModelConfig, adapt, lora, weights
from llm2vec_fast.model.checkpoint import WeightsError, open_checkpoint, read_tensor

SIZES = {
    "vocab_size": 300, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
TEXTS = ["a list of numbers", "the keys </s> of a dict 字", "x"]
CPU = torch.device("cpu")


@pytest.fixture
def model_dir(tiny_model, add_tokenizer, tmp_path) -> Path:
    """A real, very small model with its tokenizer, one directory below tmp_path."""
    return add_tokenizer(tiny_model(tmp_path, "llama", **SIZES))


def load(directory: Path):
    config = ModelConfig.from_file(directory / "config.json")
    return weights.load(directory, config, False, torch.float32, CPU)


def rebuilt(header: str, data: bytes) -> bytes:
    text = header.encode(errors="replace")
    return len(text).to_bytes(8, "little") + text + data


def damaged_safetensors(fuzz, whole: bytes):
    """Any bytes of the file, or values of its header whose length is right again."""
    length = 8 + int.from_bytes(whole[:8], "little")
    header, data = whole[8:length].decode(), fuzz.bytes((whole[length:],))
    return st.one_of(
        fuzz.bytes((whole,), length / len(whole)),
        st.builds(rebuilt, fuzz.json(header), st.just(whole[length:])),
        st.builds(rebuilt, st.just(header), data),
    )


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


def test_weights(fuzz, model_dir):
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, path)

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            model = load(model_dir)
        except WeightsError:
            return False
        official = load_file(path)
        for name, tensor in weights.unfused(model):
            assert tensor.isfinite().all()
            assert equal(tensor, official.get(name, official.get(f"model.{name}"))), name
        return True

    found = fuzz(damaged_safetensors(fuzz, path.read_bytes()), attempt)
    assert found["refused"] > found["read"] > 5


def test_index_of_shards(fuzz, tiny_model, tmp_path):
    directory = tiny_model(tmp_path, "llama", shard_bytes=2_000, **SIZES)
    index = directory / "model.safetensors.index.json"
    outside = tmp_path / "outside.safetensors"
    whole, good = (
        index.read_text(),
        {t.name: read_tensor(t) for t in open_checkpoint(directory).values()},
    )
    save_file({name: torch.zeros_like(t) for name, t in good.items()}, outside)
    whole_json = json.loads(whole)
    led_out = json.dumps(whole_json | {"weight_map": dict.fromkeys(good, f"../{outside.name}")})

    def attempt(text: str | bytes) -> bool:
        index.write_bytes(text.encode(errors="replace") if isinstance(text, str) else text)
        try:
            found = {t.name: read_tensor(t) for t in open_checkpoint(directory).values()}
        except WeightsError:
            return False
        # Tensors that an index does not name are found in the shards that it names.
        assert found.keys() <= good.keys()
        assert all(equal(found[name], good[name]) for name in found)
        return True

    found = fuzz(
        st.one_of(fuzz.json(whole), fuzz.json(led_out), fuzz.bytes((whole.encode(),))), attempt
    )
    assert found["refused"] > found["read"] > 0


@pytest.fixture
def adapter(model_dir, tmp_path) -> Path:
    """A real adapter of two kinds of projections, with settings that PEFT writes."""
    model, directory = load(model_dir), tmp_path / "adapter"
    directory.mkdir()
    adapt.attach(model, 2, 4, ["q_proj", "down_proj"])
    for at, (_, _, b_OR) in enumerate(adapt.factors(model)):
        noise = torch.Generator().manual_seed(at)
        b_OR.data.copy_(torch.randn(b_OR.shape, generator=noise))
    adapt.save(model, directory, str(model_dir))
    path = directory / "adapter_config.json"
    told = json.loads(path.read_text()) | {
        "use_rslora": False, "rank_pattern": {"layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"down_proj": 4}, "layers_to_transform": [0], "layers_pattern": None,
        "exclude_modules": None, "use_dora": False, "lora_bias": False,
    }  # fmt: skip
    path.write_text(json.dumps(told))
    return directory


def merged(model_dir: Path, directory: Path) -> dict[str, torch.Tensor]:
    """The weights with an adapter, or WeightsError."""
    model = load(model_dir)
    lora.merge(model, [lora.open_adapter(directory, model.config)])
    return {name: tensor.clone() for name, tensor in weights.unfused(model)}


def check_merged(found, plain, directory: Path) -> None:
    """Against the file as the official library reads it, by the formula of the paper."""
    factors = load_file(directory / lora.WEIGHTS)
    told = json.loads((directory / lora.CONFIG).read_text())
    for name, weight in plain.items():
        stem = name.removesuffix(".weight")
        nested = [f"base_model.model.{more}{stem}.lora_" for more in ("", "model.")]
        stems = [prefix for prefix in nested if f"{prefix}A.weight" in factors]
        if stems:
            a_RD, b_OR = (factors[f"{stems[0]}{letter}.weight"].float() for letter in "AB")
            alphas = [v for k, v in (told.get("alpha_pattern") or {}).items() if name_ends(stem, k)]
            alpha = [*alphas, told["lora_alpha"]][0]
            rank = len(a_RD)
            scale = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
            weight = weight + (b_OR * scale) @ a_RD
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def name_ends(stem: str, pattern: str) -> bool:
    return any(re.fullmatch(rf"(.*\.)?({pattern})", form) for form in (stem, f"model.{stem}"))


def test_weights_of_adapters(fuzz, model_dir, adapter):
    path, plain = adapter / lora.WEIGHTS, dict(weights.unfused(load(model_dir)))

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            found = merged(model_dir, adapter)
        except WeightsError:
            return False
        check_merged(found, plain, adapter)
        return True

    found = fuzz(damaged_safetensors(fuzz, path.read_bytes()), attempt)
    assert found["refused"] > found["read"] > 0


def test_settings_of_adapters(fuzz, model_dir, adapter, monkeypatch):
    monkeypatch.setattr(lora, "MATCHING_SECONDS", 0.5)
    path, plain = adapter / lora.CONFIG, dict(weights.unfused(load(model_dir)))
    expression = r"(model\.)?layers\.\d+\..*(q_proj|down_proj)$"
    other = json.dumps(json.loads(path.read_text()) | {"target_modules": expression})

    def attempt(text: str) -> bool:
        path.write_text(text)
        try:
            found = merged(model_dir, adapter)
        except WeightsError:
            return False
        check_merged(found, plain, adapter)
        return True

    found = fuzz(st.one_of(fuzz.json(path.read_text()), fuzz.json(other)), attempt)
    assert min(found.values()) > 5


# --- the small files of a whole model ---


def encodes(directory: Path) -> bool:
    """Whether the model loads; if so, its vectors are finite."""
    try:
        model = LLM2Vec.from_pretrained(directory, dtype="float32")
        vectors = model.encode(TEXTS)
    except ValueError:  # ConfigError, WeightsError and AdapterError are of its family
        return False
    assert vectors.shape == (len(TEXTS), 8) and vectors.isfinite().all()
    return True


def test_config(fuzz, model_dir):
    path = model_dir / "config.json"
    whole = path.read_text()

    def attempt(data: str | bytes) -> bool:
        path.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)
        return encodes(model_dir)

    found = fuzz(st.one_of(fuzz.json(whole), fuzz.bytes((whole.encode(),))), attempt)
    assert min(found.values()) > 5


def test_tokenizer(fuzz, model_dir):
    path = model_dir / "tokenizer.json"
    whole = path.read_text()

    def attempt(data: str | bytes) -> bool:
        path.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)
        if not encodes(model_dir):
            return False
        official = Tokenizer.from_file(str(path))
        official.no_truncation()
        official.no_padding()
        official.encode_special_tokens = True
        ids = official.encode(TEXTS[0], add_special_tokens=False).ids
        found = LLM2Vec.from_pretrained(model_dir).tokenizer([TEXTS[0]], [""])[0]
        text = found.ids.tolist()[found.start : found.end]
        assert not text or text[: len(ids)] == ids
        return True

    found = fuzz(st.one_of(fuzz.json(whole), fuzz.bytes((whole.encode(),))), attempt)
    assert min(found.values()) > 5


OTHERS = {
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "add_bos_token": True, "add_eos_token": False, "model_max_length": 64,
    },
    "llm2vec_config.json": {
        "pooling_mode": "mean", "max_length": 32, "doc_max_length": 16, "skip_instruction": True,
    },
    "llm2vec_fast.json": {
        "template": "<|im_start|>{text}<|im_end|>", "enable_bidirectional": True, "merged": [],
        "stacked_on": [], "verbatim_instruction": False,
    },
}  # fmt: skip
LAYOUT = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "a.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "a.models.Pooling"},
    ],
    "1_Pooling/config.json": {"pooling_mode_lasttoken": True, "include_prompt": True},
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "find: "}},
}  # fmt: skip


@pytest.mark.parametrize("files", [OTHERS, LAYOUT], ids=["own", "sentence-transformers"])
def test_other_settings(fuzz, model_dir, files):
    (model_dir / "1_Pooling").mkdir()
    good = {name: json.dumps(told) for name, told in files.items()}
    choices = [st.tuples(st.just(name), fuzz.json(text)) for name, text in good.items()]

    def attempt(damaged: tuple[str, str]) -> bool:
        for name, text in (good | dict([damaged])).items():
            (model_dir / name).write_text(text)
        return encodes(model_dir)

    found = fuzz(st.one_of(choices), attempt)
    assert min(found.values()) > 5

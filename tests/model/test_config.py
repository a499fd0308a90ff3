"""ModelConfig: both spellings of transformers, every family, and configs that mean harm."""

from __future__ import annotations

import json

import pytest
import torch

from llm2vec_fast import LLM2Vec
from llm2vec_fast.model.config import ConfigError, ModelConfig, Rope

BASE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
GONE = object()


def read(**changes) -> ModelConfig:
    raw = {key: value for key, value in (BASE | changes).items() if value is not GONE}
    return ModelConfig.from_dict(raw)


def same(one: ModelConfig, two: ModelConfig) -> bool:
    def fields(config):
        return {k: getattr(config, k) for k in config.__dataclass_fields__ if k != "source"}

    return fields(one) == fields(two)


def test_sizes():
    config = read()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (300, 48, 80)
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (3, 4, 2, 12)
    assert (config.norm_eps, config.max_positions) == (1e-5, 512)
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    assert config.layer_windows == (None, None, None)
    assert read(num_key_value_heads=GONE).n_kv_heads == 4
    assert read(num_key_value_heads=None).n_kv_heads == 4
    assert read(head_dim=20).head_dim == 20
    assert read(head_dim=None).head_dim == 12


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [GONE, 16])
def test_kv_heads_left_out_are_as_many_as_transformers_says(family, kv_heads):
    from transformers import AutoConfig

    told = {} if kv_heads is GONE else {"num_key_value_heads": kv_heads}
    theirs = AutoConfig.for_model(family, num_attention_heads=32, hidden_size=384, **told)
    ours = read(
        model_type=family, num_attention_heads=32, hidden_size=384, num_key_value_heads=kv_heads
    )
    assert ours.n_kv_heads == theirs.num_key_value_heads


def test_the_count_of_parameters_is_that_of_the_matrices():
    attention = 48 * (4 + 2 + 2 + 4) * 12
    assert read().n_parameters == 3 * (attention + 3 * 48 * 80) + 300 * 48


@pytest.mark.parametrize(
    "old, new",
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": None},
            {"rope_parameters": {"rope_theta": 500_000, "rope_type": "default"}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0,
             "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 128}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0,
             "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 128}},
        ),
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    ],
)  # fmt: skip
def test_rope_in_both_spellings(old, new):
    assert same(read(**old), read(**new))


def test_rope_values():
    assert read(rope_theta=5e5).rope == Rope(5e5)
    linear = {"type": "linear", "factor": 4}
    assert read(rope_theta=5e5, rope_scaling=linear).rope == Rope(5e5, "linear", 4.0)
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0,
              "high_freq_factor": 5.0, "original_max_position_embeddings": 128}  # fmt: skip
    assert read(rope_scaling=llama3).rope == Rope(1e4, "llama3", 32.0, 2.0, 5.0, 128)
    del llama3["original_max_position_embeddings"]
    assert read(rope_scaling=llama3).rope.original_max_position == 512


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_saves_is_read_as_it_was_meant(tiny_model, family):
    directory = tiny_model(None, family)
    config = ModelConfig.from_file(directory / "config.json")
    assert config.family == family
    assert (config.n_layers, config.hidden_size, config.head_dim) == (2, 48, 12)
    assert config.qk_norm == (family == "qwen3")
    assert config.qkv_bias == (family == "qwen2")
    assert config.rope == Rope(10_000.0)


def test_biases_by_family():
    def biases(family):
        config = read(model_type=family, attention_bias=True, mlp_bias=True)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases("llama") == (True, True, True)
    assert biases("mistral") == (False, False, False)
    assert biases("qwen2") == (True, False, False)
    assert biases("qwen3") == (True, True, False)
    plain = read(model_type="qwen2", attention_bias=False)
    assert (plain.qkv_bias, plain.o_bias) == (True, False)


def test_head_dim_of_qwen3_does_not_follow_the_hidden_size():
    assert read(model_type="qwen3").head_dim == 128
    assert read(model_type="qwen2").head_dim == 12


def windows(**changes):
    return read(**changes).layer_windows


def test_windows():
    full, sliding = "full_attention", "sliding_attention"
    assert windows(model_type="mistral", sliding_window=7) == (7, 7, 7)
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 3
    assert windows(model_type="llama", sliding_window=7) == (None,) * 3
    for family in ("qwen2", "qwen3"):
        told = {"model_type": family, "sliding_window": 7}
        assert windows(**told) == (None,) * 3
        assert windows(**told, use_sliding_window=False) == (None,) * 3
        told["use_sliding_window"] = True
        assert windows(**told, max_window_layers=2) == (None, None, 7)
        assert windows(**told, max_window_layers=0) == (7, 7, 7)
        assert windows(**told, max_window_layers=9) == (None,) * 3
        listed = [sliding, full, sliding]
        assert windows(**told, layer_types=listed, max_window_layers=0) == (7, None, 7)
        assert windows(**told, layer_types=None, max_window_layers=1) == (None, 7, 7)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_windows_that_are_not_mentioned_are_those_of_transformers(family):
    """transformers writes these keys always; by hand they may be left out."""
    from transformers import MistralConfig, Qwen2Config

    told = {"use_sliding_window": True, "num_hidden_layers": 30} if family == "qwen2" else {}
    theirs = {"mistral": MistralConfig, "qwen2": Qwen2Config}[family](**told)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 3
    want = tuple(theirs.sliding_window if t.startswith("sliding") else None for t in types)
    assert windows(model_type=family, **told) == want


def test_the_name_for_templates():
    assert read(_name_or_path="a/b").name_or_path == "a/b"
    assert read().name_or_path == read(_name_or_path=3).name_or_path == ""


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
BAD_SIZES = (0, -1, 10**12, 10**400, True, 48.0, "48", float("nan"), float("inf"), [48], {"a": 1})
HOSTILE = [
    *({name: bad} for name in SIZES + OPTIONAL for bad in BAD_SIZES),
    *({name: bad} for name in SIZES for bad in (GONE, None)),
    *({"rms_norm_eps": bad} for bad in (0, -1.0, True, "x", float("nan"), float("inf"), 10**400)),
    *({"rope_theta": bad} for bad in (0, -1.0, True, "x", float("nan"), float("inf"), 10**400, [])),
    *({"model_type": bad} for bad in (GONE, None, "gemma2", "LLAMA", 3, ["llama"], {})),
    *({name: bad} for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")
      for bad in (1, "true", [])),
    {"auto_map": {"AutoModel": "modeling.Model"}},
    {"quantization_config": {"quant_method": "gptq"}},
    {"hidden_act": "gelu"},
    {"hidden_act": ["silu"]},
    {"head_dim": 13},
    {"num_attention_heads": 100, "head_dim": None},  # more heads than hidden_size can share out
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 8},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
    {"rope_parameters": "default"},
    {"rope_parameters": [1]},
    {"rope_scaling": {"type": "linear"}, "rope_theta": "x"},
    *({"rope_scaling": {"rope_type": kind, "factor": 2.0}}
      for kind in ("yarn", "dynamic", "longrope", "su", ["linear"], 7)),
    *({"rope_scaling": {"rope_type": "linear", "factor": f}} for f in (0, -2, "x", float("nan"))),
    {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
    {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": -1}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    {"model_type": "mistral", "sliding_window": 0},
    {"model_type": "mistral", "sliding_window": -5},
    {"model_type": "mistral", "sliding_window": True},
    {"model_type": "mistral", "sliding_window": "all"},
    {"model_type": "qwen2", "use_sliding_window": "yes", "sliding_window": 4},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
     "max_window_layers": "x"},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
     "layer_types": ["full_attention"]},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
     "layer_types": ["chunked_attention"] * 3},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": "x"},
    # each size is allowed, all together are not
    {"vocab_size": 10_000_000, "hidden_size": 200_000, "head_dim": 128},
    {"hidden_size": 200_000, "head_dim": 128, "intermediate_size": 10**6,
     "num_hidden_layers": 2_000},
]  # fmt: skip


def named(changes: dict) -> str:
    return ",".join(f"{k}={'GONE' if v is GONE else v!r:.30}" for k, v in changes.items())


@pytest.mark.parametrize("changes", HOSTILE, ids=named)
def test_hostile_configs_are_refused_by_file_before_any_allocation(tmp_path, monkeypatch, changes):
    def allocation(*args, **kwargs):
        raise AssertionError("something was allocated")

    monkeypatch.setattr(torch, "empty", allocation)
    raw = {key: value for key, value in (BASE | changes).items() if value is not GONE}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as error:
        LLM2Vec.from_pretrained(tmp_path)
    assert str(path) in str(error.value)
    guilty = list(changes)[-1]
    if len(changes) == 1 and not guilty.startswith("rope_"):
        assert guilty in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b'"llama"',
        b"null",
        b"3",
        b'{"model_type": "llama"',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"vocab_size": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_a_json_object_is_refused_by_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_file(tmp_path / "config.json")


def test_a_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)

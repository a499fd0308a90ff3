"""ModelConfig from Hugging Face's config.json: families differ by fields, never by classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_fast.model.small_file import read_json

# Larger than any published model by a factor of ten or more: refuses nonsense before allocating it.
LIMITS = {
    "vocab_size": 10_000_000,
    "hidden_size": 200_000,
    "intermediate_size": 1_000_000,
    "num_hidden_layers": 2_000,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "head_dim": 4_096,
    "max_position_embeddings": 2**31 - 1,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# transformers' value where the key is left out; null there means as many as query heads.
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


class ConfigError(ValueError):
    """A config.json that is broken, hostile, or describes a model this engine does not run."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and how its frequencies are scaled (default | linear | llama3)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know of a model; `source` is the config.json it came from."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    layer_windows: tuple[int | None, ...]  # sliding window of each layer; holds when causal
    source: dict[str, Any]

    @property
    def n_parameters(self) -> int:
        """Parameters of the body and the embedding, without a language-model head."""
        heads = (2 * self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.n_layers * layer + self.vocab_size * self.hidden_size

    @property
    def name_or_path(self) -> str:
        """The name config.json says the model has, which templates go by; "" if none."""
        name = self.source.get("_name_or_path")
        return name if isinstance(name, str) else ""

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a config.json. Raises ConfigError naming the file and what is wrong with it."""
        path = Path(path)
        try:
            raw = read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: a model directory needs a config.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must hold a JSON object, not {type(raw).__name__}")
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Reads the dictionary of a config.json in the spelling of transformers 4 or 5."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(f"model_type {family!r} is not supported; {', '.join(FAMILIES)} are")
        _refuse_what_changes_the_model(raw)
        heads = _size(raw, "num_attention_heads")
        left_out = "num_key_value_heads" not in raw
        kv_heads = KV_HEADS.get(family, heads) if left_out else heads
        kv_heads = _size(raw, "num_key_value_heads", kv_heads)
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        hidden = _size(raw, "hidden_size")
        head_dim = _size(raw, "head_dim", 128 if family == "qwen3" else hidden // heads)
        if head_dim % 2:
            raise ConfigError(f"head_dim {head_dim} must be even for rotary embedding")
        bias = _flag(raw, "attention_bias", False)
        n_layers = _size(raw, "num_hidden_layers")
        config = cls(
            family=family,
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(raw, "intermediate_size"),
            n_layers=n_layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            max_positions=_size(raw, "max_position_embeddings", 2048),
            rope=_rope(raw),
            qkv_bias=True if family == "qwen2" else bias and family != "mistral",
            o_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=_flag(raw, "mlp_bias", False) and family == "llama",
            qk_norm=family == "qwen3",
            tied_embeddings=_flag(raw, "tie_word_embeddings", False),
            layer_windows=_windows(raw, family, n_layers),
            source=raw,
        )
        if config.n_parameters > 2e12:
            raise ConfigError(f"{config.n_parameters:.3g} parameters: these sizes cannot be meant")
        return config


def _refuse_what_changes_the_model(raw: dict[str, Any]) -> None:
    if raw.get("auto_map"):
        raise ConfigError(
            "auto_map asks for code shipped with the model; this engine never runs remote code. "
            "If the architecture is a plain LLaMA, Mistral, Qwen2 or Qwen3, remove auto_map."
        )
    if raw.get("quantization_config"):
        raise ConfigError("quantised checkpoints (quantization_config) are not supported")
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {act!r} is not supported, only silu")


def _size(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if not 1 <= value <= LIMITS[name]:
        raise ConfigError(f"{name} must be between 1 and {LIMITS[name]}, got {value}")
    return value


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not 0 < value < 1e300:  # false for NaN; a whole number may be too large for a float
        raise ConfigError(f"{name} must be finite and positive, got {value!r:.40}")
    return float(value)


def _flag(raw: dict[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value


def _rope(raw: dict[str, Any]) -> Rope:
    """transformers 4: rope_theta and rope_scaling; transformers 5: both in rope_parameters."""
    told = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(told, dict):
        raise ConfigError(f"rope settings must be an object, got {told!r}")
    if any(isinstance(value, dict) for value in told.values()):
        raise ConfigError(f"rope settings per layer type are not supported: {', '.join(told)}")
    theta_in = told if told.get("rope_theta") is not None else raw
    theta = _number(theta_in, "rope_theta", 10_000.0)
    kind = told.get("rope_type", told.get("type")) or "default"
    if any(where.get("partial_rotary_factor") not in (None, 1, 1.0) for where in (raw, told)):
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, _number(told, "factor", 1.0))
    if kind != "llama3":
        raise ConfigError(f"rope scaling {kind!r} is not supported; default, linear, llama3 are")
    original = told.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    rope = Rope(
        theta,
        kind,
        _number(told, "factor", 8.0),
        _number(told, "low_freq_factor", 1.0),
        _number(told, "high_freq_factor", 4.0),
        _size({"max_position_embeddings": original}, "max_position_embeddings", 8192),
    )
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ConfigError("rope scaling: low_freq_factor must be below high_freq_factor")
    return rope


def _windows(raw: dict[str, Any], family: str, n_layers: int) -> tuple[int | None, ...]:
    kinds = raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != n_layers):
        raise ConfigError(f"layer_types must list {n_layers} layers")
    window = raw.get("sliding_window", 4096)  # transformers' value where the key is left out
    if family.startswith("qwen") and not _flag(raw, "use_sliding_window", False):
        window = None
    if family == "llama" or window is None:
        return (None,) * n_layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"sliding_window must be a positive whole number or null, got {window!r}")
    if kinds is None:
        first = raw.get("max_window_layers", 28) if family.startswith("qwen") else 0
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ConfigError(f"max_window_layers must be a whole number, got {first!r}")
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer type {kind!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)

"""A model on disk: as an adapter or as whole weights, in the layout that others read too."""

from __future__ import annotations

from pathlib import Path

from llm2vec_fast.model import lora, weights
from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.model.source import Sources, absolute
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.settings import OFFICIAL, OFFICIAL_FILE, OWN_FILE, adapter_hashes, own_settings

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
)  # fmt: skip
# Of vLLM's LlamaBidirectionalModel. It refuses any other word, rightly: it has no weighted mean.
VLLM_POOLING = {"mean": "avg", "bos_token": "cls", "last_token": "last", "eos_token": "last"}


def save(
    model: Transformer,
    sources: Sources,
    settings: dict,
    path: str | Path,
    merge_before_save: bool = False,
    save_config: bool = True,
) -> None:
    """`LLM2Vec.save`, which tells the rest."""
    path = Path(path)
    as_adapter = bool(sources.adapters) and not merge_before_save
    if model.fp8_keep is not None and not as_adapter:
        raise ValueError("save: weights in fp8 are not written; load with dtype='bfloat16'")
    path.mkdir(parents=True, exist_ok=True)
    _make_room(sources, path, as_adapter)
    if as_adapter:
        adapters = [lora.open_adapter(place, model.config) for place in sources.adapters]
        lora.save(adapters, path, absolute(sources.base_name))
    else:
        weights.save(model, path)
        write_json(_config(model, sources, settings), path / "config.json")
    for name in TOKENIZER_FILES:
        source = sources.tokenizer / name
        if source.exists() and source.resolve() != (path / name).resolve():
            (path / name).write_bytes(source.read_bytes())
    if save_config:
        write_json({name: settings[name] for name in OFFICIAL}, path / OFFICIAL_FILE)
    own = own_settings(settings)
    if sources.adapters and not as_adapter:
        own["merged"] = adapter_hashes(sources)
    write_json(own, path / OWN_FILE)


def _make_room(sources: Sources, path: Path, as_adapter: bool) -> None:
    """Removes what an earlier `save` left in the other form: it would be read together with this
    one. What somebody else put there is refused.
    """
    adapters = [directory.resolve() for directory in sources.adapters]
    if path.resolve() in (sources.base.resolve(), *adapters):
        if adapters and not (as_adapter and adapters == [path.resolve()]):
            raise ValueError(f"{path} is what this model was loaded from: save it elsewhere")
        return
    whole = ("config.json", "model*.safetensors", "model.safetensors.index.json")
    other = whole if as_adapter else (lora.CONFIG, lora.WEIGHTS)
    present = [file for pattern in other for file in path.glob(pattern)]
    if present and not (path / OWN_FILE).exists():
        raise ValueError(f"{path} holds another model ({present[0].name}): save it elsewhere")
    for file in present:
        file.unlink()


def _config(model: Transformer, sources: Sources, settings: dict) -> dict:
    """config.json of merged weights: the old one, and what tells others to look both ways.

    transformers 5 goes by is_causal, vLLM by that and by the name of the architecture.
    """
    config, mode = dict(model.config.source), settings["pooling_mode"]
    bidirectional, family = settings["enable_bidirectional"], model.config.family
    config["architectures"] = [f"{family.capitalize()}Model"]
    if bidirectional and family == "llama":  # the only family with such a name in vLLM
        config |= {"architectures": ["LlamaBidirectionalModel"]}
        config |= {"pooling": VLLM_POOLING.get(mode, mode)}
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    config["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    if bidirectional:
        config |= {"is_causal": False, "use_bidirectional_attention": True}
        # With the causal mask the sliding window goes too, for every spelling of it.
        config |= {key: None for key in ("sliding_window", "layer_types") if key in config}
        config |= {key: False for key in ("use_sliding_window",) if key in config}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # transformers 4 would take its default without a word
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    config.setdefault("_name_or_path", sources.base_name)
    return config

"""Where a model's files come from: a local directory, or a hub name that is downloaded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm2vec_fast.model.checkpoint import has_weights
from llm2vec_fast.model.lora import CONFIG as ADAPTER_CONFIG
from llm2vec_fast.model.lora import AdapterError, read_config

FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")


@dataclass(frozen=True)
class Sources:
    """The directories a model is made of; `name` is what the user called it."""

    name: str
    config: Path  # config.json: beside the named adapter (official ones carry it), else the base's
    base: Path  # weights
    adapters: tuple[Path, ...]  # merged in this order
    settings: Path  # where llm2vec_config.json is looked for
    tokenizer: Path
    base_name: str  # the name or path of `base` itself, as adapters record it


def find(name: str) -> Path:
    """The directory of a local path or hub name; a hub name is downloaded into the hub's cache.

    raises: ValueError if it is neither
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists():
        raise ValueError(f"{name!r} is not a directory with a model, and cannot be a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name!r} is no local directory and could not be had from the hub: {error}"
        ) from error


def resolve(base_name: str, peft_names: list[str]) -> Sources:
    """Follows the official layouts: a base, a directory that holds config.json *and* an adapter
    (its adapter_config.json names the base), or an adapter alone; then the adapters named
    explicitly.
    """
    name, directory = base_name, find(base_name)
    first, adapters = directory, [find(peft) for peft in peft_names]
    tokenizer, followed = directory, 0
    while (directory / ADAPTER_CONFIG).exists():
        adapters.insert(0, directory)
        if has_weights(directory):
            break
        parent = read_config(directory).get("base_model_name_or_path")
        followed += 1
        if not isinstance(parent, str) or not parent or followed > 8:
            raise AdapterError(
                f"{directory / ADAPTER_CONFIG}: base_model_name_or_path {parent!r} names no model"
            )
        base_name, directory = parent, find(parent)
    if not any((tokenizer / f).exists() for f in ("tokenizer.json", "tokenizer.model")):
        tokenizer = directory
    settings = adapters[-1] if peft_names else first
    config = next((d for d in (first, directory) if (d / "config.json").exists()), directory)
    return Sources(
        name, config / "config.json", directory, tuple(adapters), settings, tokenizer, base_name
    )

"""Where a model's files come from: a local directory, or a hub name that is downloaded once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llm2vec_fast.adapters import PREFIX, shipped
from llm2vec_fast.model.checkpoint import has_weights
from llm2vec_fast.model.lora import CONFIG as ADAPTER_CONFIG
from llm2vec_fast.model.lora import AdapterError, read_config

SMALL_FILES = (
    "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "adapter_config.json", "model.safetensors.index.json",
)  # fmt: skip
SAMPLE_BYTES, SAMPLES = 64 << 10, 32
FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")


@dataclass(frozen=True)
class Sources:
    """The directories a model is made of; `name` is what the user called it."""

    name: str
    config: Path  # config.json: beside the named adapter (official ones carry it), else the base's
    base: Path  # weights
    adapters: tuple[Path, ...]  # merged in this order
    named_adapters: tuple[str, ...]  # those the user named, as they were named
    settings: Path  # where llm2vec_config.json is looked for
    tokenizer: Path
    base_name: str  # the name or path of `base` itself, as adapters record it

    def fingerprint(self) -> str:
        """A hash that changes when the model does: small files whole, weights by header, size and
        blocks sampled along the file (reading all of a large model would take minutes).
        """
        digest = hashlib.sha256()
        for directory in (self.config.parent, self.tokenizer, self.base, *self.adapters):
            for path in sorted(directory.glob("*")):
                if path.suffix == ".safetensors" or path.name in SMALL_FILES:
                    digest.update(path.name.encode())
                    _sample(path, digest)
        return digest.hexdigest()


def find(name: str) -> Path:
    """The directory of a local path, of a shipped adapter (`shipped:NAME`) or of a hub name, which
    is downloaded into the hub's cache.

    raises: ValueError if it is none of these
    """
    if name.startswith(PREFIX):
        return shipped(name)
    if not name.strip():  # Path("") is the working directory, which nobody meant
        raise ValueError(f"{name!r} names no model; give a directory or a hub name")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        local = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists()
    except (OSError, RuntimeError):  # a name without end, the home of nobody
        local = True
    if local:
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
        name=name,
        config=config / "config.json",
        base=directory,
        adapters=tuple(adapters),
        named_adapters=tuple(peft_names),
        settings=settings,
        tokenizer=tokenizer,
        base_name=base_name,
    )


def absolute(name: str) -> str:
    """A local directory by its full path, a hub name as it is: good from any working directory."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _sample(path: Path, digest) -> None:
    size = path.stat().st_size
    digest.update(str(size).encode())
    whole = path.suffix != ".safetensors" or size <= SAMPLES * SAMPLE_BYTES
    with open(path, "rb") as file:
        if whole:
            digest.update(file.read())
            return
        for at in range(SAMPLES):  # the first block holds the header, the last one the file's end
            file.seek((size - SAMPLE_BYTES) * at // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))

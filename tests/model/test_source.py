"""Where a model's files come from: the layouts of the official library, and no needless network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from llm2vec_fast.model.lora import AdapterError
from llm2vec_fast.model.source import absolute, find, resolve


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def model(directory: Path, tokenizer=True) -> Path:
    """The files of a model, without anything in them that `resolve` would read."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    if tokenizer:
        (directory / "tokenizer.json").touch()
    return directory


def adapter(directory: Path, base=None, config=False, tokenizer=False, weights=False) -> Path:
    directory.mkdir()
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    told["base_model_name_or_path"] = None if base is None else str(base)
    (directory / "adapter_config.json").write_text(json.dumps(told))
    for name, wanted in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("model.safetensors", weights),
    ):
        if wanted:
            (directory / name).touch()
    return directory


def test_a_plain_directory(tmp_path):
    base = model(tmp_path / "base")
    found = resolve(str(base), [])
    assert (found.base, found.adapters, found.named_adapters) == (base, (), ())
    assert (found.config, found.tokenizer, found.settings) == (base / "config.json", base, base)
    assert found.name == found.base_name == str(base)


def test_a_directory_with_a_config_and_an_adapter(tmp_path):
    """How the official library publishes: config.json beside an adapter that names its base."""
    base = model(tmp_path / "base")
    mntp = adapter(tmp_path / "mntp", base, config=True, tokenizer=True)
    found = resolve(str(mntp), [])
    assert (found.base, found.adapters, found.named_adapters) == (base, (mntp,), ())
    assert (found.config, found.tokenizer, found.settings) == (mntp / "config.json", mntp, mntp)
    assert (found.name, found.base_name) == (str(mntp), str(base))


def test_an_adapter_alone_takes_what_it_lacks_from_its_base(tmp_path):
    base = model(tmp_path / "base")
    alone = adapter(tmp_path / "alone", base)
    found = resolve(str(alone), [])
    assert (found.base, found.adapters) == (base, (alone,))
    assert (found.config, found.tokenizer, found.settings) == (base / "config.json", base, alone)


def test_explicit_adapters_come_after_the_named_ones_in_order(tmp_path):
    base = model(tmp_path / "base")
    mntp = adapter(tmp_path / "mntp", base, config=True)
    simcse, extra = adapter(tmp_path / "simcse"), adapter(tmp_path / "extra")
    found = resolve(str(mntp), [str(simcse), str(extra)])
    assert found.base == base
    assert found.adapters == (mntp, simcse, extra)
    assert found.named_adapters == (str(simcse), str(extra))
    assert found.settings == extra
    assert resolve(str(base), [str(simcse)]).adapters == (simcse,)
    assert resolve(str(base), [str(simcse)]).settings == simcse


def test_a_chain_of_adapters_is_followed_to_its_base(tmp_path):
    base = model(tmp_path / "base")
    one = adapter(tmp_path / "one", base)
    two = adapter(tmp_path / "two", one)
    found = resolve(str(two), [])
    assert (found.base, found.adapters) == (base, (one, two))
    assert found.base_name == str(base)


def test_weights_beside_an_adapter_are_its_base(tmp_path):
    both = adapter(tmp_path / "both", "somewhere/else", config=True, tokenizer=True, weights=True)
    found = resolve(str(both), [])
    assert (found.base, found.adapters) == (both, (both,))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_adapters_that_name_each_other_are_an_error(tmp_path, length):
    for i in range(length):
        adapter(tmp_path / str(i), tmp_path / str((i + 1) % length))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        resolve(str(tmp_path / "0"), [])


@pytest.mark.parametrize("base", [None, "", 3, ["x"]])
def test_an_adapter_without_a_base_is_named(tmp_path, base):
    alone = adapter(tmp_path / "alone")
    path = alone / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(AdapterError) as error:
        resolve(str(alone), [])
    assert str(path) in str(error.value)


def test_a_broken_adapter_config_is_named(tmp_path):
    alone = adapter(tmp_path / "alone")
    (alone / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        resolve(str(alone), [])


@pytest.mark.parametrize(
    "name",
    ["{tmp}/absent", "{tmp}/a file", "./absent", "../absent", "a/b/c", "~/absent-model-directory",
     "~nobody-at-all/model", "/" + "x" * 5000],
)  # fmt: skip
def test_absent_paths_are_refused_without_the_network(tmp_path, name):
    (tmp_path / "a file").touch()
    name = name.replace("{tmp}", str(tmp_path))
    with pytest.raises(ValueError, match="is not a directory with a model"):
        resolve(name, [])
    base = model(tmp_path / "base")
    with pytest.raises(ValueError, match="is not a directory with a model"):
        resolve(str(base), [name])
    with pytest.raises(ValueError, match="is not a directory with a model"):
        resolve(str(adapter(tmp_path / "adapter", name)), [])


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="names no model"):
        find(name)


def test_a_file_in_the_working_directory_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "weights").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a directory with a model"):
        find("weights")


def test_a_hub_name_is_downloaded_without_pickles_or_code(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find("owner/name") == tmp_path
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert "*.safetensors" in patterns and "*.json" in patterns
    for pickled in ("pytorch_model.bin", "modeling_x.py", "model.pt", "model.ckpt"):
        assert not any(Path(pickled).match(pattern) for pattern in patterns)


@pytest.mark.parametrize(
    "error",
    [OSError("no route"), LocalEntryNotFoundError("offline"), HFValidationError("bad name")],
)
def test_a_failed_download_is_a_value_error(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"'owner/name'.*could not be had"):
        find("owner/name")


def test_paths_are_recorded_in_full_and_hub_names_as_they_are(tmp_path, monkeypatch):
    model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert absolute("base") == str((tmp_path / "base").resolve())
    assert absolute("owner/name") == "owner/name"


def test_the_fingerprint_changes_with_the_model(tmp_path):
    base = model(tmp_path / "base")
    (base / "model.safetensors").write_bytes(bytes(100))
    tuned = adapter(tmp_path / "tuned", base)
    seen = [resolve(str(base), []).fingerprint(), resolve(str(base), [str(tuned)]).fingerprint()]
    copy = shutil.copytree(base, tmp_path / "copy")
    assert resolve(str(copy), []).fingerprint() == seen[0]
    (copy / "README.md").write_text("notes")
    assert resolve(str(copy), []).fingerprint() == seen[0]
    for file, content in (
        ("model.safetensors", bytes(99) + b"1"),
        ("config.json", b'{"a": 1}'),
        ("tokenizer.json", b"{}"),
    ):
        (base / file).write_bytes(content)
        seen.append(resolve(str(base), []).fingerprint())
    assert len(set(seen)) == len(seen)

"""The promises of SECURITY.md that need more than one part of the package, each with its proof."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llm2vec_fast
from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, formats
from llm2vec_fast.corpus.read import Columns, Rows, open_sources
from llm2vec_fast.model import adapt, lora
from llm2vec_fast.model.checkpoint import WeightsError

ROOT = Path(llm2vec_fast.__file__).parent
# Python tells an audit hook of everything before it does it.
GUARD = """
import json, sys
seen = []
def hook(event, args):
    if event in {forbidden}:
        seen.append(event)
        raise RuntimeError(f"{{event}} {{args}} is forbidden here")
    if event == "open" and str(args[0]).endswith((".bin", ".pt", ".pkl", "modeling.py")):
        seen.append(f"open {{args[0]}}")
import torch, llm2vec_fast
from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search
sys.addaudithook(hook)
"""
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind")


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory) -> Path:
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("security"), "llama"))


@pytest.fixture
def copy(directory, tmp_path) -> Path:
    return shutil.copytree(directory, tmp_path / "model")


@pytest.fixture
def adapter(copy, tmp_path, ours) -> Path:
    model, made = ours(copy), tmp_path / "adapter"
    made.mkdir()
    adapt.attach(model, 2, 4, ["q_proj"])
    adapt.save(model, made, str(copy))
    return made


def guarded(code: str, forbidden=NETWORK, **env) -> subprocess.CompletedProcess:
    """Runs code where the forbidden events raise; the last line it prints is what was seen."""
    whole = GUARD.format(forbidden=forbidden) + code + "\nprint(json.dumps(seen))\n"
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"} | env, "timeout": 120}
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, **options)


# --- network, pickles, code ---


def test_local_models_need_no_socket_and_no_pickle(copy, adapter, tmp_path):
    """Loading, encoding, embedding, searching, saving: with hostile neighbours beside the model."""
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "vocab.pkl"):
        (copy / name).write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    (copy / "modeling.py").write_text("raise SystemExit('remote code ran')")
    (tmp_path / "t.txt").write_text("a list of numbers\nthe keys of a dict\n")
    code = f"""
model = LLM2Vec.from_pretrained({str(copy)!r}, {str(adapter)!r}, dtype="float32")
model.encode(["a list", "the keys"])
embed({str(tmp_path / "t.txt")!r}, model, {str(tmp_path / "out")!r}, show_progress=False)
search({str(tmp_path / "out")!r}, ["a list"], model=model)
model.save({str(tmp_path / "saved")!r})
model.save({str(tmp_path / "merged")!r}, merge_before_save=True)
"""
    done = guarded(code, (*NETWORK, "pickle.find_class"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_hub_name_alone_asks_the_network(tmp_path):
    """The control: where a socket is wanted, the guard sees it, and the user an error."""
    code = """
try:
    LLM2Vec.from_pretrained("nobody-here/no-such-model")
except Exception as error:
    print("told:", "nobody-here/no-such-model" in str(error) or "forbidden" in str(error))
"""
    done = guarded(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert "told: True" in done.stdout, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) & set(NETWORK)


def test_without_tokenizer_json_transformers_asks_nobody_either(copy):
    told = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(told["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]]
    (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    done = guarded(f"LLM2Vec.from_pretrained({str(copy)!r}).encode(['a list'])")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_never_runs(copy, tmp_path, file):
    mark = tmp_path / "it ran"
    (copy / "modeling.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\n")
    told = json.loads((copy / file).read_text())
    kind = "AutoModel" if file == "config.json" else "AutoTokenizer"
    value = "modeling.Model" if file == "config.json" else ["modeling.Model", "modeling.Model"]
    told |= {"auto_map": {kind: value}, "tokenizer_class": "Model", "trust_remote_code": True}
    (copy / file).write_text(json.dumps(told))
    if file == "tokenizer_config.json":
        (copy / "tokenizer.json").unlink()
    done = guarded(f"LLM2Vec.from_pretrained({str(copy)!r})", HF_HUB_TRUST_REMOTE_CODE="1")
    assert done.returncode and "Error" in done.stderr
    assert not mark.exists()


FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_in_the_package_unpickles_or_evaluates(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert FORBIDDEN.isdisjoint(name.split(".")[0] for name in names)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "torch.load", "os.system"), called
        told = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        assert not told.get("trust_remote_code") and not told.get("allow_pickle"), called
        assert not told.get("shell"), called


# --- places and sizes ---


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "llm2vec_config.json",
     "llm2vec_fast.json", "modules.json", "model.safetensors", "model.safetensors.index.json",
     "adapter_config.json", "adapter_model.safetensors"],
)  # fmt: skip
def test_what_is_no_plain_file_is_refused_at_once(copy, adapter, name, kind):
    path = (adapter if name.startswith(("adapter", "llm2vec")) else copy) / name
    path.unlink(missing_ok=True)
    if name == "model.safetensors.index.json":
        (copy / "model.safetensors").unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)  # takes no room on the disk
    began = time.monotonic()
    with pytest.raises(ValueError, match=name.split(".")[0]):
        LLM2Vec.from_pretrained(copy, adapter)
    assert time.monotonic() - began < 10


def test_adapters_do_not_lead_out_of_their_directory(copy, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(WeightsError, match="outside the model's directory"):
        LLM2Vec.from_pretrained(copy, adapter)


@pytest.mark.parametrize("place", ["../outside", "/etc", "..", "1_Pooling/../../outside", 7])
def test_modules_do_not_lead_out_of_their_directory(copy, tmp_path, place):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    kinds = [("Transformer", ""), ("Pooling", place)]
    modules = [{"type": f"sentence_transformers.models.{k}", "path": path} for k, path in kinds]
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json"):
        LLM2Vec.from_pretrained(copy)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_without_end_is_refused(copy, adapter, monkeypatch, key):
    monkeypatch.setattr(lora, "MATCHING_SECONDS", 0.5)
    path, endless = adapter / "adapter_config.json", r"([a-z_.0-9]+)+!"
    told = json.loads(path.read_text())
    told[key] = {endless: 2} if key == "rank_pattern" else endless
    path.write_text(json.dumps(told))
    with pytest.raises(lora.AdapterError, match=r"adapter_config\.json.*does not end"):
        LLM2Vec.from_pretrained(copy, adapter)


def test_a_tokenizer_of_a_larger_vocabulary_reaches_no_device(copy):
    """Ids beyond the embedding end a GPU's process, so they are looked at on the host."""
    path = copy / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"] = {token: 40 * at for token, at in told["model"]["vocab"].items()}
    told["added_tokens"], told["post_processor"] = [], None
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="does the tokenizer belong to this model"):
        LLM2Vec.from_pretrained(copy).encode(["a list of numbers"])


def test_a_tokenizer_that_panics_is_an_error_of_its_file(copy):
    """In Rust a panic is no Exception of Python's."""
    path = copy / "tokenizer.json"
    told = json.loads(path.read_text())
    told["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="is not a valid tokenizer"):
        LLM2Vec.from_pretrained(copy).encode(["a list of numbers"])


# --- compressed input ---


def bomb(path: Path, size: int, unit: bytes) -> None:
    codec = "gzip" if path.suffix == ".gz" else "zstd"
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), codec) as file:
        block = unit * (1 << 20)
        for _ in range(size // len(block)):
            file.write(block)


def peak_kb() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory in /proc")
@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.zst", "t.csv.gz", "t.md.gz"])
def test_a_document_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, name):
    """A quarter of a gigabyte without a newline, of 300 kB or less, never more than a piece of it
    in memory.
    """
    monkeypatch.setattr(formats, "DOCUMENT_LIMIT", 1 << 23)
    path, whole = tmp_path / name, ".md" in name
    bomb(path, 1 << 28, b"\x00" if "csv" not in name else b"a")
    assert path.stat().st_size < 300_000
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kb()
    (source,) = open_sources([path], whole_files=whole)
    if whole:
        with Rows(source, Columns()) as rows:
            (row,), _ = rows.take(2)
        assert "no document" in row.error and not row.text
    else:
        with (
            pytest.raises(ValueError, match=rf"{name}.*no document"),
            Rows(source, Columns()) as rows,
        ):
            rows.take(2)
    assert peak_kb() - before < 100_000


@pytest.mark.parametrize("name", ["t.txt.gz", "t.csv.zst", "t.parquet"])
def test_more_text_than_a_shard_may_hold_is_refused(directory, tmp_path, monkeypatch, name):
    """Kilobytes that unpack to any number of long documents; a smaller shard reads them."""
    monkeypatch.setattr(formats, "TAKE_LIMIT", 1_000_000)
    path, line = tmp_path / name, "a list of values " * 600
    if name == "t.parquet":
        pq.write_table(pa.table({"text": [line] * 300}), path, compression="zstd")
    else:
        with pa.CompressedOutputStream(
            pa.OSFile(str(path), "wb"), "gzip" if name.endswith("gz") else "zstd"
        ) as file:
            file.write(f"text\n{(line + chr(10)) * 300}".encode())
    model = LLM2Vec.from_pretrained(directory, dtype="float32")
    with pytest.raises(ValueError, match=rf"{name}.*--rows-per-shard"):
        embed(path, model, tmp_path / "out", show_progress=False)
    options = {"rows_per_shard": 50, "show_progress": False, "max_length": 16}
    done = embed(path, directory, tmp_path / "small", **options)
    assert done.documents >= 300

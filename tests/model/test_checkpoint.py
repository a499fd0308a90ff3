"""Weight files that are malformed or hostile: a WeightsError naming the file, never a crash."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from llm2vec_fast.model import ModelConfig, Transformer, checkpoint, weights
from llm2vec_fast.model.checkpoint import (
    Reader,
    TensorOnDisk,
    WeightsError,
    open_checkpoint,
    read_header,
    read_tensor,
    save_checkpoint,
)

needs_symlinks = pytest.mark.skipif(os.name == "nt", reason="symlinks need rights on Windows")


def entry(start: int, end: int, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def write(
    path: Path, header: dict | str | bytes, data=bytes(64), length: int | None = None
) -> Path:
    """A safetensors file as told, right or wrong."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


GOOD = {"a": entry(0, 32), "b": entry(32, 64)}


def test_a_good_file(tmp_path):
    values = torch.arange(16, dtype=torch.float32)
    found = read_header(write(tmp_path / "x.safetensors", GOOD, values.numpy().tobytes()))
    assert list(found) == ["a", "b"]
    assert (found["b"].shape, found["b"].dtype, found["b"].size) == ((8,), "F32", 32)
    assert torch.equal(read_tensor(found["b"]), values[8:])


def test_metadata_is_not_a_tensor(tmp_path):
    header = {"__metadata__": {"format": "pt"}, **GOOD}
    assert list(read_header(write(tmp_path / "x.safetensors", header))) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted_as_torch_does(tmp_path, dtype, wanted):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"a": values}, tmp_path / "x.safetensors")
    got = read_tensor(read_header(tmp_path / "x.safetensors")["a"], wanted)
    assert got.dtype == wanted
    assert torch.equal(got, values.to(wanted))


@pytest.mark.parametrize("chunk", [8, 24, 128])
def test_tensors_larger_than_the_buffer(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    values = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"a": values, "b": values + 1}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert torch.equal(read_tensor(found["b"]), (values + 1).float())
    values[-1, -1] = float("nan")
    save_file({"a": values}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="'a'"):
        read_tensor(read_header(tmp_path / "x.safetensors")["a"])


DUPLICATE = f'{{"a":{json.dumps(GOOD["a"])},"a":{json.dumps(GOOD["b"])}}}'
TWIN = f'{{"a":{json.dumps(entry(0, 64))},"a":{json.dumps(entry(0, 64))}}}'
MALFORMED = {
    "header longer than the file": (GOOD, bytes(64), 10_000),
    "header beyond the format's limit": (GOOD, bytes(64), 2**40),
    "header length of all ones": (GOOD, bytes(64), 2**64 - 1),
    "header of no length": (GOOD, bytes(64), 0),
    "data cut short": (GOOD, bytes(63), None),
    "no data": (GOOD, b"", None),
    "trailing bytes": (GOOD, bytes(65), None),
    "overlap": ({"a": entry(0, 36), "b": entry(32, 64)}, bytes(64), None),
    "a hole": ({"a": entry(0, 28), "b": entry(32, 64)}, bytes(64), None),
    "same place twice": ({"a": entry(0, 64), "b": entry(0, 64)}, bytes(64), None),
    "end before start": ({"a": entry(64, 0, [16])}, bytes(64), None),
    "negative offset": ({"a": entry(-32, 32, [16])}, bytes(64), None),
    "fractional offset": ({"a": entry(0.5, 64, [16])}, bytes(64), None),
    "shape larger than its bytes": ({"a": entry(0, 64, [17])}, bytes(64), None),
    "shape that overflows": ({"a": entry(0, 64, [2**40, 2**40])}, bytes(64), None),
    "negative shape": ({"a": entry(0, 64, [-4, -4])}, bytes(64), None),
    "shape that is no list": ({"a": entry(0, 64, 16)}, bytes(64), None),
    "unknown dtype": ({"a": entry(0, 64, [16], "F12")}, bytes(64), None),
    "dtype missing": ({"a": {"shape": [16], "data_offsets": [0, 64]}}, bytes(64), None),
    "one offset": ({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64]}}, bytes(64), None),
    "entry is a number": ({"a": 3}, bytes(64), None),
    "duplicate key": (DUPLICATE, bytes(64), None),
    "duplicate key, same entry": (TWIN, bytes(64), None),
    "no tensors": ({}, b"", None),
    "metadata alone": ({"__metadata__": {"format": "pt"}}, b"", None),
    "metadata is no map of strings": ({"__metadata__": {"x": {"y": 1}}, **GOOD}, bytes(64), None),
    "not json": ("{a: 1}", bytes(64), None),
    "a json list": ("[]", bytes(64), None),
    "half of a json object": (json.dumps(GOOD)[:-3], bytes(64), None),
    "not utf-8": (b'{"\xff":' + json.dumps(entry(0, 64)).encode() + b"}", bytes(64), None),
    "deeply nested": ('{"a":' + "[" * 100_000, bytes(64), None),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_by_name(tmp_path, case):
    path = write(tmp_path / "model.safetensors", *MALFORMED[case])
    with pytest.raises(WeightsError) as error:
        open_checkpoint(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\x80\x04K.", b"version https://git-lfs\n"])
def test_files_that_are_no_safetensors_at_all(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_directory_in_place_of_the_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "F8_E4M3"])
def test_dtypes_that_are_no_weights(tiny_model, tmp_path, monkeypatch, dtype):
    directory = tiny_model(tmp_path, "llama")
    kind = {"I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn}[dtype]  # fmt: skip
    path = directory / "model.safetensors"
    tensors = {t.name: read_tensor(t) for t in read_header(path).values()}
    tensors["norm.weight"] = torch.ones(48).to(kind)
    save_file(tensors, path)
    config = ModelConfig.from_file(directory / "config.json")
    nothing_is_allocated(monkeypatch)
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*'norm\.weight' is {dtype}"):
        weights.load(directory, config, False, torch.float32, torch.device("cpu"))


def nothing_is_allocated(monkeypatch):
    def allocation(*args, **kwargs):
        raise AssertionError("something was allocated")

    monkeypatch.setattr(torch, "empty", allocation)


# --- the index of shards


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Two shards of one tensor each, and their index; beside it, a file that is not the model's."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a": torch.ones(4)}, directory / "one.safetensors")
    save_file({"b": torch.ones(4)}, directory / "two.safetensors")
    save_file({"b": torch.ones(4)}, tmp_path / "secret.safetensors")
    save_index(directory, {"a": "one.safetensors", "b": "two.safetensors"})
    return directory


def save_index(directory: Path, weight_map, **more) -> None:
    told = {"metadata": {}, "weight_map": weight_map, **more}
    (directory / "model.safetensors.index.json").write_text(json.dumps(told))


def refused(directory: Path, *told: str) -> None:
    with pytest.raises(WeightsError) as error:
        open_checkpoint(directory)
    for part in told:
        assert part in str(error.value)


def test_good_shards(sharded):
    assert sorted(open_checkpoint(sharded)) == ["a", "b"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "sub/../../secret.safetensors", "./two.safetensors", "..", ".", "",
     "sub/two.safetensors", "two.safetensors\0", "\ud800.safetensors", "x" * 5000],
)  # fmt: skip
def test_shards_must_be_files_of_the_directory(sharded, name):
    (sharded / "sub").mkdir()
    shutil.copy(sharded / "two.safetensors", sharded / "sub")
    save_index(sharded, {"a": "one.safetensors", "b": name})
    refused(sharded, str(sharded))


def test_absolute_paths_are_refused(sharded):
    save_index(sharded, {"a": "one.safetensors", "b": str(sharded / "two.safetensors")})
    refused(sharded, str(sharded), "not the name of a file")


@pytest.mark.parametrize("value", [3, None, ["two.safetensors"], {"x": 1}, True])
def test_shards_must_be_names(sharded, value):
    save_index(sharded, {"a": value})
    refused(sharded, str(sharded))
    save_index(sharded, {"a": value, "b": "two.safetensors"})
    refused(sharded, str(sharded))


@needs_symlinks
def test_links_out_of_the_directory_are_refused(sharded):
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").symlink_to("../secret.safetensors")
    refused(sharded, str(sharded / "two.safetensors"), "outside")
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").symlink_to("two.safetensors")  # a loop
    refused(sharded, str(sharded / "two.safetensors"))


@needs_symlinks
def test_a_single_file_that_links_out_is_refused(sharded):
    (sharded / "model.safetensors").symlink_to("../secret.safetensors")
    refused(sharded, str(sharded / "model.safetensors"), "outside")


@needs_symlinks
def test_links_inside_the_directory_are_followed(sharded):
    (sharded / "real").mkdir()
    (sharded / "two.safetensors").rename(sharded / "real" / "blob")
    (sharded / "two.safetensors").symlink_to("real/blob")
    assert sorted(open_checkpoint(sharded)) == ["a", "b"]


@needs_symlinks
def test_the_hub_cache_is_accepted_and_nothing_else_of_it(sharded, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shutil.copy(sharded / "one.safetensors", blobs / "x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/x")
    assert list(open_checkpoint(snapshot)) == ["a"]
    through_a_link = tmp_path / "link"
    through_a_link.symlink_to(snapshot, target_is_directory=True)
    assert list(open_checkpoint(through_a_link)) == ["a"]
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    refused(snapshot, "outside")
    elsewhere = tmp_path / "models--a--b" / "other" / "0123"
    elsewhere.mkdir(parents=True)
    (elsewhere / "model.safetensors").symlink_to("../../blobs/x")
    refused(elsewhere, "outside")


def test_a_missing_shard(sharded):
    (sharded / "two.safetensors").unlink()
    refused(sharded, str(sharded / "two.safetensors"), "is missing")


def test_a_key_in_two_shards(sharded):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, sharded / "two.safetensors")
    refused(sharded, str(sharded / "two.safetensors"), "'a'")


def test_an_index_that_names_what_is_not_there(sharded):
    save_index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    refused(sharded, "index.json", "'c'")
    save_index(sharded, {"a": "two.safetensors", "b": "one.safetensors"})
    refused(sharded, "index.json")


@pytest.mark.parametrize(
    "content",
    ["", "not json", "[]", "3", "null", "{}", '{"weight_map": null}', '{"weight_map": [1]}',
     '{"weight_map": "one.safetensors"}', '{"weight_map": {"a": ["x"]}}', "[" * 100_000,
     '{"weight_map": {"a": "two.safetensors", "a": "one.safetensors"}}'],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_an_index_that_is_no_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, str(sharded / "model.safetensors.index.json"))


def test_an_index_of_nothing_gives_no_weights(tiny_model, tmp_path):
    directory = tiny_model(tmp_path, "llama")
    (directory / "model.safetensors").unlink()
    save_index(directory, {})
    config = ModelConfig.from_file(directory / "config.json")
    with pytest.raises(WeightsError, match="missing weights"):
        weights.load(directory, config, False, torch.float32, torch.device("cpu"))


def test_a_malformed_shard_is_named(sharded):
    write(sharded / "two.safetensors", GOOD, bytes(63))
    refused(sharded, str(sharded / "two.safetensors"))


def test_only_a_pickle(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    refused(tmp_path, str(tmp_path), "pytorch_model.bin", "pickle", "safetensors")


def test_no_weights_and_no_directory(tmp_path):
    refused(tmp_path, str(tmp_path), "no model.safetensors")
    refused(tmp_path / "gone", str(tmp_path / "gone"))


# --- values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_model, tmp_path, bad, dtype):
    directory = tiny_model(tmp_path, "llama")
    path = directory / "model.safetensors"
    tensors = {t.name: read_tensor(t) for t in read_header(path).values()}
    tensors["layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, path)
    config = ModelConfig.from_file(directory / "config.json")
    with pytest.raises(WeightsError) as error:
        weights.load(directory, config, False, dtype, torch.device("cpu"))
    assert "layers.1.mlp.up_proj.weight" in str(error.value)
    assert str(path) in str(error.value)


def test_infinities_that_cancel_are_seen(tmp_path):
    save_file({"a": torch.tensor([float("inf"), 1.0, float("-inf")])}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="'a'"):
        read_tensor(read_header(tmp_path / "x.safetensors")["a"])


def test_what_overflows_in_the_dtype_asked_for_is_refused(tmp_path):
    save_file({"a": torch.tensor([1.0, 1e6])}, tmp_path / "x.safetensors")
    source = read_header(tmp_path / "x.safetensors")["a"]
    assert read_tensor(source, torch.bfloat16).isfinite().all()
    with pytest.raises(WeightsError, match="in the dtype they are loaded to"):
        read_tensor(source, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_weights_are_not_refused_however_large(tmp_path, dtype):
    huge = torch.finfo(dtype).max  # the sum, which is looked at first, overflows
    save_file({"a": torch.full((64,), huge, dtype=dtype)}, tmp_path / "x.safetensors")
    assert (read_tensor(read_header(tmp_path / "x.safetensors")["a"], dtype) == huge).all()


# --- reading by several threads

CPU = torch.device("cpu")


def pairs_of(path: Path, wanted=None, device=CPU) -> list[tuple[torch.Tensor, TensorOnDisk]]:
    """Empty destinations for a file's tensors, in `wanted` or in the dtypes of the file."""
    return [
        (torch.empty(x.shape, dtype=wanted or checkpoint.DTYPES[x.dtype], device=device), x)
        for x in read_header(path).values()
    ]


@pytest.fixture
def odd_file(tmp_path, monkeypatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors of every dtype, of none, one and odd numbers of elements; 56 bytes make a piece."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 56)
    noise, tensors = torch.Generator().manual_seed(0), {}
    for dtype in checkpoint.DTYPES.values():
        for shape in ((), (1,), (0, 3), (7,), (28,), (29,), (37, 11), (3, 5, 7)):
            values = torch.randn(shape, generator=noise, dtype=torch.float64)
            tensors[f"{dtype} {shape}"] = values.to(dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors", tensors


def check_equal(pairs, tensors) -> None:
    assert len(pairs) == len(tensors)
    for got, source in pairs:
        assert torch.equal(got.cpu(), tensors[source.name].to(got.dtype)), source.name


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_threads_bring_the_same_bytes(odd_file, threads, wanted):
    path, tensors = odd_file
    pairs = pairs_of(path, wanted)
    reader = Reader(CPU, threads)
    reader.read(random.Random(0).sample(pairs, len(pairs)))
    reader.refuse_non_finite()
    check_equal(pairs, tensors)


def test_several_files_at_once(odd_file, tmp_path):
    path, tensors = odd_file
    shutil.copy(path, tmp_path / "y.safetensors")
    first, second = pairs_of(path), pairs_of(tmp_path / "y.safetensors", torch.float32)
    Reader(CPU, 3).read(first + second)
    check_equal(first, tensors)
    check_equal(second, tensors)


def test_weights_that_are_made_in_inference_mode(odd_file):
    path, tensors = odd_file
    with torch.inference_mode():
        pairs = pairs_of(path)
        Reader(CPU, 3).read(pairs)
    check_equal(pairs, tensors)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_not_finite_is_named_whoever_read_it(odd_file, threads):
    path, tensors = odd_file
    name = "torch.float16 (37, 11)"
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, path)
    reader = Reader(CPU, threads)
    reader.read(pairs_of(path))
    with pytest.raises(WeightsError, match=r"x\.safetensors: 'torch.float16 \(37, 11\)'"):
        reader.refuse_non_finite()


class Pinned(Reader):
    """The way to a GPU without one: what is queued there runs as late as it may, when an event
    behind it is waited for. A buffer that is filled again too early gives wrong weights.
    """

    def __init__(self, threads: int):
        super().__init__(CPU, threads)
        self.pinned = True
        self.queued, self.done, self.most, self.buffers = [], 0, 0, 0
        self.lock = threading.Lock()

    def _new_buffer(self):
        self.buffers += 1
        return torch.full((checkpoint.CHUNK_BYTES,), 255, dtype=torch.uint8)

    def _bring(self, piece, raw):
        self.queued.append(lambda: super(Pinned, self)._bring(piece, raw))
        self.most = max(self.most, len(self.queued) - self.done)

    def _event(self, device):
        behind = len(self.queued)
        return SimpleNamespace(synchronize=lambda: self.run_until(behind))

    def run_until(self, behind: int) -> None:
        with self.lock:
            while self.done < behind:
                self.queued[self.done]()
                self.done += 1


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("wanted", [None, torch.float32])
def test_a_buffer_waits_for_the_copy_out_of_it(odd_file, threads, wanted):
    path, tensors = odd_file
    pairs, reader = pairs_of(path, wanted), Pinned(threads)
    reader.read(pairs)
    assert reader.done < len(reader.queued)  # nobody waits for the device at the end
    reader.run_until(len(reader.queued))
    reader.refuse_non_finite()
    check_equal(pairs, tensors)
    if threads > 1:
        assert reader.buffers == 2 * threads
        assert reader.most > 1  # pieces are read while others are copied


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kept", [-8, 56, 0])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch, threads, kept):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 56)
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100), "b": torch.ones(100)}, path)
    pairs = pairs_of(path)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(WeightsError, match=r"x\.safetensors ended while '[ab]' was being read"):
        Reader(CPU, threads).read(pairs)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_vanishes_before_it_is_read(odd_file, threads):
    pairs = pairs_of(odd_file[0])
    odd_file[0].unlink()
    with pytest.raises(WeightsError, match=r"x\.safetensors: 'torch.* cannot be read: .*No such"):
        Reader(CPU, threads).read(pairs)


@pytest.mark.parametrize("where", ["_fill", "_bring"])  # in a thread, in the caller
@pytest.mark.parametrize("error", [WeightsError, KeyboardInterrupt])
def test_the_first_error_ends_all_threads(odd_file, monkeypatch, where, error):
    good, begun = getattr(Reader, where), []

    def fails(self, piece, *more):
        begun.append(piece)
        if len(begun) == 5:
            raise error("the fifth piece")
        return good(self, piece, *more)

    monkeypatch.setattr(Reader, where, fails)
    pairs = pairs_of(odd_file[0])
    with pytest.raises(error, match="the fifth piece"):
        Reader(CPU, 3).read(pairs)
    assert len(begun) <= 5 + 2 * 3 < len(pairs)
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_pinned_buffers_on_a_gpu(odd_file, wanted):
    path, tensors = odd_file
    device = torch.device("cuda", torch.cuda.current_device())
    pairs, reader = pairs_of(path, wanted, device), Reader(device)
    reader.read(pairs)
    reader.refuse_non_finite()
    assert all(buffer.is_pinned() for buffer in reader._buffers.values())
    assert len(reader._buffers) == 2 * reader.threads
    check_equal(pairs, tensors)


@pytest.mark.gpu
def test_large_tensors_on_a_gpu(tmp_path):
    """Pieces of the real size, more than there are buffers, behind work that is still queued."""
    noise = torch.Generator().manual_seed(0)
    values = torch.randint(-99, 99, (151, 1_000_003), generator=noise, dtype=torch.int8).bfloat16()
    save_file({"a": values, "b": values[:1] + 0.5}, tmp_path / "x.safetensors")
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 1e-2
    del busy  # its memory may be given to the destination, which must then wait
    pairs = pairs_of(tmp_path / "x.safetensors", device="cuda")
    checkpoint.read_into(pairs)
    check_equal(pairs, {"a": values, "b": values[:1] + 0.5})
    values[77, 5] = float("inf")
    save_file({"a": values}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="'a'"):
        checkpoint.read_into(pairs_of(tmp_path / "x.safetensors", device="cuda"))


# --- random damage


SMALL = {
    "model_type": "llama", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def damaged(good: bytes, draw: random.Random) -> bytes:
    """The file with a few flipped bytes, a cut, an insertion or an exchange; header preferred."""
    header, out = 8 + int.from_bytes(good[:8], "little"), bytearray(good)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(8) if draw.random() < 0.1 else draw.randrange(header)
        at = draw.randrange(len(good)) if draw.random() < 0.2 else at
        kind = draw.random()
        if kind < 0.4:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif kind < 0.6:  # still JSON, often: another digit, quote or bracket
            out[at % len(out)] = draw.choice(b'0123456789[]{}:,"-eE. ')
        elif kind < 0.75:
            del out[at : at + draw.randrange(1, 40)]
        elif kind < 0.85:
            out[at:at] = draw.randbytes(draw.randrange(1, 9))
        else:
            del out[draw.randrange(len(out)) :]
        if not out:
            break
    return bytes(out)


def test_random_damage_is_refused_or_gives_a_model(tmp_path):
    config = ModelConfig.from_dict(SMALL)
    draw = torch.Generator().manual_seed(0)
    shapes = {name: slot.shape for name, slot in weights.name_map(config).items()}
    path = tmp_path / "model.safetensors"
    save_file({n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}, path)
    good, outcomes = path.read_bytes(), {"refused": 0, "loaded": 0}
    for seed in range(400):
        path.write_bytes(damaged(good, random.Random(seed)))
        try:
            model = weights.load(tmp_path, config, False, torch.float32, torch.device("cpu"))
        except WeightsError:
            outcomes["refused"] += 1
        else:
            assert isinstance(model, Transformer)
            assert all(weight.isfinite().all() for weight in model.parameters())
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 200 and outcomes["loaded"] > 10, outcomes


def test_saving_writes_nothing_half(tmp_path, monkeypatch):
    """A failed write leaves the old file whole; no partial file stays under the final name."""
    save_checkpoint([("a", torch.ones(4))], tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def fails(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint([("a", torch.zeros(4))], tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before

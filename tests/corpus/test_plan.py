"""The manifest: first come, the same job or a difference that is shown, and new inputs."""

from __future__ import annotations

import json
import os
import threading

import fsspec
import pytest

from llm2vec_fast.corpus.plan import (
    ENDS,
    MANIFEST,
    MODEL_PARTS,
    PARTS,
    Job,
    ManifestError,
    fingerprint_of,
    in_order,
    read_manifest,
    require_parts,
    settle_manifest,
)
from llm2vec_fast.corpus.read import Source, open_sources


def told(*sources, **options):
    return {"inputs": [fingerprint_of(source) for source in sources], **options}


@pytest.fixture
def files(tmp_path):
    """make(name, text="") -> Source of a new file"""

    def make(name: str, text: str = "a\nb\n") -> Source:
        (tmp_path / name).write_text(text)
        return open_sources([tmp_path / name])[0]

    return make


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def touch(source: Source, seconds: float) -> None:
    stat = os.stat(source.files[0])
    os.utime(source.files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 10**9)))


def test_shards_have_names_that_sort():
    assert Job(2, 31).shard == "part-00002-000031.parquet"


def test_many_processes_at_once_make_one_manifest(out, files):
    source = files("a.txt")
    errors = []

    def settle(rank: int) -> None:
        try:
            settle_manifest(out, told(source, precision="float16" if rank else "int8"))
        except ManifestError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=settle, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) in (1, 7) and all("precision" in error for error in errors)
    assert [path.name for path in out.iterdir()] == [MANIFEST]


def test_append_takes_new_inputs_and_keeps_the_order_of_the_old(out, files, tmp_path):
    b, c = files("b.txt"), files("c.txt")
    settle_manifest(out, told(b, c))
    a = files("a.txt")
    sources = in_order(out, open_sources([tmp_path]))  # a directory sorts a to the front
    assert [s.name for s in sources] == [b.name, c.name, a.name]
    with pytest.raises(ManifestError, match=r"a\.txt new.*--append"):
        settle_manifest(out, told(*sources))
    settle_manifest(out, told(*sources), append=True)
    there = json.loads((out / MANIFEST).read_text())["inputs"]
    assert [source["path"] for source in there] == [b.name, c.name, a.name]
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    settle_manifest(out, told(*in_order(out, open_sources([tmp_path]))))  # a plain resume


def test_append_refuses_missing_and_changed_inputs(out, files):
    a, b = files("a.txt"), files("b.txt")
    settle_manifest(out, told(a, b))
    with pytest.raises(ManifestError, match=r"inputs\[1\]: .*b\.txt was an input"):
        settle_manifest(out, told(a, files("c.txt")), append=True)
    files("b.txt", "longer than before\n")
    with pytest.raises(ManifestError, match=r"inputs\[1\]\.size: 4 there, 19 now .*b\.txt"):
        settle_manifest(out, told(a, b, files("c.txt")), append=True)
    assert len(json.loads((out / MANIFEST).read_text())["inputs"]) == 2


def test_other_options_are_refused_with_append_too(out, files):
    settle_manifest(out, told(files("a.txt"), precision="int8"))
    wanted = told(files("a.txt"), files("b.txt"), precision="float16")
    with pytest.raises(ManifestError, match="precision: 'int8' there, 'float16' now"):
        settle_manifest(out, wanted, append=True)


def test_a_touched_file(out, files):
    """A hash of the whole of a small file outweighs its time; of a large one only the ends are
    known, and the message says how to vouch for the rest.
    """
    small, large = files("small.txt"), files("large.txt", "x" * (2 * ENDS + 1))
    settle_manifest(out, told(small, large))
    touch(small, 5)
    settle_manifest(out, told(small, large))
    touch(large, 5)
    with pytest.raises(ManifestError, match=r"inputs\[1\]\.mtime_ns.*touch -d @(\S+)") as caught:
        settle_manifest(out, told(small, large))
    seconds = str(caught.value).split("touch -d @")[1].split()[0]
    assert os.system(f"touch -d @{seconds} {large.files[0]}") == 0
    settle_manifest(out, told(small, large))
    with open(small.files[0], "r+") as file:  # same size, other bytes
        file.write("z")
    with pytest.raises(ManifestError, match=r"inputs\[0\]\.ends"):
        settle_manifest(out, told(small, large))


def test_a_job_of_files_sees_every_file(out, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)

    def now():
        return told(*open_sources([folder], whole_files=True))

    settle_manifest(out, now())
    settle_manifest(out, now())
    (folder / "b.txt").write_text("longer")
    with pytest.raises(ManifestError, match=r"inputs\[0\]\.names"):
        settle_manifest(out, now())
    (folder / "d.txt").write_text("d")
    with pytest.raises(ManifestError, match=r"inputs\[0\]\.files: 3 there, 4 now"):
        settle_manifest(out, now())


def test_urls_have_fingerprints(out):
    url = "memory://plan/a.txt"
    with fsspec.open(url, "wb") as file:
        file.write(b"one\ntwo\n")
    settle_manifest(out, told(*open_sources([url])))
    settle_manifest(out, told(*open_sources([url])))
    with fsspec.open(url, "wb") as file:
        file.write(b"one\n222\n")
    with pytest.raises(ManifestError, match=r"inputs\[0\]\.ends.*memory"):
        settle_manifest(out, told(*open_sources([url])))


def test_standard_input_has_no_fingerprint():
    assert fingerprint_of(Source("-", "txt", ("-",), False)) == {"path": "-"}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 99}', '{"format": 1, "inputs": 3}'])
def test_a_broken_manifest_is_named(out, files, text):
    (out / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json is not the manifest"):
        settle_manifest(out, told(files("a.txt")))


WHOLE = {
    "rows_per_shard": 4, "columns": {"keep": []}, "vectors": {"dimension": 8, "precision": "int8"},
    "model": {"base": "m", "adapters": [], "settings": {}, "dtype": "float32", "fingerprint": "f"},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS | MODEL_PARTS)
def test_a_manifest_that_lacks_a_part_is_named(out, files, part):
    settle_manifest(out, told(files("a.txt"), **WHOLE))
    whole = read_manifest(out)
    *outer, name = part.split(".")
    kinds = PARTS | MODEL_PARTS
    for broken in ({}, {name: None}, {name: {"a": 1} if kinds[part] is not dict else "a"}):
        manifest = json.loads(json.dumps(whole))
        place = manifest[outer[0]] if outer else manifest
        del place[name]
        place.update(broken)
        (out / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ManifestError, match=rf"not the manifest.*{part}"):
            require_parts(out, read_manifest(out), MODEL_PARTS)


def test_a_manifest_of_vectors_that_cannot_be_is_named(out, files):
    settle_manifest(out, told(files("a.txt"), **WHOLE))
    for wrong in ({"precision": "int3"}, {"dimension": 0}):
        manifest = json.loads((out / MANIFEST).read_text())
        manifest["vectors"] = WHOLE["vectors"] | wrong
        (out / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ManifestError, match="not the manifest"):
            read_manifest(out)


def test_a_manifest_of_the_first_version_says_nothing_of_the_layout(out, files):
    settle_manifest(out, told(files("a.txt")))
    before = json.loads((out / MANIFEST).read_text())
    assert "output_format" not in before
    settle_manifest(out, told(files("a.txt"), output_format="parquet"))
    with pytest.raises(ManifestError, match="output_format"):
        settle_manifest(out, told(files("a.txt"), output_format="npy"))


def test_a_budget_that_nobody_asked_for_is_that_of_the_manifest(out, files):
    """It goes by the free memory: another rank or a later run finds another."""
    source, later = files("a.txt"), files("b.txt")

    def settle(budget, *sources, **options):
        vectors = {"tokens_per_batch": budget, "precision": "int8"}
        return settle_manifest(out, told(*sources, vectors=vectors), **options)["vectors"]

    assert settle(8192, source, any_budget=True)["tokens_per_batch"] == 8192
    assert settle(4096, source, any_budget=True)["tokens_per_batch"] == 8192
    assert settle(8192, source)["tokens_per_batch"] == 8192
    with pytest.raises(ManifestError, match="tokens_per_batch: 8192 there, 4096 now"):
        settle(4096, source)
    appended = settle(4096, source, later, append=True, any_budget=True)
    there = json.loads((out / MANIFEST).read_text())
    assert appended == there["vectors"] == settle(8192, source, later)
    assert len(there["inputs"]) == 2


def test_a_manifest_without_vectors_is_another_job(out, files):
    source = files("a.txt")
    settle_manifest(out, told(source))
    with pytest.raises(ManifestError, match=r"vectors: None there"):
        settle_manifest(out, told(source, vectors={"tokens_per_batch": 1}), any_budget=True)

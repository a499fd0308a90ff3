"""The .npy files are numpy's own, and a header that is not ours is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm2vec_fast.corpus.npy import npy_beside, npy_blocks, npy_form, write_npy

KINDS = (np.float32, np.float16, np.int8, np.uint8)


@given(
    vectors=st.sampled_from(KINDS).flatmap(
        lambda kind: arrays(kind, st.tuples(st.integers(0, 9), st.integers(1, 5)))
    ),
    rows=st.integers(1, 10),
)
def test_numpy_reads_what_is_written_and_blocks_are_its_rows(tmp_path_factory, vectors, rows):
    path = tmp_path_factory.getbasetemp() / "v.npy"
    with open(path, "wb") as file:
        assert write_npy(file, vectors) == file.tell()
    saved = path.with_name("numpy.npy")
    np.save(saved, vectors)
    assert path.read_bytes() == saved.read_bytes()
    checksum = hashlib.sha256(vectors).hexdigest()
    blocks = list(npy_blocks(path, len(vectors), rows, checksum))
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    if blocks:
        np.testing.assert_array_equal(np.concatenate(blocks), vectors)
        blocks[0][:] = 0  # nobody else's memory
    assert npy_form(path) == (vectors.dtype.name, vectors.shape[1])


@pytest.mark.parametrize(
    "other",
    [
        np.zeros(5, np.float32),
        np.zeros((5, 2), np.float64),
        np.zeros((5, 2), ">f4"),
        np.asfortranarray(np.zeros((5, 2), np.float32)),
        np.zeros((4, 2), np.float32),
    ],
    ids=["1-D", "float64", "big-endian", "fortran", "rows"],
)
def test_other_arrays_are_refused(tmp_path, other):
    np.save(tmp_path / "v.npy", other)
    checksum = hashlib.sha256(np.ascontiguousarray(other)).hexdigest()
    with pytest.raises(ValueError, match="npy"):
        list(npy_blocks(tmp_path / "v.npy", 5, 5, checksum))


def test_a_header_full_of_nonsense(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((,,")
    with pytest.raises(ValueError, match="broken"):
        npy_form(tmp_path / "v.npy")


def test_the_name(tmp_path):
    assert npy_beside(tmp_path / "part-0-1.parquet") == tmp_path / "part-0-1.npy"

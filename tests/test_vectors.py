"""Finishing vectors: edge cases that the encoder's tests do not reach."""

from __future__ import annotations

import numpy as np
import pytest

from llm2vec_fast.vectors import check_form, finish


def test_zero_rows_stay_zero_in_every_form():
    zero = np.zeros((2, 8), dtype=np.float32)
    for precision in ("float32", "float16", "int8"):
        out, scale = finish(zero, None, True, precision)
        assert not out.any() and (scale is None or not scale.any())
    assert not finish(zero, None, True, "binary")[0].any()


def test_no_rows():
    none = np.zeros((0, 8), dtype=np.float32)
    assert finish(none, 4, True, "float32")[0].shape == (0, 4)
    assert finish(none, None, False, "binary")[0].shape == (0, 1)
    assert finish(none, None, False, "int8")[1].shape == (0,)


def test_int8_uses_the_whole_range_of_each_row():
    rows = np.array([[1.0, -2.0, 0.5], [1e-6, 0.0, -1e-6]], dtype=np.float32)
    steps, scale = finish(rows, None, False, "int8")
    assert np.abs(steps).max(axis=1).tolist() == [127, 127]
    np.testing.assert_allclose(steps * scale[:, None], rows, atol=float(scale.max()) / 2)


@pytest.mark.parametrize(("dim", "precision"), [(0, "float32"), (9, "float32"), (None, "uint4")])
def test_forms_that_cannot_be(dim, precision):
    with pytest.raises(ValueError):
        check_form(8, dim, precision)

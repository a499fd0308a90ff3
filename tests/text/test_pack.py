"""Which texts share a batch: the budget, the order, and that every text is in exactly one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_fast.text import pack


def as_lists(batches) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_longest_first_and_filled_to_the_budget():
    assert as_lists(pack([3, 9, 5, 7], 12)) == [[1], [3, 2], [0]]


def test_a_batch_may_be_exactly_full():
    assert as_lists(pack([4, 4, 4], 8)) == [[0, 1], [2]]


def test_equal_lengths_keep_their_order():
    assert as_lists(pack([2, 5, 2, 5, 2, 5], 100)) == [[1, 3, 5, 0, 2, 4]]


def test_a_text_beyond_the_budget_is_alone():
    assert as_lists(pack([1, 50, 1, 60], 10)) == [[3], [1], [0, 2]]


def test_max_texts_caps_a_batch():
    assert as_lists(pack([1] * 5, 100, 2)) == [[0, 1], [2, 3], [4]]
    assert as_lists(pack([1] * 3, 100, 1)) == [[0], [1], [2]]


def test_nothing_gives_no_batches():
    assert pack([], 10) == []


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(budget):
    with pytest.raises(ValueError, match="tokens_per_batch"):
        pack([1], budget)


@pytest.mark.parametrize("cap", [0, -3])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(ValueError, match="batch_size"):
        pack([1], 10, cap)


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    budget=st.integers(1, 100),
    cap=st.none() | st.integers(1, 8),
    as_array=st.booleans(),
)
def test_every_text_once_within_the_limits(lengths, budget, cap, as_array):
    batches = as_lists(pack(np.array(lengths, dtype=int) if as_array else lengths, budget, cap))
    order = [row for batch in batches for row in batch]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    sizes = [sum(lengths[row] for row in batch) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        assert batch and (size <= budget or len(batch) == 1)
        assert cap is None or len(batch) <= cap
    # No batch is closed early: the next text would not have fitted.
    for batch, size, following in zip(batches, sizes, batches[1:], strict=False):
        assert len(batch) == cap or size + lengths[following[0]] > budget

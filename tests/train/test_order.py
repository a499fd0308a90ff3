"""The order of training: every row once, ranks apart, and any step found without its history."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm2vec_fast.train.order import Order


def epoch_of(order: Order, epoch: int = 0) -> list[np.ndarray]:
    first = epoch * order.steps_per_epoch
    return [order.rows(step) for step in range(first, first + order.steps_per_epoch)]


def all_ranks(world: int, **options) -> list[Order]:
    return [Order(world=world, rank=rank, **options) for rank in range(world)]


@st.composite
def cases(draw):
    count = draw(st.integers(1, 120))
    batch, world = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    names = draw(st.none() | st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    seed = draw(st.integers(0, 2**63))
    groups = None if names is None else np.array(names)
    options = {"count": count, "batch": batch, "seed": seed, "groups": groups}
    most = count if groups is None else np.unique(groups, return_counts=True)[1].max()
    assume(most >= batch * world)
    return options, world


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 3))
def test_what_holds_for_every_order(case, epoch):
    options, world = case
    count, groups = options["count"], options["groups"]
    orders = all_ranks(world, **options)
    epochs = [epoch_of(order, epoch) for order in orders]
    taken = np.concatenate([np.concatenate(batches) for batches in epochs])
    assert len(taken) == len(set(taken.tolist()))
    assert taken.min() >= 0 and taken.max() < count

    whole = options["batch"] * world
    sizes = [count] if groups is None else np.unique(groups, return_counts=True)[1].tolist()
    assert len(taken) == count - sum(size % whole for size in sizes)
    for step in range(orders[0].steps_per_epoch):
        shares = [batches[step] for batches in epochs]
        assert {len(share) for share in shares} == {options["batch"]}
        if groups is not None:
            assert len(set(groups[np.concatenate(shares)])) == 1


@settings(max_examples=50, deadline=None)
@given(cases())
def test_ranks_together_are_one_rank_with_a_larger_batch(case):
    options, world = case
    orders = all_ranks(world, **options)
    alone = Order(**options | {"batch": options["batch"] * world})
    assert alone.steps_per_epoch == orders[0].steps_per_epoch
    for step in range(2 * alone.steps_per_epoch):
        together = np.concatenate([order.rows(step) for order in orders])
        assert together.tolist() == alone.rows(step).tolist()


@pytest.mark.parametrize("groups", [None, np.arange(100) % 3])
def test_a_step_does_not_depend_on_its_history(groups):
    order = Order(100, 7, seed=3, groups=groups)
    forwards = [order.rows(step).tolist() for step in range(40)]
    backwards = [order.rows(step).tolist() for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    for step in (0, 5, 17, 39):
        assert Order(100, 7, seed=3, groups=groups).rows(step).tolist() == forwards[step]


def test_what_is_returned_can_be_changed():
    order = Order(10, 5, seed=0)
    before = order.rows(0).tolist()
    order.rows(0)[:] = 0
    assert order.rows(0).tolist() == before


def test_epochs_and_seeds_differ():
    order = Order(64, 64, seed=0)
    seen = [order.rows(0), order.rows(1), order.rows(2), Order(64, 64, seed=1).rows(0)]
    assert len({tuple(rows) for rows in seen}) == 4
    assert all(sorted(rows) == list(range(64)) for rows in seen)


def test_the_order_stays_the_same_over_versions():
    """A checkpoint of today must go on tomorrow: these rows may never change."""
    assert Order(10, 4, seed=42).rows(0).tolist() == [4, 8, 1, 9]
    assert Order(10, 2, seed=42, groups=np.arange(10) % 2).rows(5).tolist() == [3, 9]


def test_rows_are_shuffled_evenly():
    """Each row comes first about equally often: 2,000 draws of 10 rows."""
    order = Order(10, 10, seed=5)
    firsts = np.bincount([order.rows(step)[0] for step in range(2000)], minlength=10)
    assert firsts.min() > 140 and firsts.max() < 260  # 200 expected, deviation 13


def test_batches_of_all_tasks_are_mixed():
    groups = np.repeat(["a", "b"], 500)
    order = Order(1000, 10, seed=0, groups=groups)
    tasks = [groups[rows[0]] for rows in epoch_of(order)]
    assert 20 < sum(x != y for x, y in pairwise(tasks)) < 80
    # another remainder of each task is left out in another epoch
    order = Order(1000, 30, seed=0, groups=groups)
    left = [set(range(1000)) - set(np.concatenate(epoch_of(order, e)).tolist()) for e in (0, 1)]
    assert len(left[0]) == len(left[1]) == 40 and left[0] != left[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 7, "batch": 4, "world": 2}, "7 rows, fewer than one global batch of 4 x 2"),
        ({"count": 7, "batch": 4, "world": 2}, "per_device_train_batch_size to at most 3"),
        ({"count": 0, "batch": 4}, "give more data"),
        ({"count": 3, "batch": 1, "world": 4}, "fewer than the 4 ranks"),
        (
            {"count": 5, "batch": 4, "groups": np.array(list("abaab"))},
            "largest, 'a', has 3 rows, fewer than one global batch",
        ),
        ({"count": 5, "batch": 4, "groups": np.array([1, 2])}, "one group for each of 5 rows"),
        ({"count": 5, "batch": 0}, "at least 1 row"),
        ({"count": 5, "batch": 1, "seed": -1}, "must not be negative"),
        ({"count": 5, "batch": 1, "rank": 1}, "rank 1 is not one of 1 ranks"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Order(**{"seed": 0} | options)


def test_a_step_below_zero_is_refused():
    with pytest.raises(ValueError, match="count from 0"):
        Order(5, 1, seed=0).rows(-1)

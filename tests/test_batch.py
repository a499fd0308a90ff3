"""PackedBatch: what it holds, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2vec_fast.batch import Download, PackedBatch


def test_values():
    batch = PackedBatch.build([[7, 8, 9], [5], [6, 4]], [(1, 3), (0, 1), (0, 2)])
    assert batch.ids.tolist() == [7, 8, 9, 5, 6, 4]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.spans.tolist() == [[1, 3], [3, 4], [4, 6]]
    assert (batch.max_seqlen, batch.lengths) == (3, (3, 1, 2))
    assert (batch.n_tokens, len(batch)) == (6, 3)


def test_without_spans_the_whole_text_counts():
    assert PackedBatch.build([[1, 2], [3]]).spans.tolist() == [[0, 2], [2, 3]]


def test_everything_is_int32_and_on_the_device():
    batch = PackedBatch.build([np.array([1, 2], dtype=np.int64), [3]], device=torch.device("cpu"))
    for tensor in (batch.ids, batch.positions, batch.cu_seqlens, batch.spans):
        assert tensor.dtype == torch.int32
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
    on_meta = PackedBatch.build([[1, 2], [3]], device="meta")
    assert on_meta.ids.device.type == on_meta.spans.device.type == "meta"
    assert on_meta.lengths == (2, 1)


def test_lists_and_arrays_give_the_same():
    rows, spans = [[1, 2, 3], [4]], [(0, 2), (0, 1)]
    one = PackedBatch.build(rows, spans)
    two = PackedBatch.build([np.array(row, dtype=np.int32) for row in rows], np.array(spans))
    for field in ("ids", "positions", "cu_seqlens", "spans"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    assert one.lengths == two.lengths


def test_it_does_not_share_memory_with_the_caller():
    row = np.array([1, 2, 3], dtype=np.int32)
    batch = PackedBatch.build([row])
    row[:] = 9
    assert batch.ids.tolist() == [1, 2, 3]


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PackedBatch.build([[1]]).max_seqlen = 5


@pytest.mark.parametrize(
    "rows, spans, message",
    [
        ([], None, "no texts"),
        ([], [], "no texts"),
        ([[1], []], None, r"text 1 has 0 tokens"),
        ([[1], [2, 3]], [(0, 1), (1, 1)], r"text 1 has 2 tokens and the span \[1, 1\)"),
        ([[1], [2, 3]], [(0, 1), (2, 1)], r"text 1 .*\[2, 1\)"),
        ([[1], [2, 3]], [(0, 2), (0, 1)], r"text 0 has 1 tokens and the span \[0, 2\)"),
        ([[1], [2, 3]], [(-1, 1), (0, 1)], r"text 0 .*\[-1, 1\)"),
        ([[1], [2, 3]], [(0, 1)], "2 texts but 1 spans"),
        ([[1]], [(0, 1), (0, 1)], "1 texts but 2 spans"),
    ],
)
def test_what_is_refused(rows, spans, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.build(rows, spans)


def test_fractions_are_not_cut_to_ids():
    with pytest.raises((TypeError, ValueError)):
        PackedBatch.build([[1.5, 2.5]])


@st.composite
def texts_with_spans(draw):
    rows = draw(
        st.lists(
            st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=9
        )
    )
    spans = []
    for row in rows:
        start = draw(st.integers(0, len(row) - 1))
        spans.append((start, draw(st.integers(start + 1, len(row)))))
    return rows, spans


@settings(max_examples=100, deadline=None)
@given(texts_with_spans())
def test_unpacking_gives_back_what_was_packed(case):
    rows, spans = case
    batch = PackedBatch.build(rows, spans)
    assert [part.tolist() for part in batch.ids.split(batch.lengths)] == rows
    for part in batch.positions.split(batch.lengths):
        assert part.tolist() == list(range(len(part)))
    assert batch.cu_seqlens.diff().tolist() == list(batch.lengths)
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.n_tokens
    assert batch.max_seqlen == max(map(len, rows))
    starts = batch.cu_seqlens[:-1, None]
    assert (batch.spans - starts).tolist() == [list(span) for span in spans]
    for (start, end), row, span in zip(batch.spans.tolist(), rows, spans, strict=True):
        assert batch.ids[start:end].tolist() == row[slice(*span)]
    flat = batch.spans.flatten()
    assert (flat.diff() >= 0).all()  # disjoint, ascending


@pytest.mark.parametrize("bad", [[-1], [2**31], [2**63 - 1], [1.5], [2**40, 3]])
def test_what_is_no_token_id_is_refused(bad):
    with pytest.raises(ValueError, match="token ids must be whole numbers"):
        PackedBatch.build([[1, 2], bad])


@pytest.mark.parametrize("lengths", [[1], [1, 2, 5], [7, 9], [16, 3, 1, 1]])
def test_every_part_is_aligned_whatever_the_lengths(lengths):
    batch = PackedBatch.build([range(n) for n in lengths])
    for part in (batch.ids, batch.positions, batch.cu_seqlens, batch.spans):
        assert part.data_ptr() % 16 == batch.ids.data_ptr() % 16


def test_a_download_puts_vectors_where_their_texts_are():
    download = Download(5, 2, torch.device("cpu"))
    assert download.result().tolist() == [[0, 0]] * 5
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    download.put(np.array([3, 0]), vectors)
    vectors.zero_()  # as the memory of a device is used again
    download.put(np.array([4]), torch.tensor([[5.0, 6.0]]))
    result = download.result()
    assert result.tolist() == [[3, 4], [0, 0], [0, 0], [1, 2], [5, 6]]
    assert result.dtype == np.float32
    result[0] = 9  # nobody else's
    assert download.result()[0].tolist() == [3, 4]
    assert Download(0, 2, torch.device("cpu")).result().shape == (0, 2)


@pytest.mark.gpu
def test_a_download_from_a_gpu_waits_for_nothing_but_its_result():
    device = torch.device("cuda")
    download, rows = Download(64, 1000, device), np.arange(64)[::-1].copy()
    source = torch.randn(64, 1000, device=device)
    torch.cuda._sleep(100_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in range(4):
            place = slice(16 * part, 16 * part + 16)
            download.put(rows[place], source[place] + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not download.copied.query()
    np.testing.assert_array_equal(download.result(), (source + 1).flip(0).cpu().numpy())

"""Search is exact, whatever the precision, and refuses a model that has changed."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search
from llm2vec_fast.corpus.plan import FORMAT, MANIFEST, ManifestError
from llm2vec_fast.corpus.read import Row
from llm2vec_fast.corpus.search import Best, hits_as_json
from llm2vec_fast.corpus.store import ShardError, read_shard, vectors_of, write_shard
from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.vectors import PRECISIONS, finish

TEXTS = [
    "list of numbers", "", "dict of keys and values", "an empty set", "bytes and integers",
    "sequence of objects", "returns a new list", "key error",
]  # fmt: skip
WIDTH = 36  # no multiple of eight: binary vectors have bits that mean nothing


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("search"), "llama"))


def make(directory, tmp_path, **options):
    source = tmp_path / "t.jsonl"
    records = [{"text": text, "n": str(n)} for n, text in enumerate(TEXTS)]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out"
    embed(source, directory, out, id_column="n", keep=["text"], rows_per_shard=3, **options)
    return out


def store(out, vectors, precision="float32", per_shard=40, layout="parquet", statuses=None):
    """A job's output without a model: row n has the id n and keeps the title `title n`."""
    out.mkdir()
    statuses = statuses or ["ok"] * len(vectors)
    manifest = {
        "format": FORMAT,
        "inputs": [{"path": "a.txt"}],
        "columns": {"text": "text", "id": None, "keep": ["title"]},
        "rows_per_shard": per_shard,
        "output_format": layout,
        "model": {"base": "no such model", "adapters": [], "dtype": "float32", "settings": {}},
        "vectors": {"precision": precision, "dimension": vectors.shape[1]},
    }
    write_json(manifest, out / MANIFEST)
    stored, scale = finish(vectors, None, False, precision)
    for number, at in enumerate(range(0, max(1, len(vectors)), per_shard)):
        part = slice(at, at + per_shard)
        count = len(stored[part])
        write_shard(
            out / f"part-00000-{number:06d}.parquet",
            [Row(str(at + n), keep=[f"title {at + n}"]) for n in range(count)], ("title",),
            stored[part], None if scale is None else scale[part], np.ones(count, np.int32),
            statuses[part], [""] * count, precision=precision, first_row=at, offsets=(0, 0),
            output_format=layout,
        )  # fmt: skip
    return out


def small_blocks(monkeypatch, rows):
    # The package's function `search` hides the module of that name.
    monkeypatch.setattr(sys.modules["llm2vec_fast.corpus.search"], "BLOCK", rows)


def brute_force(out, queries, precision, k, statuses=None):
    """(scores, row numbers) by fp64 over everything at once, from what is stored."""
    tables = [read_shard(path) for path in sorted(out.glob("part-*.parquet"))]
    docs = np.concatenate([vectors_of(t, precision, queries.shape[1]) for t in tables])
    docs, queries = docs.astype(np.float64), queries.astype(np.float64)
    there = np.abs(docs).max(axis=1) > 0
    if statuses is not None:
        there &= np.isin(statuses, ["ok", "truncated"])
    docs /= np.where(there, np.linalg.norm(docs, axis=1), 1)[:, None]
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    for query in queries:
        score = np.where(there, docs @ query, -np.inf)
        rows = np.arange(len(docs))
        if precision == "binary":
            distance = ((docs > 0) != (query > 0)).sum(axis=1)
            rows = np.lexsort((rows, np.where(there, distance, 10**6)))[: max(10 * k, 100)]
        order = rows[np.lexsort((rows, -score[rows].round(12)))]
        order = order[there[order]][:k]
        yield score[order], order.tolist()


@pytest.mark.parametrize("layout", ["parquet", "npy"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_equals_brute_force(tmp_path, monkeypatch, precision, layout, k):
    small_blocks(monkeypatch, 16)  # 300 rows: shards of 2.5 blocks, the last one cut
    random = np.random.default_rng(k)
    vectors = random.standard_normal((300, WIDTH)).astype(np.float32)
    vectors[::7] += 4  # crowded together: a score near the k-th many times over
    queries = random.standard_normal((5, WIDTH)).astype(np.float32) + 0.5
    statuses = random.choice(["ok", "truncated", "empty", "error"], 300).tolist()
    out = store(tmp_path / "out", vectors, precision, layout=layout, statuses=statuses)
    answers = search(out, queries, k=k)
    wanted = brute_force(out, queries, precision, k, statuses)
    for (scores, rows), hits in zip(wanted, answers, strict=True):
        assert [int(hit.id) for hit in hits] == rows
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=3e-6)
        assert all(hit.kept == {"title": f"title {hit.id}"} for hit in hits)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [1, 3, 10, 90])
def test_equal_documents_come_in_the_order_of_their_rows(tmp_path, monkeypatch, precision, k):
    """The same few vectors again and again, in blocks and shards of all lengths."""
    small_blocks(monkeypatch, 8)
    random = np.random.default_rng(3)
    kinds = random.standard_normal((4, WIDTH)).astype(np.float32)
    which = random.integers(0, 4, 101)
    out = store(tmp_path / "out", kinds[which], precision, per_shard=23)
    queries = random.standard_normal((3, WIDTH)).astype(np.float32)
    wanted = brute_force(out, queries, precision, k)
    for (_, rows), hits in zip(wanted, search(out, queries, k=k), strict=True):
        assert [int(hit.id) for hit in hits] == rows


@settings(max_examples=200, deadline=None)
@given(data=st.data(), queries=st.integers(1, 3), size=st.integers(1, 6))
def test_best_is_a_sort(data, queries, size):
    """Against sorting everything: few different scores, so that most are ties."""
    count = data.draw(st.integers(0, 40))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0])
    drawn = data.draw(st.lists(values, min_size=queries * count, max_size=queries * count))
    scores = np.array(drawn, np.float32).reshape(queries, count)
    best, at = Best(queries, size), 0
    while at < count:
        width = data.draw(st.integers(1, count - at))
        best.add(torch.from_numpy(scores[:, at : at + width]), first_key=at)
        at += width
    for q in range(queries):
        order = np.argsort(-scores[q], kind="stable")
        order = order[scores[q, order] > -np.inf][:size]
        assert best.key[best.query == q].tolist() == order.tolist()
        assert best.score[best.query == q].tolist() == scores[q, order].tolist()


def test_nothing_to_find(tmp_path):
    out = store(tmp_path / "out", np.zeros((0, WIDTH), np.float32))
    assert search(out, np.ones((2, WIDTH))) == [[], []]
    assert search(out, np.ones((0, WIDTH))) == []
    for path in out.glob("part-*"):
        path.unlink()
    assert search(out, np.ones(WIDTH)) == [[]]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_empty_documents(tmp_path, precision):
    vectors = np.zeros((5, WIDTH), np.float32)
    out = store(tmp_path / "out", vectors, precision, statuses=["empty"] * 4 + ["error"])
    assert search(out, -np.ones((1, WIDTH))) == [[]]  # all signs minus: what zero is in binary


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_vector_without_direction_takes_nobody_s_place(tmp_path, precision):
    vectors = np.eye(WIDTH, dtype=np.float32)
    vectors[[0, 7]] = 0  # stored as ok: what fp16 rounds to zero, for one
    out = store(tmp_path / "out", vectors, precision)
    query = np.arange(WIDTH, dtype=np.float32)[None]
    for k in (1, 2, 50):
        wanted = [str(n) for n in reversed(range(WIDTH)) if n not in (0, 7)][:k]
        assert [hit.id for hit in search(out, query, k=k)[0]] == wanted


def test_given_vectors_are_checked(tmp_path):
    out = store(tmp_path / "out", np.eye(WIDTH, dtype=np.float32))
    assert search(out, torch.eye(WIDTH)[3], k=1)[0][0].id == "3"
    with pytest.raises(ValueError, match=f"expected .Q, {WIDTH}.*truncate_dim={WIDTH}"):
        search(out, np.ones((1, WIDTH + 1)))
    with pytest.raises(ValueError, match="NaN"):
        search(out, np.full((1, WIDTH), np.nan))
    with pytest.raises(ValueError, match="instruction"):
        search(out, np.ones((1, WIDTH)), instruction="find")


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_no_answer_comes_from_a_damaged_shard(tmp_path, layout):
    vectors = np.random.default_rng(0).standard_normal((80, WIDTH)).astype(np.float32)
    out = store(tmp_path / "out", vectors, layout=layout)
    path = out / ("part-00000-000001." + layout)
    data = bytearray(path.read_bytes())
    data[3000] ^= 1  # within the vectors, in both layouts
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"part-00000-000001\.parquet.*--verify"):
        search(out, vectors[:1])


def test_json_of_hits(tmp_path):
    out = store(tmp_path / "out", np.eye(WIDTH, dtype=np.float32))
    hits = search(out, np.eye(WIDTH)[:1], k=2)[0]
    told = json.loads(hits_as_json("whät?", hits))
    assert told["query"] == "whät?"
    assert told["hits"][0] == {"score": 1.0, "id": "0", "kept": {"title": "title 0"}}
    assert [hit["id"] for hit in told["hits"]] == ["0", "1"]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_texts_as_encode_finds_them(directory, tmp_path, precision, k):
    out = make(directory, tmp_path, precision=precision)
    model = LLM2Vec.from_pretrained(directory)
    queries = ["a list", "the keys of a dict"]
    answers = search(out, queries, k=k)
    docs, asked = (model.encode(t, normalize=True, convert_to_numpy=True) for t in (TEXTS, queries))
    for scores, hits in zip(asked @ docs.T, answers, strict=True):
        scores[1] = -np.inf  # the empty text has no direction: it is never an answer
        order = np.argsort(-scores)[: min(k, len(TEXTS) - 1)]
        tolerance = 1e-5 if precision == "float32" else 2e-2
        np.testing.assert_allclose([h.score for h in hits], scores[order], atol=tolerance)
        if precision == "float32":
            assert [hit.id for hit in hits] == [str(n) for n in order]
        assert all(hit.kept["text"] == TEXTS[int(hit.id)] for hit in hits)


def test_binary_finds_the_document_itself(directory, tmp_path):
    out = make(directory, tmp_path, precision="binary")
    assert search(out, "dict of keys and values", k=1)[0][0].id == "2"


def test_the_instruction_is_the_query_s_own(directory, tmp_path):
    out = make(directory, tmp_path, precision="float32")
    model = LLM2Vec.from_pretrained(directory)
    plain = search(out, "a list", k=1, model=model)[0][0].score
    asked = search(out, "a list", k=1, model=model, instruction="find the type")[0][0].score
    assert plain != asked


def test_refusals(directory, tmp_path, tiny_model, add_tokenizer):
    out = make(directory, tmp_path)
    other = LLM2Vec.from_pretrained(add_tokenizer(tiny_model(tmp_path, "llama", seed=5)))
    with pytest.raises(ManifestError, match="fingerprint"):
        search(out, "a", model=other)
    causal = LLM2Vec.from_pretrained(directory, enable_bidirectional=False)
    with pytest.raises(ManifestError, match="settings"):
        search(out, "a", model=causal)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        search(tmp_path, "a")
    with pytest.raises(ValueError, match="k must"):
        search(out, "a", k=0)

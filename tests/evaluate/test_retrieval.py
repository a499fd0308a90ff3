"""Retrieval: figures by hand, ties, empty texts, and every fault of a collection."""

from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pytest
import torch

from llm2vec_fast.evaluate import Collection, read_collection, retrieval


class Stub:
    """An encoder whose vectors are given; only queries may carry the instruction."""

    device = torch.device("cpu")

    def __init__(self, vectors: dict[str, list[float]]):
        self.vectors = vectors

    def encode(self, texts, instruction=None, normalize=False):
        rows = np.array([self.vectors[(instruction or "") + t] for t in texts], dtype=np.float32)
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        return torch.from_numpy(rows / np.where(norm > 0, norm, 1))


def at(degrees: float) -> list[float]:
    return [3 * math.cos(math.radians(degrees)), 3 * math.sin(math.radians(degrees))]


def collection(angles, relevant, queries=("q",), left_out=0) -> tuple[Stub, Collection]:
    documents = {f"d{i}": f"d{i}" for i in range(len(angles))}
    vectors = {f"d{i}": at(a) if a is not None else [0, 0] for i, a in enumerate(angles)}
    vectors |= {query: at(0) for query in queries}
    return Stub(vectors), Collection(documents, {q: q for q in queries}, relevant, left_out)


def test_ndcg_and_recall_by_hand():
    # Best first: d0 (irrelevant), d1 (grade 1), d2 (irrelevant), d3 (grade 2), then the rest.
    stub, coll = collection(range(0, 120, 10), {"q": {"d1": 1, "d3": 2, "d11": 1}}, left_out=4)
    found = retrieval(stub, coll, recall_at=(2, 11, 100))
    gain = 1 / math.log2(3) + 2 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg@10"] == pytest.approx(100 * gain / ideal)
    assert found["recall@2"] == pytest.approx(100 / 3)
    assert found["recall@11"] == pytest.approx(200 / 3)
    assert found["recall@100"] == pytest.approx(100)
    assert (found["queries"], found["documents"], found["left_out"]) == (1, 12, 4)


def test_the_mean_is_over_queries():
    relevant = {"q": {"d0": 1}, "r": {"d1": 1}}
    stub, coll = collection([0, 90], relevant, queries=("q", "r"))
    assert retrieval(stub, coll, recall_at=(1,))["recall@1"] == 50
    stub.vectors["r"] = at(90)
    assert retrieval(stub, coll, recall_at=(1,))["recall@1"] == 100
    assert retrieval(stub, coll, recall_at=(1,))["ndcg@10"] == pytest.approx(100)


def test_equal_cosines_stand_in_the_order_of_the_corpus():
    for answer, wanted in (("d0", 100.0), ("d1", 100 / math.log2(3)), ("d2", 100 / math.log2(4))):
        stub, coll = collection([20, 20, 20, 90], {"q": {answer: 1}})
        assert retrieval(stub, coll)["ndcg@10"] == pytest.approx(wanted)


def test_blocks_do_not_change_the_figures(monkeypatch):
    relevant = {"q": {"d0": 1, "d3": 3, "d40": 1}}
    stub, coll = collection([(i * 37) % 101 for i in range(50)], relevant)
    whole = retrieval(stub, coll, recall_at=(5, 30))
    # The package gives the name to the function.
    monkeypatch.setattr(importlib.import_module("llm2vec_fast.evaluate.retrieval"), "BLOCK", 7)
    assert retrieval(stub, coll, recall_at=(5, 30)) == whole
    assert 0 < whole["ndcg@10"] < 100


def test_a_document_without_text_is_never_found_and_a_query_without_answers_counts_as_zero():
    # The empty one would have cosine 0 and stand before d0, which points away.
    stub, coll = collection([170, None], {"q": {"d0": 1}})
    assert retrieval(stub, coll, recall_at=(1,))["recall@1"] == 100
    stub, coll = collection([None, None], {"q": {"d0": 1}})
    assert retrieval(stub, coll)["ndcg@10"] == 0
    stub, coll = collection([10, None], {"q": {"d0": 1}, "q2": {"d1": 1}}, queries=("q", "q2"))
    assert retrieval(stub, coll)["ndcg@10"] == pytest.approx(50)


def test_a_document_with_the_queries_own_id_is_no_answer():
    stub = Stub({"same": at(0), "other": at(30), "far": at(60)})
    documents = {name: name for name in ("same", "other", "far")}
    coll = Collection(documents, {"same": "same"}, {"same": {"other": 1}})
    found = retrieval(stub, coll, recall_at=(1,))
    assert (found["recall@1"], found["ndcg@10"]) == (100, pytest.approx(100))


def test_the_instruction_stands_before_queries_alone():
    stub, coll = collection([0, 90], {"q": {"d1": 1}})
    stub.vectors["Find: q"] = at(90)
    assert retrieval(stub, coll, "Find: ", recall_at=(1,))["recall@1"] == 100
    assert retrieval(stub, coll, recall_at=(1,))["recall@1"] == 0


def test_ranks_are_checked():
    stub, coll = collection([0], {"q": {"d0": 1}})
    for ranks in ((), (0,), (10, -1)):
        with pytest.raises(ValueError, match="ranks from 1 on"):
            retrieval(stub, coll, recall_at=ranks)


CORPUS = [
    {"_id": "d1", "title": "Title", "text": "one text"},
    {"_id": "d2", "title": "", "text": "two"},
    {"_id": "d3", "text": "three"},
]
QUERIES = [
    {"_id": "q1", "text": "first"},
    {"_id": "q2", "text": "second"},
    {"_id": "7", "text": "x"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td3\t2\nq2\td2\t0\n"


def write(directory, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (directory / "qrels").mkdir(exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (directory / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    return directory


def test_a_collection_is_read(tmp_path):
    assert read_collection(write(tmp_path)) == Collection(
        documents={"d1": "Title one text", "d2": "two", "d3": "three"},
        queries={"q1": "first"},  # q2 has no relevant document, 7 no judgement
        relevant={"q1": {"d1": 1, "d3": 2}},
        left_out=2,
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qrels": QRELS + "q9\td1\t1\n"}, r"test.tsv, line 5: there is no query with the id 'q9'"),
        ({"qrels": QRELS + "q2\td9\t1\n"}, r"line 5: there is no document with the id 'd9'"),
        ({"qrels": QRELS + "q1\td1\t1\n"}, r"line 5: 'q1' and 'd1' stand twice"),
        ({"qrels": QRELS + "q1 d1 1\n"}, r"line 5 is not a query's id"),
        ({"qrels": QRELS + "q1\td2\thigh\n"}, r"line 5 is not a query's id"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq2\td2\t0\n"}, r"no query has a relevant document"),
        ({"qrels": ""}, r"no query has a relevant document"),
        ({"corpus": ""}, r"corpus.jsonl is empty"),
        ({"queries": "\n\n"}, r"queries.jsonl is empty"),
        ({"corpus": '{"_id": "d1", "text": "a"}\n{"_id": 2}\n'}, r"corpus.jsonl, line 2 is not an"),
        ({"corpus": "[]\n"}, r"line 1 is not an object"),
        ({"corpus": '{"_id": "d1", "text": null}\n'}, r"line 1 is not an object"),
        ({"queries": "{\n"}, r"queries.jsonl, line 1 is not JSON"),
        ({"corpus": [*CORPUS, CORPUS[0]]}, r"corpus.jsonl, line 4: the id 'd1' stands twice"),
    ],
)
def test_what_is_wrong_with_a_collection_is_named(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        read_collection(write(tmp_path, **change))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl"):
        read_collection(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv"):
        read_collection(write(tmp_path), split="dev")


def test_a_real_encoder_finds_what_is_asked_for(tiny_encoder, tmp_path):
    texts = ["a list of numbers", "the keys of a dict", "raise an error", "bytes of a file", ""]
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(texts[:4])]
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(4))
    found = retrieval(tiny_encoder(), read_collection(write(tmp_path, corpus, queries, qrels)))
    assert found["ndcg@10"] == pytest.approx(100) and found["recall@10"] == 100

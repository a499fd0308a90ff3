"""Supervised examples: every layout and format, the E5 data's instructions, and clear refusals."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast.train.order import Order
from llm2vec_fast.train.pairs import E5_INSTRUCTIONS, Example, read_pairs

ROWS = [
    {"query": "q, 0", "positive": "p0", "negative": 'n "0"'},
    {"query": "q1\nline", "positive": "naïve 数据", "negative": "n1"},
]
EXAMPLES = [
    Example("q, 0", "p0", ('n "0"',), task="nq"),
    Example("q1\nline", "naïve 数据", ("n1",), task="nq"),
]


def write(path, rows):
    name = path.name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".jsonl"):
        path.write_text(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if "tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["nq.jsonl", "nq.jsonl.gz", "nq.csv", "nq.tsv", "nq.parquet"])
def test_all_formats(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert read_pairs(path) == EXAMPLES
    assert read_pairs([path], limit=1) == EXAMPLES[:1]
    assert read_pairs(str(path), limit=9) == EXAMPLES


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"query": "q", "positive": "p"}, Example("q", "p")),
        ({"anchor": "q", "positive": "p", "negative": "n"}, Example("q", "p", ("n",))),
        ({"sent0": "q", "sent1": "p", "hard_neg": "n"}, Example("q", "p", ("n",))),
        ({"query": "q", "pos": ["p"], "neg": ["m", "n"]}, Example("q", "p", ("m", "n"))),
        ({"query": "q", "pos": "p", "negatives": []}, Example("q", "p")),
        ({"query": "q", "pos": "p", "negatives": None}, Example("q", "p")),
        ({"query": "q", "pos": "p", "negative": ""}, Example("q", "p")),
        (
            {"query": "[1, 2]", "pos": '["p"]', "negative": "[]"},
            Example("[1, 2]", '["p"]', ("[]",)),
        ),
        ({"query": "q", "pos": "p", "task": "t"}, Example("q", "p", task="t")),
        ({"query": "q", "pos": "p", "task": None}, Example("q", "p")),
        ({"query": "q", "pos": "p", "instruction": "I"}, Example("q", "p", query_instruction="I")),
        ({"query": "q", "pos": "p", "prompt": "I"}, Example("q", "p", query_instruction="I")),
        (
            {"query": "q", "pos": "p", "query_instruction": "I", "doc_instruction": "D"},
            Example("q", "p", query_instruction="I", doc_instruction="D"),
        ),
        ({"id": 3, "query": "q", "query_id": 1, "pos": "p", "score": 1.5}, Example("q", "p")),
        ({"query": "nul\0", "pos": "\ud800 é"}, Example("nul\0", "\ufffd é")),
    ],
)
def test_layouts_of_a_row(tmp_path, row, example):
    (found,) = read_pairs(write(tmp_path / "f.jsonl", [row]))
    assert found == Example(**{**_fields(example), "task": example.task or "f"})


def _fields(example):
    return {name: getattr(example, name) for name in Example.__slots__}


def test_several_positives_are_several_examples(tmp_path):
    rows = [{"query": "q", "pos": ["a", "b"], "neg": ["n"]}]
    path = write(tmp_path / "f.jsonl", rows)
    assert read_pairs(path) == [Example("q", "a", ("n",), "f"), Example("q", "b", ("n",), "f")]
    assert len(read_pairs(path, limit=1)) == 1
    assert read_pairs(write(tmp_path / "f.parquet", rows)) == read_pairs(path)


def test_the_e5_layout(tmp_path):
    """Queries get the official instruction and its ";", rows in turn where a task has two."""
    for task in ("nq", "allnli"):
        write(tmp_path / f"{task}.jsonl", [ROWS[0]] * 3)
    nli = "Given a premise, retrieve a hypothesis that is entailed by the premise;"
    sts = "Retrieve semantically similar text;"
    nq = "Given a question, retrieve Wikipedia passages that answer the question;"
    examples = read_pairs(tmp_path)
    assert [e.query_instruction for e in examples] == [nli, sts, nli, nq, nq, nq]
    assert [e.task for e in examples] == ["allnli"] * 3 + ["nq"] * 3
    assert {e.doc_instruction for e in examples} == {""}
    assert read_pairs((tmp_path,)) == read_pairs(f"{tmp_path}/*.jsonl") == examples
    # a file that only happens to have such a name, and rows with their own instruction
    for name in (tmp_path / "nq.jsonl", f"{tmp_path}/./nq.jsonl"):
        assert {e.query_instruction for e in read_pairs([name])} == {""}
    write(tmp_path / "nq.jsonl", [ROWS[0] | {"instruction": "mine"}])
    assert read_pairs(tmp_path)[-1].query_instruction == "mine"


def test_the_e5_table():
    assert len(E5_INSTRUCTIONS) == 14
    assert E5_INSTRUCTIONS["squad"] == E5_INSTRUCTIONS["trivia_qa"]
    assert E5_INSTRUCTIONS["squad"] == ("Retrieve Wikipedia passages that answer the question",)
    assert {len(told) for told in E5_INSTRUCTIONS.values()} == {1, 2}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("train-00001-of-00004.parquet", "train"),
        ("part-003.jsonl", "part"),
        ("allnli_split2.jsonl", "allnli"),
        ("t2ranking.jsonl.gz", "t2ranking"),
        ("squad2.csv", "squad2"),
    ],
)
def test_parts_of_a_task_are_one_task(tmp_path, name, task):
    assert {e.task for e in read_pairs(write(tmp_path / name, ROWS))} == {task}


def test_negatives_may_differ_between_tasks_only(tmp_path):
    two = {"query": "q", "positive": "p", "negative": ["m", "n"]}
    one = {"query": "q", "positive": "p", "negative": ["m", ""]}
    write(tmp_path / "a.jsonl", [two, two])
    write(tmp_path / "b.jsonl", [one])
    assert [len(e.negatives) for e in read_pairs(tmp_path)] == [2, 2, 1]
    path = write(tmp_path / "b.jsonl", [two, one])
    with pytest.raises(
        ValueError, match=r"b\.jsonl, row 1: 1 negatives, but .*b\.jsonl, row 0"
    ) as e:
        read_pairs(tmp_path)
    assert "'b' has 2. Set negatives_per_query" in str(e.value)
    assert {e.negatives for e in read_pairs(path, negatives_per_query=1)} == {("m",)}
    assert {e.negatives for e in read_pairs(path, negatives_per_query=0)} == {()}
    with pytest.raises(ValueError, match="row 1: 1 negatives, fewer than negatives_per_query = 2"):
        read_pairs(path, negatives_per_query=2)
    with pytest.raises(ValueError, match="must not be negative"):
        read_pairs(path, negatives_per_query=-1)


def test_unequal_negatives_are_found_across_files_of_a_task(tmp_path):
    write(tmp_path / "a-0.jsonl", ROWS)
    write(tmp_path / "a-1.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(
        ValueError, match=r"a-1\.jsonl, row 0: 0 negatives, but .*a-0\.jsonl, row 0"
    ):
        read_pairs(tmp_path)


GOOD = '{"query": "q", "positive": "p"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no examples to train on in .*a.jsonl"),
        ("a.jsonl", "\n\n", "no examples"),
        (
            "a.jsonl",
            GOOD + '\n{"query": " ", "positive": "p"}',
            "a.jsonl, row 1: the query is empty",
        ),
        ("a.jsonl", '{"query": "q", "positive": ""}', "row 0: a positive is empty"),
        ("a.jsonl", '{"query": "q", "positive": []}', "row 0: a positive is empty"),
        ("a.jsonl", '{"query": "q", "positive": ["p", " "]}', "row 0: a positive is empty"),
        ("a.jsonl", '{"query": "q", "positive": null}', "row 0: a positive is empty"),
        ("a.jsonl", '{"query": null, "positive": "p"}', "row 0: the query is None, not text"),
        ("a.jsonl", '{"query": 5, "positive": "p"}', "row 0: the query is 5, not text"),
        ("a.jsonl", '{"query": "q", "positive": "p", "neg": [1]}', "the negative is 1, not text"),
        ("a.jsonl", '{"query": "q", "positiv": "p"}', "'positiv'. Did you mean 'positive'"),
        ("a.jsonl", '{"query": "q", "pos": "p", "negativ": "n"}', "Did you mean 'negative'"),
        ("a.jsonl", '{"query": "q", "answer": "p"}', "no column 'positive' or 'pos' or .*'answer'"),
        ("a.jsonl", '{"question": "q", "pos": "p"}', "no column 'query'"),
        ("a.jsonl", '{"query": "q", "pos": "p", "positive": "p"}', "both 'pos' and 'positive'"),
        ("a.jsonl", GOOD + "{", "a.jsonl, row 1: not valid JSON"),
        ("a.jsonl", "[1]", "row 0: not a JSON object but"),
        ("a.jsonl", b"\xff\n", "a.jsonl cannot be read"),
        ("a.csv", "", "no examples"),
        ("a.csv", "query,positive\nq\n", "a.csv, row 0: not the 2 fields"),
        ("a.csv", "query,positive\nq,p,x\n", "a.csv, row 0: not the 2 fields"),
        ("a.csv", 'query,positive\nq,"p\n', "a.csv cannot be read: unexpected end"),
        ("a.csv", "query,text\nq,p\n", "no column 'positive'"),
        ("a.parquet", "x", "a.parquet cannot be read"),
        ("a.txt", "x", "no queries and positives"),
        ("a.json", "x", "are read"),
        ("a.jsonl.gz", "x", "a.jsonl.gz cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_bad_columns_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": ["q"], "y": ["p"]}), path)
    with pytest.raises(ValueError, match=r"no column 'query'.*'x', 'y'"):
        read_pairs(path)
    pq.write_table(pa.table({"query": ["q"], "positives": ["p"]}), path)
    with pytest.raises(ValueError, match="Did you mean 'positive'"):
        read_pairs(path)
    pq.write_table(pa.table({"query": ["q"], "positive": ["p"], "vector": [[0.5]]}), path)
    assert read_pairs(path) == [Example("q", "p", (), "a")]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_pairs(write(tmp_path / "a.jsonl", ROWS), limit=0)
    with pytest.raises(ValueError, match="is not there"):
        read_pairs(tmp_path / "absent.jsonl")


def test_a_long_csv_field(tmp_path):
    csv.field_size_limit(131_072)  # Python's own, unless somebody has raised it
    long = "x" * 200_000
    assert (
        read_pairs(write(tmp_path / "a.csv", [{"query": long, "positive": "p"}]))[0].query == long
    )


def test_tasks_make_the_batches(tmp_path):
    for task, count in (("nq", 7), ("fever", 5)):
        write(tmp_path / f"{task}.jsonl", [ROWS[0]] * count)
    examples = read_pairs(tmp_path)
    tasks = np.array([example.task for example in examples])
    order = Order(len(examples), 3, seed=0, groups=tasks)
    batches = [order.rows(step) for step in range(order.steps_per_epoch)]
    assert sorted(tasks[rows[0]] for rows in batches) == ["fever", "nq", "nq"]
    assert all(len(set(tasks[rows])) == 1 for rows in batches)

"""Sentence similarity: figures known beforehand, every format, every fault of a file."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast.evaluate import Pairs, read_pairs, sts, sts_spearman
from llm2vec_fast.evaluate.sts import correlations


class Stub:
    """An encoder whose vectors are given."""

    def __init__(self, vectors: dict[str, list[float]]):
        self.vectors = vectors

    def encode(self, texts, instruction=None, convert_to_numpy=False):
        return np.array([self.vectors[(instruction or "") + t] for t in texts], dtype=np.float32)


def at(degrees: float, length: float = 1.0) -> list[float]:
    angle = np.deg2rad(degrees)
    return [length * np.cos(angle), length * np.sin(angle)]


def pairs_of(first, second, score) -> Pairs:
    return Pairs(list(first), list(second), np.array(score, dtype=np.float64))


def test_perfect_and_reversed_rank():
    model = Stub({"o": at(0), "a": at(10, 5.0), "b": at(40, 0.1), "c": at(80)})
    figures = sts(model, pairs_of("ooo", "abc", [5, 3, 0]))
    assert figures["spearman"] == pytest.approx(100)
    assert figures["pairs"] == 3 and 90 < figures["pearson"] < 100  # not linear in the cosine
    assert sts(model, pairs_of("ooo", "abc", [0, 3, 5]))["spearman"] == pytest.approx(-100)


def test_the_cosine_ignores_lengths_and_a_zero_vector_gives_zero():
    model = Stub({"o": at(0), "a": at(60, 1000.0), "z": [0.0, 0.0], "b": at(120)})
    assert sts(model, pairs_of("ooo", "azb", [3, 2, 1]))["spearman"] == pytest.approx(100)


def test_ties_share_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Pearson of the ranks by hand.
    figures = correlations(np.array([0.1, 0.5, 0.5, 0.9]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert figures["spearman"] == pytest.approx(100 * 4.5 / np.sqrt(4.5 * 5.0))


def test_standardize_takes_out_a_dimension_that_drowns_the_others():
    noise = np.random.default_rng(0)
    meaning = noise.normal(size=(80, 6))
    loud = 50 + 25 * noise.normal(size=(80, 1))
    vectors = np.hstack([meaning, loud, np.full((80, 1), 7.0)])  # a constant one does no harm
    model = Stub({str(i): row for i, row in enumerate(vectors)})
    unit = meaning / np.linalg.norm(meaning, axis=1, keepdims=True)
    names = [str(i) for i in range(80)]
    pairs = pairs_of(names[:40], names[40:], (unit[:40] * unit[40:]).sum(axis=1))
    x = vectors[:, :7].astype(np.float32).astype(np.float64)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    wanted = correlations((x[:40] * x[40:]).sum(axis=1), pairs.score)["spearman"]
    told = sts(model, pairs, standardize=True)["spearman"]
    assert told == pytest.approx(wanted) and told > 80
    assert sts(model, pairs)["spearman"] < 50


def test_the_instruction_stands_before_both_sentences():
    model = Stub({"Say: o": at(0), "Say: a": at(10), "Say: b": at(50)})
    figures = sts(model, pairs_of("oo", "ab", [1, 0]), instruction="Say: ")
    assert figures["spearman"] == pytest.approx(100)


def test_equal_cosines_are_an_error():
    model = Stub({"a": at(0), "b": at(30)})
    with pytest.raises(ValueError, match="all 2 cosines are"):
        sts(model, pairs_of("aa", "bb", [1, 0]))


ROWS = [("one, two", 'a "word"', 1.5), ("drei", "vier", 2.0), ("五", "六", 0.25)]


def csv_text(header: bool, comma: str = ",") -> str:
    lines = ['"one, two","a ""word""",1.5', "drei,vier,2", "五,六,0.25"]
    if comma == "\t":
        lines = ['one, two\ta "word"\t1.5', "drei\tvier\t2", "五\t六\t0.25"]
    head = [comma.join(("sentence1", "sentence2", "score"))] * header
    return "\ufeff" + "\n".join([*head, *lines]) + "\n"


def write(path, rows=ROWS, names=("sentence1", "sentence2", "score")):
    records = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def files(tmp_path):
    for name, text in (
        ("a.csv", csv_text(True)),
        ("bare.csv", csv_text(False)),
        ("a.tsv", csv_text(True, "\t")),
        ("bare.tsv", csv_text(False, "\t")),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        yield tmp_path / name
    yield write(tmp_path / "a.jsonl")
    yield write(tmp_path / "a.parquet")


def test_every_format_gives_the_same_pairs(tmp_path):
    for path in files(tmp_path):
        pairs = read_pairs(path)
        assert list(zip(pairs.first, pairs.second, pairs.score, strict=True)) == ROWS, path.name
        assert read_pairs(path, limit=2).first == ["one, two", "drei"], path.name


def test_columns_by_name_in_any_order(tmp_path):
    rows = [(1.0, "b", "a", "x"), (2.0, "d", "c", "y")]
    path = write(tmp_path / "a.jsonl", rows, ("gold", "right", "left", "more"))
    pairs = read_pairs(path, ("left", "right", "gold"))
    assert (pairs.first, pairs.second, pairs.score.tolist()) == (["a", "c"], ["b", "d"], [1, 2])
    table = tmp_path / "a.csv"
    table.write_text("more,gold,right,left\nx,1,b,a\ny,2,d,c\n")
    assert read_pairs(table, ("left", "right", "gold")).second == ["b", "d"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "sentence1,sentence2,rating\na,b,1\n", "no column 'score'; there are .*'rating'"),
        ("a.csv", "a,b,c,d\na,b,c,1\n", "no column 'sentence1', 'sentence2', 'score'"),
        ("a.csv", "a,b,1\nc,d,high\n", "row 2: score is not a number but 'high'"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\nc,d,\n", "row 2: score is not a number"),
        ("a.csv", "a,b,1\nc,d,nan\n", "row 2: score is not a number but 'nan'"),
        ("a.csv", "a,b,1\nc\n", "row 2: 1 fields, 3 are needed"),
        ("a.csv", "a,b,1\n", "has 1 pairs"),
        ("a.csv", "", "has 0 pairs"),
        ("a.csv", "a,b,1\nc,d,1.0\n", "all 2 scores are 1.0"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', "row 1: no column 'score'"),
        ("a.jsonl", '{"sentence1": 3, "sentence2": "b", "score": 1}\n', "sentence1 is not a text"),
        (
            "a.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": true}\n',
            "not a number but True",
        ),
        ("a.jsonl", "[]\n", "row 1 is not a JSON object"),
        ("a.jsonl", "{\n", "row 1 is not JSON"),
        ("a.xlsx", "", "read are .csv"),
        ("a.parquet", "no parquet", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_pairs(tmp_path / name)


def test_other_bytes_and_limits(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"caf\xe9,b,1\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_pairs(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="limit must be at least 2"):
        read_pairs(tmp_path / "a.csv", limit=1)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.csv")


def test_a_real_encoder_finds_equal_sentences(tiny_encoder, tmp_path):
    texts = ["a list of numbers", "the keys of a dict", "raise an error", "bytes of a file"]
    rows = [(t, t, 5.0) for t in texts] + [(a, b, 0.0) for a, b in itertools.pairwise(texts)]
    path = write(tmp_path / "a.jsonl", rows)
    told = sts_spearman(tiny_encoder(), path)
    assert told == pytest.approx(100 * np.sqrt(3 / 4), abs=15)  # two groups, their inside by chance
    assert sts_spearman(tiny_encoder(), path, limit=5, standardize=True) > 60
    assert sts_spearman(tiny_encoder(), path) == told


def test_the_real_file(shared_data):
    pairs = read_pairs(shared_data("stsb/stsb-en-dev.csv"))
    assert len(pairs.first) == 1500 and (pairs.score.min(), pairs.score.max()) == (0, 5)
    assert pairs.first[0] == "A man with a hard hat is dancing."

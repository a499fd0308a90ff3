"""Semantic textual similarity: how well cosines rank pairs of sentences as people do."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.corpus.formats import open_stream
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.evaluate.extras import scorer

COLUMNS = ("sentence1", "sentence2", "score")
FORMATS = "read are .csv, .tsv, .jsonl (each also .gz or .zst) and .parquet"


@dataclass(frozen=True)
class Pairs:
    """N pairs of sentences and what people said of them, (N,) float64."""

    first: list[str]
    second: list[str]
    score: np.ndarray


def sts(
    model: LLM2Vec, pairs: Pairs, standardize: bool = False, instruction: str | None = None
) -> dict:
    """Rank (Spearman) and linear (Pearson) correlation of cosine and score, times 100.

    standardize: first bring every dimension to mean 0 and standard deviation 1 over all vectors
                 of the file. Plain statistics, no training: what a trained model has to beat.
    instruction: put before every sentence
    returns:     {"spearman", "pearson", "pairs"}. The cosine with a zero vector is 0.
    raises:      ValueError if all cosines are equal
    """
    vectors = model.encode(
        [*pairs.first, *pairs.second], instruction=instruction, convert_to_numpy=True
    ).astype(np.float64)
    if standardize:
        spread = vectors.std(axis=0)
        vectors = (vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = np.split(vectors / np.where(length > 0, length, 1), 2)
    return correlations((first * second).sum(axis=1), pairs.score)


def correlations(cosine: np.ndarray, score: np.ndarray) -> dict:
    """{"spearman", "pearson", "pairs"} of two (N,) arrays; tied values share their mean rank."""
    stats = scorer("scipy.stats", "scipy")
    if np.ptp(cosine) == 0:
        raise ValueError(f"all {len(cosine)} cosines are {cosine[0]}: nothing can be ranked")
    return {
        "spearman": 100 * float(stats.spearmanr(cosine, score).statistic),
        "pearson": 100 * float(stats.pearsonr(cosine, score).statistic),
        "pairs": len(score),
    }


def sts_spearman(
    model: LLM2Vec, path: str | Path, limit: int | None = None, standardize: bool = False
) -> float:
    """Spearman's correlation times 100 over the (first `limit`) pairs of a file."""
    return sts(model, read_pairs(path, limit=limit), standardize)["spearman"]


def read_pairs(
    path: str | Path, columns: Sequence[str] = COLUMNS, limit: int | None = None
) -> Pairs:
    """Pairs from a csv, tsv, jsonl or parquet file.

    columns: names of the first sentence, the second, and the score. A csv or tsv whose first row
             has three fields, the third a number, has no header and is read in this order.
    limit:   only the first so many pairs
    raises:  ValueError naming the column that is missing, or the row (from 1, without the header)
             that has no such sentence or number; for fewer than two pairs; for equal scores
    """
    if limit is not None and limit < 2:
        raise ValueError(f"limit must be at least 2, got {limit}: one pair has no rank")
    first, second, score = [], [], []
    rows = _rows(str(path), tuple(columns))
    for number, (one, two, told) in enumerate(itertools.islice(rows, limit), start=1):
        for name, text in zip(columns, (one, two), strict=False):
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {number}: {name} is not a text but {text!r}")
        first.append(one)
        second.append(two)
        score.append(_number(told))
        if score[-1] is None:
            raise ValueError(f"{path}, row {number}: {columns[2]} is not a number but {told!r}")
    if len(score) < 2:
        raise ValueError(f"{path} has {len(score)} pairs; a correlation needs at least 2")
    if len(set(score)) == 1:
        raise ValueError(f"{path}: all {len(score)} scores are {score[0]}; nothing can be ranked")
    return Pairs(first, second, np.array(score))


def _number(told) -> float | None:
    """A finite number, or None."""
    try:
        value = math.nan if isinstance(told, bool) else float(told)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _rows(path: str, columns: tuple[str, ...]) -> Iterator[tuple]:
    """The three fields of every row, as they stand in the file."""
    kind = Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
    if kind == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: {FORMATS}")
    with io.TextIOWrapper(open_stream(path), encoding="utf-8-sig", newline="") as lines:
        try:
            read = _json_rows if kind == ".jsonl" else _csv_rows
            yield from read(path, lines, columns, "\t" if kind == ".tsv" else ",")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error


def _csv_rows(path: str, lines, columns: tuple[str, ...], delimiter: str) -> Iterator[tuple]:
    # In a tsv a quotation mark is a character like any other.
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = (row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if row)
    head = next(rows, None)
    if head is None:
        return
    if len(head) == len(columns) and _number(head[-1]) is not None:
        rows, at = itertools.chain([head], rows), range(len(columns))
    else:
        _check_columns(path, head, columns)
        at = [head.index(name) for name in columns]
    for number, row in enumerate(rows, start=1):
        if len(row) <= max(at):
            raise ValueError(f"{path}, row {number}: {len(row)} fields, {max(at) + 1} are needed")
        yield tuple(row[i] for i in at)


def _json_rows(path: str, lines, columns: tuple[str, ...], _delimiter: str) -> Iterator[tuple]:
    for number, line in enumerate((line for line in lines if line.strip()), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number} is not a JSON object")
        _check_columns(f"{path}, row {number}", row, columns)
        yield tuple(row[name] for name in columns)


def _parquet_rows(path: str, columns: tuple[str, ...]) -> Iterator[tuple]:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(columns=list(columns)):
                yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_columns(where: str, present, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in present]
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(map(repr, missing))}; there are "
            f"{', '.join(map(repr, present))}"
        )

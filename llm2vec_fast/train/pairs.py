"""Supervised examples: a query, its answer and hard negatives, read from files."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.corpus.formats import SURROGATE, Source, open_stored, open_stream
from llm2vec_fast.corpus.read import open_sources
from llm2vec_fast.corpus.tables import FIELD_LIMIT

# What a column may be called, the E5 data's names first. A row has at most one name of each line.
NAMES = {
    "query": ("query", "anchor", "sent0"),
    "positive": ("positive", "pos", "sent1"),
    "negatives": ("negative", "neg", "negatives", "hard_neg"),
    "task": ("task", "task_name"),
    "query_instruction": ("query_instruction", "instruction", "prompt"),
    "doc_instruction": ("doc_instruction",),
}
KNOWN = {name: part for part, names in NAMES.items() for name in names}
PART = re.compile(r"[-_](?:\d+-of-\d+|split\d+|\d+)$")  # train-00000-of-00004, allnli_split2

# Query instructions of the E5 data, one file for each task; where there are two, rows alternate.
# Source: the E5 data of arXiv 2401.00368, with the words of the official E5Data.
_WIKIPEDIA = "retrieve Wikipedia passages that answer the question"
E5_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "allnli": (
        "Given a premise, retrieve a hypothesis that is entailed by the premise",
        "Retrieve semantically similar text",
    ),
    "dureader": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "eli5_question_answer": (
        "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    ),
    "fever": ("Given a claim, retrieve documents that support or refute the claim",),
    "hotpot_qa": (
        "Given a multi-hop question, retrieve documents that can help answer the question",
    ),
    "miracl": (f"Given a question, {_WIKIPEDIA}",),
    "mrtydi": (f"Given a question, {_WIKIPEDIA}",),
    "msmarco_passage": (
        "Given a web search query, retrieve relevant passages that answer the query",
    ),
    "msmarco_document": (
        "Given a web search query, retrieve relevant documents that answer the query",
    ),
    "nq": (f"Given a question, {_WIKIPEDIA}",),
    "quora_duplicates": (
        "Given a question, retrieve questions that are semantically equivalent to the given "
        "question",
        "Find questions that have the same meaning as the input question",
    ),
    "squad": (f"R{_WIKIPEDIA[1:]}",),
    "t2ranking": ("Given a Chinese search query, retrieve web passages that answer the question",),
    "trivia_qa": (f"R{_WIKIPEDIA[1:]}",),
}


@dataclass(frozen=True, slots=True)
class Example:
    """A query, the document that answers it and `negatives` that do not.

    task: batches can be kept to one task; instructions stand before the texts, "" for none
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    task: str = ""
    query_instruction: str = ""
    doc_instruction: str = ""


def read_pairs(
    source: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    negatives_per_query: int | None = None,
) -> list[Example]:
    """All examples of jsonl, csv, tsv and parquet files (.gz and .zst too), in order.

    source: files, globs, directories. A file found in a directory or by a glob whose name is a task
            of the E5 data (nq.jsonl, ...) gets that task's query instruction, with the ";" of the
            official training, unless its rows bring their own
    rows:   query | anchor | sent0, positive | pos | sent1 (several in a list: an example for each),
            negative | neg | negatives | hard_neg (a text, a list or nothing), and optionally task
            (else the file's name without suffix and part number), query_instruction | instruction |
            prompt, doc_instruction. Other columns are payload: ignored, unless one looks misspelt
    limit:  the first so many examples only
    negatives_per_query: keep the first so many of each row, which must have them
    raises: ValueError naming file and row (from 0) for what cannot be read, an empty query or
            positive, an unknown or absent column, and unequal numbers of negatives in a task
    source: layout and instructions of the E5 data as in the official E5Data
    """
    check_limit(limit)
    if negatives_per_query is not None and negatives_per_query < 0:
        raise ValueError(f"negatives_per_query must not be negative, got {negatives_per_query}")
    given = [source] if isinstance(source, str | Path) else source
    named = {Path(name).as_posix() for name in given}
    examples: list[Example] = []
    expected: dict[str, tuple[int, str]] = {}  # negatives of each task, and the row that told
    for found in open_sources(given):
        stem = Path(found.name).name.split(".")[0]
        task = PART.sub("", stem)
        # One file given by name may be called fever.jsonl for reasons of its own.
        e5 = {} if found.name in named else E5_INSTRUCTIONS
        instructions = e5.get(task, ("",))
        for n, fields in enumerate(_records(found)):
            where = f"{found.name}, row {n}"
            instruction = instructions[n % len(instructions)]
            default = f"{instruction};" if instruction else ""
            for example in _parsed(fields, where, task, default, negatives_per_query):
                if limit is not None and len(examples) >= limit:
                    return examples
                _check_count(example, where, expected)
                examples.append(example)
    if not examples:
        raise ValueError(f"no examples to train on in {source}")
    return examples


def check_limit(limit: int | None) -> None:
    """Raises ValueError for a limit that lets nothing through."""
    if limit is not None and limit < 1:
        raise ValueError(f"a limit must be at least 1, got {limit}: leave it out for everything")


def _parsed(
    fields: dict, where: str, task: str, instruction: str, keep: int | None
) -> Iterator[Example]:
    """The examples of a row."""
    row = _named(fields, where)
    negatives = _texts(row.get("negatives"), "negative", where)
    negatives = tuple(text for text in negatives if not _is_empty(text))
    if keep is not None:
        if len(negatives) < keep:
            raise ValueError(
                f"{where}: {len(negatives)} negatives, fewer than negatives_per_query = {keep}"
            )
        negatives = negatives[:keep]
    query = _one(row.get("query"), "query", where)
    if _is_empty(query):
        raise ValueError(f"{where}: the query is empty")
    told = {
        "task": _one(row.get("task") or task, "task", where),
        "query_instruction": _one(
            row.get("query_instruction") or instruction, "instruction", where
        ),
        "doc_instruction": _one(row.get("doc_instruction") or "", "doc_instruction", where),
    }
    positives = _texts(row.get("positive"), "positive", where)
    if not positives or any(map(_is_empty, positives)):
        raise ValueError(f"{where}: a positive is empty")
    for positive in positives:
        yield Example(query, positive, negatives, **told)


def _named(fields: dict, where: str) -> dict:
    """The row by our names. Columns nobody knows are payload; those of nearly our names are not."""
    row, given = {}, {}
    for name, value in fields.items():
        part = KNOWN.get(name)
        if part is None:
            near = _nearest(name)
            if near is not None and near not in fields:
                raise ValueError(
                    f"{where}: unknown column {name!r}. Did you mean {near!r}? If it is other "
                    "data, name it otherwise"
                )
        elif part in row:
            raise ValueError(f"{where}: both {given[part]!r} and {name!r}: keep one of them")
        else:
            row[part], given[part] = value, name
    for part in ("query", "positive"):
        if part not in row:
            raise ValueError(
                f"{where}: no column {' or '.join(map(repr, NAMES[part]))}; its columns are "
                f"{', '.join(map(repr, fields))[:300]}"
            )
    return row


@cache  # asked once a row
def _nearest(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, KNOWN, 1, cutoff=0.75)), None)


def _texts(value: object, what: str, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_one(one, what, where) for one in values)


def _one(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: the {what} is {value!r:.40}, not text")
    return value if value.isascii() else SURROGATE.sub("\ufffd", value)


def _is_empty(text: str) -> bool:
    return not text or text.isspace()


def _check_count(example: Example, where: str, expected: dict[str, tuple[int, str]]) -> None:
    """A batch is a matrix: every query of a task brings equally many negatives."""
    count = len(example.negatives)
    first, first_where = expected.setdefault(example.task, (count, where))
    if count != first:
        raise ValueError(
            f"{where}: {count} negatives, but {first_where} of the same task {example.task!r} has "
            f"{first}. Set negatives_per_query to a number that all rows have (0: none are used)"
        )


def _records(source: Source) -> Iterator[dict]:
    """Rows as dictionaries; blank lines of jsonl and csv are no rows. Raises ValueError."""
    readers = {"jsonl": _json_records, "csv": _csv_records, "tsv": _csv_records}
    if source.format == "parquet":
        records = _parquet_records(source)
    elif source.format in readers:
        records = readers[source.format](source)
    else:
        raise ValueError(f"{source.name}: a .txt has no queries and positives; give jsonl or csv")
    try:
        yield from records
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source.name} cannot be read: {error}") from error


def _json_records(source: Source) -> Iterator[dict]:
    with open_stream(source.files[0]) as file, io.TextIOWrapper(file, "utf-8-sig") as lines:
        filled = (line for line in lines if line and not line.isspace())
        for n, line in enumerate(filled):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source.name}, row {n}: not valid JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{source.name}, row {n}: not a JSON object but {fields!r:.40}")
            yield fields


def _csv_records(source: Source) -> Iterator[dict]:
    csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
    delimiter = "\t" if source.format == "tsv" else ","
    with (
        open_stream(source.files[0]) as file,
        io.TextIOWrapper(file, "utf-8-sig", newline="") as lines,
    ):
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for n, fields in enumerate(reader):
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{source.name}, row {n}: not the {len(reader.fieldnames or [])} fields of "
                    "the header"
                )
            yield fields


def _parquet_records(source: Source) -> Iterator[dict]:
    path = source.files[0]
    file = open_stored(path) if "://" in path else pa.OSFile(path)
    with file, pq.ParquetFile(file) as table:
        # Payload, such as a vector for each row, is not decoded.
        wanted = [name for name in table.schema_arrow.names if name in KNOWN]
        others = dict.fromkeys(name for name in table.schema_arrow.names if name not in KNOWN)
        for batch in table.iter_batches(1024, columns=wanted):
            for fields in batch.to_pylist():
                yield fields | others

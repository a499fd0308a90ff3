"""Training texts: read from files or `datasets`, cut into sequences for MNTP, hashed."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from llm2vec_fast.corpus.read import Columns, Rows, open_sources
from llm2vec_fast.text.tokenize import TextTokenizer, clean
from llm2vec_fast.train.pairs import check_limit

__all__ = [
    "Chunks",
    "Texts",
    "load_dataset_texts",
    "read_texts",
    "text_keys",
]

TAKE = 4096  # rows read at a time
WINDOW = 1 << 20  # characters tokenised at a time: enough for all cores, little memory


class Texts(list[str]):
    """A list of texts, and how many empty ones (nothing or whitespace) were left out of it."""

    n_empty: int = 0


def read_texts(
    source: str | Path | Sequence[str | Path],
    *,
    text_column: str = "text",
    limit: int | None = None,
) -> Texts:
    """All texts of files, in order; empty ones are left out and counted.

    source:      a file (txt: a line is a text; jsonl, csv, tsv, parquet; .gz and .zst too), a
                 directory, a glob, or several of them
    text_column: the field of jsonl, csv, tsv and parquet
    limit:       the first so many texts only
    raises:      ValueError for what is missing or cannot be read, a row that is no text (file and
                 row named, rows count from 0), and when there are no texts
    """
    check_limit(limit)
    texts = Texts()
    for found in open_sources(source):
        with Rows(found, Columns(text=text_column)) as rows:
            while not rows.done and not _full(texts, limit):
                for row in rows.take(TAKE)[0]:
                    if _full(texts, limit):
                        break
                    if row.error:
                        raise ValueError(f"text {row.id}: {row.error}")
                    _add(texts, row.text, limit)
    names = [source] if isinstance(source, str | Path) else source
    return _some(texts, ", ".join(map(str, names)))


def load_dataset_texts(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    limit: int | None = None,
) -> Texts:
    """All texts of a Hugging Face data set, in order; empty ones are left out and counted.

    name, config_name, split: as `datasets.load_dataset` takes them; a local directory too
    raises: ValueError without the package `datasets`, without the column, for a row that is no
            text, when there are no texts; else what `datasets` raises
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"the data set {name!r} needs the package `datasets`: pip install datasets. A local "
            "file is read without it: set train_file instead of dataset_name"
        ) from error
    check_limit(limit)
    rows = datasets.load_dataset(name, config_name, split=split)
    if text_column not in rows.column_names:
        near = difflib.get_close_matches(text_column, rows.column_names, 1)
        raise ValueError(
            f"data set {name!r} has no column {text_column!r}; its columns are "
            f"{', '.join(map(repr, rows.column_names))}"
            + (f". Did you mean {near[0]!r}?" if near else "")
        )
    texts, at = Texts(), 0
    for batch in rows.select_columns([text_column]).iter(TAKE):
        for text in batch[text_column]:
            if not isinstance(text, str | None):
                raise ValueError(f"data set {name!r}, row {at}: {text!r:.40} is not text")
            _add(texts, text or "", limit)  # `datasets` reads an empty field of csv as None
            at += 1
        if _full(texts, limit):
            break
    return _some(texts, f"data set {name!r}, split {split!r}")


def _full(texts: Texts, limit: int | None) -> bool:
    return limit is not None and len(texts) >= limit


def _add(texts: Texts, text: str, limit: int | None) -> None:
    if _full(texts, limit):
        return
    if text and not text.isspace():
        texts.append(text)
    else:
        texts.n_empty += 1


def _some(texts: Texts, where: str) -> Texts:
    if not texts:
        raise ValueError(f"no texts in {where}: {texts.n_empty} empty rows")
    return texts


@dataclass(frozen=True, eq=False)
class Chunks:
    """Token sequences for MNTP. Arrays are read-only: masking works on copies.

    ids:      (T,) int32, all sequences one after another
    special:  (T,) bool: tokens that the tokenizer puts around a text (BOS, ...): never masked
    starts:   (N + 1,) int64: sequence i is ids[starts[i] : starts[i + 1]]
    left_out: chunks: tokens of the last, shorter one; by line: texts with no token to predict
    """

    ids: np.ndarray
    special: np.ndarray
    starts: np.ndarray
    left_out: int

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        tokenizer: TextTokenizer,
        length: int,
        line_by_line: bool = False,
    ) -> Chunks:
        """Texts, each with its special tokens, concatenated and cut into chunks of `length`.

        texts:        may be an iterator; only their ids are kept
        tokenizer:    without a template; its own limits are not applied
        length:       tokens of a chunk; by line, the most of a sequence
        line_by_line: each text is a sequence of its own, cut to `length`, specials included
        raises:       ValueError when there are fewer tokens than one chunk, by line no text that
                      leaves a token to predict (the first position predicts nothing)
        source:       the official run_mntp; it drops a shorter chunk after every 1,000 texts too
        """
        begin, end = tokenizer.start_ids, tokenizer.end_ids
        if tokenizer.template.prefix or tokenizer.template.suffix:
            raise ValueError("MNTP trains on plain texts: its tokenizer must have no template")
        room = length - len(begin) - len(end)
        if room < 1 or length < 2:
            raise ValueError(
                f"max_seq_length = {length} leaves nothing to predict beside "
                f"{len(begin) + len(end)} special tokens: raise it"
            )
        if not line_by_line:
            ids, lengths, _ = _tokenised(texts, tokenizer, None)
            return cls._cut(ids, _specials(lengths, len(begin), len(end)), length, len(lengths))
        ids, lengths, n_dropped = _tokenised(texts, tokenizer, room)
        if not len(lengths):
            raise ValueError(
                f"none of {n_dropped} texts has a token that can be predicted: give longer texts, "
                "or leave out line_by_line"
            )
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return cls._frozen(ids, _specials(lengths, len(begin), len(end)), starts, n_dropped)

    @classmethod
    def _cut(cls, ids: np.ndarray, special: np.ndarray, length: int, n_texts: int) -> Chunks:
        n, rest = divmod(len(ids), length)
        if not n:
            raise ValueError(
                f"{n_texts} texts have {len(ids)} tokens, fewer than one chunk of max_seq_length = "
                f"{length}: give more text, lower max_seq_length to at most {len(ids)}, or set "
                "line_by_line"
            )
        starts = np.arange(n + 1, dtype=np.int64) * length
        return cls._frozen(ids[: n * length], special[: n * length], starts, rest)

    @classmethod
    def _frozen(cls, ids, special, starts, left_out: int) -> Chunks:
        for array in (ids, special, starts):
            array.flags.writeable = False
        return cls(ids, special, starts, left_out)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def rows(self, indices: Sequence[int] | np.ndarray) -> tuple[list, list]:
        """Of some sequences: their ids, each (L,) int32, and their special marks, each (L,) bool.

        Read-only views; concatenating them for a batch copies.
        """
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        return [self.ids[span] for span in spans], [self.special[span] for span in spans]

    def fingerprint(self) -> str:
        """sha256 of all sequences: equal exactly for the same tokens, cut in the same way."""
        told = hashlib.sha256(np.ascontiguousarray(self.starts, "<i8"))
        told.update(np.ascontiguousarray(self.ids, "<i4"))
        return told.hexdigest()


def _tokenised(
    texts: Iterable[str], tokenizer: TextTokenizer, room: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids of all texts with their special tokens, the length of each, the number left out.

    room: cut texts to so many tokens, and leave out those of which nothing could be predicted
    """
    begin, end = tokenizer.start_ids, tokenizer.end_ids
    ids, lengths, n_dropped = [np.empty(0, np.int32)], [np.empty(0, np.int64)], 0
    for window in _windows(texts):
        # No Python list ever holds more than a window's ids.
        encodings = tokenizer.raw.encode_batch_fast(window, add_special_tokens=False)
        found = [encoding.ids[:room] for encoding in encodings]
        if room is not None:
            kept = [text for text in found if text and len(begin) + len(text) > 1]
            n_dropped += len(found) - len(kept)
            found = kept
        found = [[*begin, *text, *end] for text in found]
        lengths.append(np.array([len(text) for text in found], np.int64))
        ids.append(np.fromiter(chain.from_iterable(found), np.int32, int(lengths[-1].sum())))
    return np.concatenate(ids), np.concatenate(lengths), n_dropped


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about WINDOW characters, surrogates replaced."""
    window, chars = [], 0
    for text in texts:
        window.append(clean(text))
        chars += len(text) + 1
        if chars >= WINDOW:
            yield window
            window, chars = [], 0
    if window:
        yield window


def _specials(lengths: np.ndarray, n_begin: int, n_end: int) -> np.ndarray:
    """Marks the first and last tokens of every text. Nothing else is special: a special token's
    name inside a text is tokenised as text."""
    ends = np.cumsum(lengths)
    special = np.zeros(int(lengths.sum()), bool)
    for i in range(n_begin):
        special[ends - lengths + i] = True
    for i in range(n_end):
        special[ends - 1 - i] = True
    return special


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """(n,) int64 numbers, equal for equal texts, on every rank and in every run.

    For `ops.info_nce(query_keys=, doc_keys=)`, which leaves duplicates out of the negatives. Two
    different texts share a number once in about 10^19 pairs, and would only lose a negative.
    """
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    return np.frombuffer(digests, "<i8").astype(np.int64)


def fingerprint(texts: Iterable[str]) -> str:
    """A hash of all texts in their order."""
    return hashlib.sha256(text_keys(texts).tobytes()).hexdigest()

"""Files of tagged words (CoNLL-2000, CoNLL-2003, CoNLL-U, Universal NER) to sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

# Tasks whose tags mark spans: O, B-NP, I-NP ... Their figure is the F1 of whole spans.
SPAN_TASKS = ("chunk", "ner")
TASKS = ("pos", *SPAN_TASKS)
SPAN_TAG = re.compile(r"O|[BIES]-.+")
# Columns counted from 1; -1 is the last one. Plain: word first. Numbered: token number, word.
PLAIN = {"pos": 2, "chunk": 3, "ner": -1}
UNIVERSAL_NER = {"ner": 3}
CONLL_U = {"pos": 4}
CONLL_U_COLUMNS = 10


@dataclass(frozen=True)
class Sentence:
    """Words and one tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_tagged(
    path: str | Path, task: str, tag_column: int | None = None, limit: int | None = None
) -> list[Sentence]:
    """Sentences of a file with a word a line and blank lines between sentences.

    task:       pos | chunk | ner, which chooses the column. Plain files (fields parted by spaces or
                tabs): word, pos, chunk, and NER in the last column. Files whose lines start with
                the token's number (fields parted by tabs, `#` comments): CoNLL-U has the word
                second and UPOS fourth, Universal NER the word second and the tag third.
    tag_column: the tag's column, counted from 1, for other files
    limit:      only the first so many sentences
    raises:     ValueError naming the line that lacks the column or, for chunk and ner, has a tag
                that is not O, B-... or I-...; for files without sentences
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of sentences must be at least 1, got {limit}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    numbered = _is_numbered(lines)
    sentences, words, tags = [], [], []
    for number, line in enumerate([*lines, ""], start=1):
        if not line.strip():
            if words and words != ["-DOCSTART-"]:
                sentences.append(Sentence(tuple(words), tuple(tags)))
            words, tags = [], []
            if limit is not None and len(sentences) == limit:
                break
            continue
        found = _numbered(line) if numbered else line.split()
        if found is None:
            continue
        where = f"{path}, line {number}"
        words.append(found[min(numbered, len(found) - 1)])
        tags.append(_tag(where, found, task, tag_column, numbered))
    if not sentences:
        raise ValueError(f"{path} holds no sentences")
    return sentences


def split(
    sentences: list[Sentence], test_share: float, seed: int
) -> tuple[list[Sentence], list[Sentence]]:
    """(train, test): sentences drawn at random, the same for the same seed, in their old order.

    raises: ValueError if either would be empty
    """
    count = round(len(sentences) * test_share)
    if not 0 < count < len(sentences):
        raise ValueError(
            f"a share of {test_share} of {len(sentences)} sentences leaves nothing to test on or "
            "to train on: choose another, or give files for both"
        )
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    test, train = sorted(order[:count]), sorted(order[count:])
    return [sentences[i] for i in train], [sentences[i] for i in test]


def _is_numbered(lines: list[str]) -> bool:
    """Whether the first line of words (with a tab, so no comment) begins with a token's number."""
    for line in lines:
        if line.strip() and not (line.startswith("#") and "\t" not in line and "=" in line):
            return "\t" in line and line.split("\t")[0].replace("-", "").isdigit()
    return False


def _numbered(line: str) -> list[str] | None:
    """None for comments, words of several tokens (1-2) and empty nodes (1.1)."""
    found = line.rstrip("\r").split("\t")
    return found if found[0].isdigit() else None


def _tag(where: str, found: list[str], task: str, column: int | None, numbered: bool) -> str:
    if column is None:
        known = PLAIN
        if numbered:
            known = CONLL_U if len(found) >= CONLL_U_COLUMNS else UNIVERSAL_NER
        if task not in known:
            raise ValueError(
                f"{where}: a file of this kind has no known column for {task}, only for "
                f"{', '.join(known)}; name it with --tag-column"
            )
        column = known[task]
    least = 2 + numbered if column < 0 else column
    if column == 0 or len(found) < least:
        raise ValueError(
            f"{where} has {len(found)} columns; the {task} tag is looked for in column {least}"
        )
    tag = found[column - 1 if column > 0 else column]
    if task in SPAN_TASKS and not SPAN_TAG.fullmatch(tag):
        raise ValueError(
            f"{where}: {tag!r} is no {task} tag (O, B-..., I-...): "
            "name its column with --tag-column"
        )
    return tag

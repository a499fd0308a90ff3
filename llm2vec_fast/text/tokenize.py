"""Texts to token ids and the span of tokens that is pooled.

A sequence is laid out as
    [start tokens] [template prefix] [instruction " " text] [template suffix] [end tokens]
and the pooled span is the text together with the template suffix and end tokens: start
tokens and instruction are read by the model but not pooled (`skip_instruction`). Everything is
tokenised once, in one batched call; the boundary between instruction and text is found by character
offsets, and truncation drops tokens from the end of the text alone, never template or instruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from llm2vec_fast.model.small_file import plain_file, read_json
from llm2vec_fast.text.templates import Template

# Characters kept per token of the limit before tokenising a long text; doubled where too few.
CHARS_PER_TOKEN = 8
# Tokens beyond the limit that must exist for a clipped text to be known to tokenise like the whole.
MARGIN = 32
LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer")


@dataclass(slots=True)
class Tokens:
    """One text, ready for a batch. `ids` is empty for a text that holds nothing."""

    ids: np.ndarray  # (n,) int32
    start: int  # the pooled span [start, end)
    end: int
    status: str = "ok"  # ok | truncated | empty
    note: str = ""

    def __len__(self) -> int:
        return len(self.ids)


EMPTY = np.empty(0, dtype=np.int32)


class TextTokenizer:
    """The tokenizer of a model directory with its template, limits and pooling."""

    def __init__(
        self,
        directory: Path,
        *,
        template: Template | None = None,
        pooling_mode: str = "mean",
        max_length: int = 512,
        doc_max_length: int = 400,
        skip_instruction: bool = True,
        verbatim_instruction: bool = False,
    ):
        self.raw = _load(directory)
        self.template = template or Template()
        self.pooling_mode = pooling_mode
        self.max_length, self.doc_max_length = max_length, doc_max_length
        self.skip_instruction = skip_instruction
        self.verbatim_instruction = verbatim_instruction  # text follows at once, without a space
        self.raw.no_padding()
        self.raw.no_truncation()
        settings = _settings(directory)
        self.eos_id = self._special(settings.get("eos_token"))
        self.bos_id = self._special(settings.get("bos_token"))
        with broken_where(directory):
            self.start_ids, self.end_ids = self._added_around(settings)
        if pooling_mode == "bos_token" and self.bos_id not in self.start_ids:
            raise ValueError(
                f"pooling_mode 'bos_token' needs a tokenizer that adds a beginning-of-sequence "
                f"token; the one in {directory} adds none"
            )
        with broken_where(directory):
            self._prepare()
        self.directory = directory

    def __getstate__(self) -> dict:
        """`tokenizers` forgets this setting when it is pickled (for worker processes)."""
        return self.__dict__ | {"literal": self.raw.encode_special_tokens}

    def __setstate__(self, state: dict) -> None:
        literal = state.pop("literal")
        self.__dict__ |= state
        self.raw.encode_special_tokens = literal

    def __call__(self, texts: Sequence[str], instructions: Sequence[str]) -> list[Tokens]:
        """Tokenises texts, each with its instruction ("" for none).

        raises: ValueError if an instruction leaves no room for a text within max_length
        """
        rows = [self._source(*pair) for pair in zip(texts, instructions, strict=True)]
        found: list[Tokens | None] = [None] * len(rows)
        todo, chars = list(range(len(rows))), CHARS_PER_TOKEN * (self.max_length + MARGIN)
        while todo:  # once around, save for texts whose tokens are unusually long
            sources = [rows[i].clipped(chars) for i in todo]
            for i, source, encoding in zip(todo, sources, self.encode(sources), strict=True):
                found[i] = self._assemble(source, encoding)
            todo = [i for i in todo if found[i] is None]
            chars *= 2
        return found  # type: ignore[return-value]

    def encode(self, sources: Sequence[Source]) -> list[Encoding]:
        """Tokenises the joined strings; offsets only where a boundary is looked for."""
        strings = [source.lead + source.text + source.tail for source in sources]
        plain = not any(source.lead or source.tail for source in sources)
        run = self.raw.encode_batch_fast if plain else self.raw.encode_batch
        with broken_where(self.directory):
            return run(strings, add_special_tokens=False)

    def _source(self, text: str, instruction: str) -> Source:
        text, lead = clean(text), clean(instruction)
        if not self.verbatim_instruction:
            lead = f"{lead.strip()} " if lead.strip() else ""
        # Whitespace alone is no text. Asked of the whole text: a clipped one may begin with much.
        if text.isspace() or self.template.prefix or self.template.suffix:
            text = text.strip()
        return Source(self.lead + lead, text, self.tail, False)

    def _assemble(self, source: Source, encoding: Encoding) -> Tokens | None:
        """Cuts to the limits and places the span; None if the text was clipped too short."""
        if not source.text:
            return Tokens(EMPTY, 0, 0, "empty")
        ids = encoding.ids
        text_from = _token_at(encoding, len(source.lead)) if source.lead else 0
        text_to = (
            _token_from(encoding, len(source.lead) + len(source.text)) if source.tail else len(ids)
        )
        if text_from >= text_to:
            if source.clipped_text:
                return None
            return Tokens(
                EMPTY, 0, 0, "empty", "nothing is left after the tokenizer's normalisation"
            )
        status, note, tail = "ok", "", ids[text_to:]
        around = len(self.head_ids) + len(self.foot_ids) + max(len(tail), len(self.tail_ids))
        room = self.max_length - around - text_from
        if room < 1:
            raise ValueError(
                f"the instruction and template take {around + text_from} tokens and leave no room "
                f"for text within max_length = {self.max_length}: {source.lead[:60]!r}"
            )
        room = min(room, self.doc_max_length)
        if source.clipped_text and text_to - text_from < room + MARGIN:
            return None
        if text_to - text_from > room:
            status, tail = "truncated", self.tail_ids
            n = "more than " * source.clipped_text + str(text_to - text_from)
            note = f"{room} of {n} tokens"
            text_to = text_from + room
        whole = [*self.head_ids, *ids[:text_to], *tail, *self.foot_ids]
        start, end = len(self.head_ids) + text_from, len(whole)
        if self.pooling_mode == "bos_token":
            start = whole.index(self.bos_id)
        elif not self.skip_instruction:
            start = 0
        return Tokens(np.array(whole, dtype=np.int32), start, end, status, note)

    def _prepare(self) -> None:
        """Splits the template at its special tokens: ids around, literal strings next to the text.

        head_ids / foot_ids stand outside; lead and tail are literal and tokenised with the text,
        since tokens may form across the boundary; tail_ids is the tail on its own, for truncated
        texts.
        """
        specials = {t.content for t in self.raw.get_added_tokens_decoder().values() if t.special}
        head, self.lead = _cut_after_last(self.template.prefix, specials)
        self.tail, foot = _cut_before_first(self.template.suffix, specials)
        self.head_ids = [*self.start_ids, *self.ids_of(head)]
        spaces = self.raw.pre_tokenizer
        if head and isinstance(spaces, Metaspace) and spaces.prepend_scheme == "first":
            spaces.prepend_scheme = "never"  # all that is still to come stands behind the head
        self.foot_ids = [*self.ids_of(foot), *self.end_ids]
        self.tail_ids = self._after_text(self.tail)
        if self.pooling_mode == "eos_token" and self.foot_ids[-1:] != [self.eos_id]:
            if self.eos_id is None:
                raise ValueError("pooling_mode 'eos_token' needs a tokenizer with an end token")
            self.foot_ids.append(self.eos_id)
        self.raw.encode_special_tokens = True  # a special token's string in a text is just text

    def _after_text(self, tail: str) -> list[int]:
        """Token ids of a string as it stands behind a text, here one that it does not merge with:
        behind nothing, many tokenizers would put a space before it.
        """
        for text in ("a", "(", "字"):
            before, joined = self.ids_of(text), self.ids_of(text + tail)
            if joined[: len(before)] == before:
                return joined[len(before) :]
        return self.ids_of(tail)

    def ids_of(self, text: str) -> list[int]:
        """Token ids of a string alone, without start and end tokens."""
        return self.raw.encode(text, add_special_tokens=False).ids if text else []

    def _special(self, content: str | None) -> int | None:
        return None if content is None else self.raw.token_to_id(content)

    def _added_around(self, settings: dict) -> tuple[list[int], list[int]]:
        """The tokens that the post-processor puts around every sequence."""
        bare = self.ids_of("a")
        full = self.raw.encode("a").ids
        at = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
        start, end = full[:at], full[at + len(bare) :]
        if settings.get("tokenizer_class") in LLAMA_TOKENIZERS:  # these rebuild it from two flags
            if isinstance(settings.get("add_bos_token"), bool) and self.bos_id is not None:
                start = [self.bos_id] * settings["add_bos_token"]
            if isinstance(settings.get("add_eos_token"), bool) and self.eos_id is not None:
                end = [self.eos_id] * settings["add_eos_token"]
        return start, end


@dataclass(slots=True)
class Source:
    """One string to tokenise: lead (template, instruction), text, tail (template)."""

    lead: str
    text: str
    tail: str
    clipped_text: bool

    def clipped(self, chars: int) -> Source:
        if len(self.text) <= chars:
            return Source(self.lead, self.text, self.tail, False)
        return Source(self.lead, self.text[:chars], self.tail, True)


def _token_at(encoding: Encoding, char: int) -> int:
    """The first token that reaches beyond a character position, or the number of tokens."""
    token = encoding.char_to_token(char)
    if token is not None:
        return token
    ends = [end for _, end in encoding.offsets]
    return next((i for i, end in enumerate(ends) if end > char), len(ends))


def _token_from(encoding: Encoding, char: int) -> int:
    """The first token that begins at a character position or later, or the number of tokens."""
    token = _token_at(encoding, char)
    straddles = token < len(encoding) and encoding.token_to_chars(token)[0] < char
    return token + straddles


def _cut_after_last(text: str, specials: set[str]) -> tuple[str, str]:
    cut = max((text.rfind(s) + len(s) for s in specials if s and s in text), default=0)
    return text[:cut], text[cut:]


def _cut_before_first(text: str, specials: set[str]) -> tuple[str, str]:
    cut = min((text.find(s) for s in specials if s and s in text), default=len(text))
    return text[:cut], text[cut:]


def clean(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, become U+FFFD."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def broken_where(path: Path) -> Iterator[None]:
    """Whatever a hostile tokenizer.json makes of the library becomes a ValueError: bare exceptions,
    and panics in Rust, which are no Exception.
    """
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} is not a valid tokenizer: {error!s:.300}") from error


def _load(directory: Path) -> Tokenizer:
    """tokenizer.json read directly (AutoTokenizer takes seconds); transformers where it lacks."""
    path = directory / "tokenizer.json"
    if path.exists():
        with broken_where(path):
            return Tokenizer.from_file(str(plain_file(path)))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{directory} has no tokenizer.json, and its tokenizer has no fast version"
        )
    return backend


def _settings(directory: Path) -> dict:
    """tokenizer_config.json with special tokens as plain strings; {} where there is none."""
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        told = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} must hold a JSON object")
    for name in ("bos_token", "eos_token"):
        if isinstance(told.get(name), dict):
            told[name] = told[name].get("content")
        if not isinstance(told.get(name), str | None):
            raise ValueError(f"{path}: {name} must be text or null, got {told[name]!r:.80}")
    return told

"""Token ids, truncation and spans exactly as llm2vec 0.2.3 makes them, for existing indexes.

Its faults are kept on purpose (docs/moving_from_llm2vec.md lists them): words are dropped until a
text fits, a text that holds the separator is torn, the span is as long as the text tokenises alone.
Where the official outcome hangs on the padding of the batch (a text without tokens) or is a crash
(a span longer than the sequence), the whole sequence is pooled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm2vec_fast.text.tokenize import EMPTY, TextTokenizer, Tokens, broken_where, clean

SEPARATOR = "!@#$%^&*()"
# What the official library appends for eos pooling, by config class; one model by its exact name.
END_STRINGS = {"llama": " </s>", "mistral": " </s>", "qwen2": "<|endoftext|>"}
END_BY_NAME = {"meta-llama/Meta-Llama-3-8B": "<|end_of_text|>"}


class OfficialTokenizer(TextTokenizer):
    """`Tokens` as the official library would tokenise, truncate and pool."""

    end_string = ""

    def end_with(self, family: str, name: str) -> None:
        """Tells which end-of-text string eos pooling appends for this model."""
        self.end_string = END_BY_NAME.get(name, END_STRINGS.get(family, ""))

    def _prepare(self) -> None:
        """Nothing to prepare: templates are joined to the text as strings."""

    def __call__(self, texts: Sequence[str], instructions: Sequence[str]) -> list[Tokens]:
        texts, instructions = [clean(t) for t in texts], [clean(i) for i in instructions]
        kept, shortened = self._shorten(texts)
        joined = [
            self._dress(f"{i.strip()} {SEPARATOR}{t}" if i else f"{SEPARATOR}{t}")
            for t, i in zip(kept, instructions, strict=True)
        ]
        parts = [text.split(SEPARATOR) for text in joined]
        whole = self._ids(["".join(part) for part in parts])
        alone = self._ids([part[1] if len(part) > 1 else "" for part in parts])
        return [self._tokens(*row) for row in zip(whole, alone, shortened, strict=True)]

    def _shorten(self, texts: list[str]) -> tuple[list[str], list[bool]]:
        """Keeps int(words * doc_max_length / tokens) words while a text has too many tokens."""
        texts, shortened = list(texts), [False] * len(texts)
        todo = list(range(len(texts)))
        while todo:
            counts = [min(len(x), self.max_length) for x in self._ids([texts[i] for i in todo])]
            todo = [i for i, n in zip(todo, counts, strict=True) if n > self.doc_max_length]
            for i, n in zip(todo, (n for n in counts if n > self.doc_max_length), strict=True):
                words = texts[i].split()
                texts[i] = " ".join(words[: int(len(words) * (self.doc_max_length / n))])
                shortened[i] = True
        return texts, shortened

    def _dress(self, text: str) -> str:
        """The template, and for eos pooling the end token's string."""
        if self.template.prefix or self.template.suffix:
            text = f"{self.template.prefix}{text.strip()}{self.template.suffix}"
            if self.template.prefix.startswith("<|start_header_id|>"):
                return text  # the official code returns here, without an end token
        return text.strip() + self.end_string if self.pooling_mode == "eos_token" else text

    def _tokens(self, content: list[int], text_ids: list[int], shortened: bool) -> Tokens:
        room = max(self.max_length - len(self.start_ids) - len(self.end_ids), 0)
        ids = np.array([*self.start_ids, *content[:room], *self.end_ids], dtype=np.int32)
        count = min(len(text_ids), self.max_length)
        # Officially a weighted mean over no text is the zero vector, the other means take the row.
        unweighted = self.skip_instruction and self.pooling_mode == "weighted_mean" and not count
        if not len(ids) or unweighted:
            return Tokens(EMPTY, 0, 0, "empty")
        start = len(ids) - count if self.skip_instruction and 0 < count <= len(ids) else 0
        if self.pooling_mode == "bos_token":
            start = int(np.flatnonzero(ids == self.bos_id)[0])
        truncated = shortened or len(content) > room
        status = "truncated" if truncated else "ok" if count else "empty"
        return Tokens(ids, start, len(ids), status)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        with broken_where(self.directory):
            return [e.ids for e in self.raw.encode_batch_fast(texts, add_special_tokens=False)]

"""Progress of a bulk job: a bar on a terminal, otherwise a JSON line now and then."""

from __future__ import annotations

import json
import sys
import time

from tqdm import tqdm

INTERVAL = 10.0  # seconds between JSON lines


class Progress:
    """Counts documents and tokens as they are computed, input bytes as they are finished.

    total:   bytes of all inputs as stored; None if unknown (standard input): no estimate then
    share:   of the bytes still to do, how much falls to this process
    """

    def __init__(self, total: int | None, shown: bool = True, share: float = 1.0):
        self.total, self.shown, self.share = total, shown, share
        self.documents = self.tokens = 0
        self.passed = 0  # bytes before the place reached, whoever embedded them
        self.done_bytes = self.done_tokens = 0  # of the jobs finished by this run
        self.began = self.told = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self.bar = (
            tqdm(total=None, unit="tok", unit_scale=True, desc="embed") if on_terminal else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, documents: int, tokens: int) -> None:
        """Adds a batch that has just been computed; negative numbers take back one that failed."""
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        if self.bar is not None:
            rate = self.documents / max(now - self.began, 1e-9)
            self.bar.set_postfix_str(f"{rate:.0f} docs/s", refresh=False)
            left = self.tokens_left()
            self.bar.total = None if left is None else self.tokens + left
            self.bar.update(tokens)
        elif self.shown and now - self.told >= INTERVAL:
            self.told = now
            print(json.dumps(self.line(now)), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line beside the progress."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    def pass_by(self, size: int) -> None:
        """`size` bytes of input lie behind the place reached."""
        self.passed += size

    def finished(self, size: int, tokens: int) -> None:
        """A job of this run is stored: `size` bytes of input made `tokens`."""
        self.done_bytes += size
        self.done_tokens += tokens

    def tokens_left(self) -> int | None:
        """Estimated from the tokens per byte so far; None while nothing is known."""
        if self.total is None or not self.done_bytes:
            return None
        bytes_left = max(self.total - self.passed, 0) * self.share
        ahead = max(self.tokens - self.done_tokens, 0)  # computed, not stored, bytes not passed
        return max(int(bytes_left * self.done_tokens / self.done_bytes) - ahead, 0)

    def line(self, now: float) -> dict:
        """What a JSON line tells; `eta_s` only where it can be estimated."""
        seconds = max(now - self.began, 1e-9)
        rate = self.tokens / seconds
        line = {
            "documents": self.documents,
            "tokens": self.tokens,
            "tokens_per_s": round(rate),
            "documents_per_s": round(self.documents / seconds, 1),
        }
        if self.total:
            line["input_share"] = round(min(self.passed / self.total, 1.0), 4)
        left = self.tokens_left()
        if left is not None and rate > 0:
            line["eta_s"] = round(left / rate)
        return line

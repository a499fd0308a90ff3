"""Progress of a bulk job: a bar on a terminal, otherwise a JSON line now and then."""

from __future__ import annotations

import json
import sys
import time

from tqdm import tqdm

INTERVAL = 10.0  # seconds between JSON lines


class Progress:
    """Counts documents and tokens; `total` documents if known."""

    def __init__(self, total: int | None, shown: bool = True):
        self.total, self.shown = total, shown
        self.documents = self.tokens = 0
        self.began = self.told = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="doc", desc="embed") if on_terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, documents: int, tokens: int) -> None:
        """Adds what has just been done."""
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        rate = self.tokens / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            self.bar.update(documents)
        elif self.shown and now - self.told >= INTERVAL:
            self.told = now
            line = {"documents": self.documents, "total": self.total, "tokens": self.tokens}
            print(json.dumps(line | {"tokens_per_s": round(rate)}), file=sys.stderr, flush=True)

"""What a training tells while it runs: a bar on a terminal, JSON lines otherwise."""

from __future__ import annotations

import json
import sys

from tqdm import tqdm


class Progress:
    """The voice of rank 0; other ranks are silent.

    rate: measured matrix products of this device, FLOP/s, 0 if unknown: what speed is a share of
    """

    def __init__(self, shown: bool = True, bar: bool = True, rate: float = 0.0):
        self.shown, self.rate = shown, rate
        self.on_terminal = shown and bar and sys.stderr.isatty()
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info) -> None:
        if self.bar is not None:
            self.bar.close()

    def start(self, done: int, total: int) -> None:
        if self.on_terminal:
            self.bar = tqdm(initial=done, total=total, unit="step", desc="train")

    def step(self, step: int, loss: float, norm: float, rate: float, tokens: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, norm {norm:.2f}, lr {rate:.1e}", False)
            self.bar.update()

    def line(self, line: dict) -> None:
        """A line of the log; on a terminal only what the bar does not show."""
        if not self.shown:
            return
        if self.bar is None:
            print(json.dumps(line), file=sys.stderr, flush=True)
        elif "loss" not in line:
            self.say(", ".join(f"{name} {value:.4g}" for name, value in line.items()))

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)

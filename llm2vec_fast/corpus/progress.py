"""Progress of a bulk job, a bar or a JSON line now and then; and in the end where its time went."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

from tqdm import tqdm

from llm2vec_fast.corpus.pipeline import ALIVE, Pipeline

INTERVAL = 10.0  # seconds between JSON lines
STAGES = {
    "read": "reading",
    "tokenise": "tokenising",
    "forward": "the forward pass",
    "gpu": "the forward pass on the GPU",
    "write": "writing",
}
# A stage that works for this share of a run is its limit: the rest is the first job on its way in
# and the last one on its way out.
LIMIT = 0.9


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
        """Adds a batch that has just been queued for the device (computed, on a CPU)."""
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


@dataclass(frozen=True)
class Stage:
    """seconds and share: of the run, at work; waiting: shares of the run, by what was missing."""

    seconds: float
    share: float
    waiting: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """Where the time of a run went.

    seconds:   of the whole run
    first_job: seconds until the first job was read and tokenised; None if there was none
    stages:    `read` and `tokenise` take turns in one thread, so they wait together. On CUDA
               `forward` is the host's part and `gpu` the time between the places in its stream
               where a job begins and ends: pauses for want of launches count as work.
    queues:    mean and max of the jobs that are `ready` for the forward pass, and `made` by it but
               not being written yet; counted whenever a job came or was asked for
    """

    seconds: float
    first_job: float | None
    jobs: int
    stages: dict[str, Stage]
    queues: dict[str, dict[str, float]]

    @classmethod
    def of(cls, line: Pipeline, seconds: float) -> Profile:
        """Of a pipeline that took `seconds`."""
        spent, stages, seconds = line.clock.seconds, {}, max(seconds, 1e-9)
        for name in STAGES:
            if (name, "") in spent:
                thread = "read" if name == "tokenise" else name
                waiting = {what: s / seconds for (of, what), s in spent.items() if of == thread}
                waiting.pop("", None)
                stages[name] = Stage(spent[name, ""], spent[name, ""] / seconds, waiting)
        queues = {"ready": line.ready, "made": line.made}
        depths = {name: {"mean": q.mean, "max": q.most} for name, q in queues.items()}
        return cls(seconds, line.first_after, line.jobs, stages, depths)

    @property
    def limit(self) -> str:
        """One sentence: which stage the others wait for."""
        if not self.jobs:
            return "nothing was left to do"
        busy = {name: stage.share for name, stage in self.stages.items()}
        # Beside a GPU the host's part tells nothing: it may wait for the device in any call.
        threads = [("read", "tokenise"), ("gpu" if "gpu" in busy else "forward",), ("write",)]
        load, names = max((sum(busy[name] for name in names), names) for names in threads)
        *others, name = sorted(names, key=busy.get)
        told = f"{STAGES[name]} is busy {busy[name]:.0%} of the time"
        for other in others:
            told += f", {load:.0%} with {STAGES[other]} in the same thread"
        if load >= LIMIT:
            return f"{told}: it is the limit"
        few = f"; so few jobs ({self.jobs}) hardly overlap" if self.jobs <= ALIVE else ""
        return f"{told}: no stage is the limit{few}"

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"limit": self.limit}

    def __rich__(self):
        """A table for a terminal: `rich.print(profile)`."""
        from rich.console import Group
        from rich.table import Table

        title = f"{self.jobs} jobs in {self.seconds:.1f} s"
        if self.first_job is not None:
            title += f", the first one ready after {self.first_job:.2f} s"
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("stage", "busy", "s", "s a job", "waiting for"):
            table.add_column(name, justify="left" if name in ("stage", "waiting for") else "right")
        for name, stage in self.stages.items():
            waits = ", ".join(f"{what} {share:.0%}" for what, share in stage.waiting.items())
            each = f"{stage.seconds / max(self.jobs, 1):.3f}"
            table.add_row(name, f"{stage.share:.0%}", f"{stage.seconds:.1f}", each, waits)
        depths = [f"{n} {q['mean']:.1f}, at most {q['max']}" for n, q in self.queues.items()]
        return Group(table, f"jobs in the queues: {'; '.join(depths)}", self.limit)

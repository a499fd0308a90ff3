"""Several models side by side: one table for a person, one JSON file for a program."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.evaluate.models import ModelSpec

SCORERS = ("scipy", "seqeval", "pytrec-eval-terrier")


@dataclass
class Report:
    """The figures of one task.

    task:    sts | word | retrieval
    data:    what was measured on, as JSON
    machine: the machine and its versions, as JSON
    rows:    a model each: {"label", "figures", "seconds", "options", "model"}
    """

    task: str
    data: dict
    machine: dict
    rows: list[dict] = field(default_factory=list)

    def write(self, path: str | Path) -> None:
        """Writes everything as JSON, whole or not at all."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        told = {
            "task": self.task,
            "data": self.data,
            "machine": self.machine | {name: _version(name) for name in SCORERS},
            "utc": now,
            "rows": self.rows,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)

    def show(self, console: Console | None = None) -> None:
        """Prints a table with a row per model and the best value of each figure in bold; counts,
        which belong to the data, stand below it.
        """
        first = self.rows[0]["figures"] if self.rows else {}
        counts = {name: value for name, value in first.items() if isinstance(value, int)}
        names = [name for name in first if name not in counts]
        table = Table(
            title=escape(f"{self.task}: {self.data['name']}"),
            title_justify="left",
            caption=", ".join(f"{name} {value:,}" for name, value in counts.items()),
            caption_justify="left",
        )
        table.add_column("model", overflow="fold")
        for name in [*names, "seconds"]:
            table.add_column(name, justify="right")
        for row in self.rows:
            cells = [self._cell(name, row["figures"][name]) for name in names]
            table.add_row(escape(row["label"]), *cells, f"{row['seconds']:.1f}")
        (console or Console()).print(table)

    def _cell(self, name: str, value: float) -> str:
        best = len(self.rows) > 1 and value == max(row["figures"][name] for row in self.rows)
        return f"[bold]{value:.2f}[/bold]" if best else f"{value:.2f}"


def compare(
    report: Report,
    specs: Sequence[ModelSpec],
    measure: Callable[[LLM2Vec, ModelSpec], dict],
    output: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Loads one model after another and adds its figures to the report.

    measure:  (model, spec) -> figures
    output:   written after every model: what is done is not lost to a model that cannot be loaded
    progress: told the label of each model before it is loaded
    raises:   ValueError for `standardize` where the task has no use for it, and for an output that
              is a directory; OSError if its directory cannot be made
    """
    if output is not None:  # before hours are spent
        if Path(output).is_dir():
            raise ValueError(f"the output {output} is a directory: name a file, such as a .json")
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    if report.task != "sts" and any(spec.standardize for spec in specs):
        raise ValueError("standardize=true is a control of `eval sts` alone: leave it out")
    for spec in specs:
        if progress:
            progress(spec.label)
        model = spec.load(device)
        began = time.perf_counter()
        figures = measure(model, spec)
        row = {"label": spec.label, "figures": figures, "seconds": time.perf_counter() - began}
        options = {"standardize": spec.standardize} if report.task == "sts" else {}
        options |= {"labels": spec.labels} if report.task == "word" else {}
        # By the names that the user gave: a report may be published, a machine's paths not.
        named = {"base": spec.base, "adapters": list(spec.adapter)}
        report.rows.append(row | {"options": options, "model": model.describe() | named})
        del model  # before the next one is loaded
        if output is not None:
            report.write(output)
    return report


def described(*paths: str | Path) -> list[dict]:
    """The files that were measured on, without their directories."""
    return [{"file": Path(path).name, "bytes": Path(path).stat().st_size} for path in paths]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

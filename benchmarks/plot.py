"""Pictures of rows: speed by lengths, operations against their ceilings, growth of a corpus.

    python -m benchmarks.plot --rows benchmarks/results --out benchmarks/results/plots

Needs matplotlib: pip install 'llm2vec-fast[bench]'. Whatever rows a directory holds are drawn;
what was not measured, or failed, is not there. Each picture names machine, versions and rows' file:

- FILE-MODEL.png: tokens/s of every rival, a panel for each set of lengths (rows of bench_encode)
- FILE-operations-DTYPE.png: each operation's share of its ceiling, the copy or the matmul rate of
  the same run; the fastest of our backends and the fastest rival over the shapes (compare.py)
- FILE-WHAT.png: seconds and memory against documents, tokens/s against length (bench_scale)

Ours is blue, others are grey: told apart without colours too, by their names.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import RESULTS, median

try:
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib
except ImportError:
    raise SystemExit("plots need matplotlib: pip install 'llm2vec-fast[bench]'") from None

OURS, OTHERS, LIMIT = "#0072B2", "#999999", "#D55E00"  # Okabe and Ito's colours
BAR, PANEL = 0.21, 0.55  # inches of height
FONT = {"fontsize": 8}
PAPER = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # behind letters


@dataclass
class Measured:
    """A file of rows."""

    name: str
    machine: dict
    utc: str
    rows: list[dict]

    @classmethod
    def read(cls, path: Path) -> Measured | None:
        """None, and a line that says why, for a file that holds no rows."""
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            rows = [row for row in told["rows"] if isinstance(row, dict)]
            return cls(path.stem, dict(told["machine"]), str(told.get("utc", "")), rows)
        except (OSError, ValueError, TypeError, KeyError) as error:
            print(f"{path} left out, it holds no rows: {error!r:.100}")
            return None

    def source(self, device: str) -> str:
        """Where rows come from, for the foot of a picture."""
        chip = self.machine.get("gpu" if device.startswith("cuda") else "cpu", "unknown")
        names = ("torch", "triton", "transformers")
        versions = [f"{n} {self.machine[n]}" for n in names if n in self.machine]
        return f"{chip}; {', '.join(versions)}\n{self.name}.json, {self.utc[:10]}"


class Bar(NamedTuple):
    label: str
    value: float
    low: float
    high: float
    told: str

    @property
    def colour(self) -> str:
        return OURS if self.label.split(": ")[-1].startswith(("ours", "llm2vec_fast")) else OTHERS


class Panel(NamedTuple):
    title: str
    bars: list[Bar]


def speeds(measured: Measured) -> Iterator[tuple[str, Figure]]:
    """A picture for each model, a panel for each set of lengths and dtype."""
    found: dict[str, dict[str, list[Bar]]] = {}
    devices = {}
    for row in measured.rows:
        share = row.get("share_of_matmul", row.get("of_matmul"))
        if not row.get("tokens_per_s") or share is None or "model" not in row:
            continue
        model = row["model"]
        dtype = row.get("dtype", "").replace("fp8", "bfloat16")  # beside what it replaces
        title = f"{row.get('lengths', 'real text')}, {dtype}"
        bars = found.setdefault(model, {}).setdefault(title, [])
        devices[model] = row.get("device", "cpu")
        bars.append(_speed(row, share))
    for model, panels in found.items():
        yield (
            model,
            picture(
                f"{model}: texts to vectors, real tokens a second", "tokens/s",
                [Panel(title, bars) for title, bars in panels.items()],
                measured.source(devices[model]) + "; black: slowest to fastest round",
            ),
        )  # fmt: skip


def _speed(row: dict, share: float) -> Bar:
    name, rate = row.get("rival", row.get("what", "?")), row["tokens_per_s"]
    if row.get("enters") == "text":
        name += ", from text"
    rounds = [row["tokens"] / s for s in row.get("all_seconds", ()) if "tokens" in row] or [rate]
    told = f"{rate:,.0f} ({share:.0%} of matmul)"
    return Bar(name, rate, min(rounds), max(rounds), told)


def operations(measured: Measured) -> Iterator[tuple[str, Figure]]:
    """A picture for each dtype, with a panel for each kind of ceiling."""
    kinds = {"of_copy": "share of the copy rate", "of_matmul": "share of the matmul rate"}
    rows = [row for row in measured.rows if {"op", "backend", "dtype", "shape", "ms"} <= row.keys()]
    device = "cuda" if "cuda" in measured.name else "cpu"
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        panels = [Panel(title, list(_fastest(mine, kind))) for kind, title in kinds.items()]
        panels = [panel for panel in panels if panel.bars]
        if panels:
            foot = "; bars: median of the shapes, black: all of them; of ours and of the others\n"
            title = f"operations on {device} in {dtype}, share of their ceilings"
            foot = measured.source(device) + foot + "the backend that is fastest over the shapes"
            yield f"operations-{dtype}", picture(title, "", panels, foot, limit=1.0)


def _fastest(rows: list[dict], kind: str) -> Iterator[Bar]:
    """For each operation the fastest of our backends and the fastest of the others."""
    shares: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        if row.get(kind):
            ours = row["backend"].startswith("ours")
            of = shares.setdefault((row["op"], row.get("what", ""), not ours), {})
            of.setdefault(row["backend"], []).append(row[kind])
    for (op, what, _), backends in sorted(shares.items()):
        name = max(backends, key=lambda name: median(backends[name]))
        found = backends[name]
        label = f"{op} {what}: {name}".replace("forward+backward", "both ways")
        yield Bar(label, median(found), min(found), max(found), f"{median(found):.0%}")


def picture(
    title: str, axis: str, panels: list[Panel], foot: str, limit: float | None = None
) -> Figure:
    """Horizontal bars, a panel below the other on one scale; `limit` is a line to reach."""
    heights = [len(panel.bars) * BAR + PANEL for panel in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    most = max(bar.high for panel in panels for bar in panel.bars)
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        at = range(len(panel.bars))
        axes.barh(at, [b.value for b in panel.bars], color=[b.colour for b in panel.bars])
        for y, bar in zip(at, panel.bars, strict=True):
            axes.plot([bar.low, bar.high], [y, y], color="black", linewidth=1)
            axes.text(bar.high + most / 100, y, bar.told, va="center", bbox=PAPER, **FONT)
        axes.set_yticks(at, [bar.label for bar in panel.bars], **FONT)
        axes.invert_yaxis()
        if limit is not None:
            axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
        _plain(axes, panel.title)
    rows[0, 0].set_xlim(0, 1.5 * max(most, limit or 0.0))
    if limit is not None:
        rows[-1, 0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        rows[-1, 0].xaxis.set_major_formatter("{x:,.0f}")
    rows[-1, 0].set_xlabel(axis, **FONT)
    figure.supxlabel(foot, fontsize=7, x=0.01, ha="left")
    return figure


def growth(measured: Measured) -> Iterator[tuple[str, Figure]]:
    """Pictures of bench_scale's rows: a point each, and straight lines between them."""
    for row in measured.rows:
        points = [p for p in row.get("points", ()) if isinstance(p, dict)]
        what, curves = str(row.get("what")), []
        if what in ("documents", "shards"):
            steep = row.get("time_exponent")
            told = "" if steep is None else f": seconds grow as {what}^{steep:.2f}"
            curves = [("seconds", True, f"{what}{told}"), ("peak_mb", False, "peak memory, MB")]
        elif what == "lengths":
            curves = [("tokens_per_s", False, "tokens/s by tokens of a text")]
            what = "length"
        panels = [c for c in curves if any(c[0] in p and what in p for p in points)]
        if not panels:
            continue
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axes, (key, logarithmic, title) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _curves(axes, [p for p in points if key in p and what in p], what, key)
            axes.set_xscale("log", base=2 if what == "length" else 10)
            if logarithmic:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.1 * max(p[key] for p in points if key in p))
            _plain(axes, title)
        origin = Measured(measured.name, row.get("machine", measured.machine),
                          row.get("utc", measured.utc), [])  # fmt: skip
        figure.supxlabel(origin.source("cpu"), fontsize=7, x=0.01, ha="left")
        yield str(row["what"]), figure


def _curves(axes, points: list[dict], x: str, y: str) -> None:
    names = list(dict.fromkeys(p.get("model", "") for p in points))
    for name, marker, colour in zip(names, "osv^", (OURS, LIMIT, "#009E73", "black"), strict=False):
        mine = [p for p in points if p.get("model", "") == name]
        axes.plot([p[x] for p in mine], [p[y] for p in mine], marker=marker, color=colour,
                  label=name)  # fmt: skip
    axes.set_xlabel(x, **FONT)
    axes.set_ylabel(y.replace("_per_s", "/s").replace("peak_mb", "MB"), **FONT)
    if len(names) > 1:
        axes.legend(**FONT)


def _plain(axes, title: str) -> None:
    axes.set_title(title, loc="left", **FONT)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(files: Iterable[Path], out: Path) -> list[Path]:
    """Writes every picture that the files have rows for; returns their paths."""
    made = []
    for measured in filter(None, map(Measured.read, files)):
        for pictures in (speeds, operations, growth):
            for name, figure in pictures(measured):
                out.mkdir(parents=True, exist_ok=True)
                name = re.sub(r"[^A-Za-z0-9._]+", "-", f"{measured.name}-{name}")
                made.append(out / f"{name}.png")
                full = io.BytesIO()
                figure.savefig(full, dpi=100)
                few = Image.open(full).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
                few.save(made[-1], optimize=True)  # a third of the bytes
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS, help="directory of JSON rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "plots")
    args = parser.parse_args()
    made = draw(sorted(args.rows.glob("*.json")), args.out)
    if not made:
        raise SystemExit(f"nothing to draw: {args.rows} has no rows of bench_encode, bench_scale "
                         "or an operation; measure first")  # fmt: skip
    for path in made:
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()

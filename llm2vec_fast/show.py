"""Tables for a person at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm2vec_fast.corpus.search import Hit


def show_hits(query: str, hits: Sequence[Hit]) -> None:
    """A table of answers: cosine, id, and the kept columns cut to one line."""
    table = Table(title=escape(query), title_justify="left", title_style="bold", expand=True)
    table.add_column("cosine", justify="right", width=6)
    table.add_column("id", ratio=2, overflow="fold")
    kept = list(hits[0].kept) if hits else []
    for name in kept:
        table.add_column(name, ratio=3, overflow="ellipsis", no_wrap=True)
    for hit in hits:
        cells = [" ".join(str(hit.kept[name] or "").split()) for name in kept]
        table.add_row(f"{hit.score:.3f}", escape(hit.id), *map(escape, cells))
    Console().print(table)

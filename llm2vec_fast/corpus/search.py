"""Exact search over the shards of a finished job, by cosine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_fast.corpus.plan import ManifestError, read_manifest
from llm2vec_fast.corpus.store import read_shard, vectors_of
from llm2vec_fast.encoder import LLM2Vec


@dataclass(frozen=True)
class Hit:
    """One answer: its cosine, its id, and the columns that were kept."""

    score: float
    id: str
    kept: dict[str, str | None]


def search(
    directory: str | Path,
    queries: str | Sequence[str],
    *,
    k: int = 10,
    instruction: str | None = None,
    model: LLM2Vec | None = None,
    device: str | None = None,
) -> list[list[Hit]]:
    """The k nearest documents of each query, best first.

    directory:   the output of `embed`; queries are encoded with the model its manifest names
    instruction: put before every query (documents keep what they were embedded with)
    model:       that model, if it is loaded already
    raises:      ManifestError if the model is not, or no longer, the one that made the vectors
    """
    directory = Path(directory)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    manifest = read_manifest(directory)
    model = model or _load(manifest["model"], device)
    now, then = model.describe(), manifest["model"]
    for what in ("fingerprint", "settings"):
        if now[what] != then[what]:
            raise ManifestError(
                f"the model is not the one that made {directory}: its {what} is {now[what]}, was "
                f"{then[what]}. Embed again, or search with the old model."
            )
    queries = [queries] if isinstance(queries, str) else list(queries)
    form = manifest["vectors"]
    query_QD = model.encode(
        queries, convert_to_numpy=True, instruction=instruction, truncate_dim=form["dimension"]
    )
    query_QD = _unit(query_QD)
    keep = manifest["columns"]["keep"]
    best: list[list[Hit]] = [[] for _ in queries]
    for path in sorted(directory.glob("part-*.parquet")):
        table = read_shard(path, ["id", *keep, "embedding"])
        vectors = vectors_of(table, form["precision"], form["dimension"])
        present = np.flatnonzero(np.abs(vectors).max(axis=1) > 0)
        score_QN = query_QD @ _unit(vectors[present]).T
        for q, scores in enumerate(score_QN):
            top = np.argpartition(-scores, min(k, len(scores)) - 1)[:k] if len(scores) else []
            hits = [_hit(table, int(present[n]), float(scores[n]), keep) for n in top]
            best[q] = sorted(best[q] + hits, key=lambda hit: -hit.score)[:k]
    return best


def _load(told: dict, device: str | None) -> LLM2Vec:
    return LLM2Vec.from_pretrained(
        told["base"], told["adapters"], dtype=told["dtype"], device=device, **told["settings"]
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def _hit(table, row: int, score: float, keep: list[str]) -> Hit:
    kept = {name: table.column(name)[row].as_py() for name in keep}
    return Hit(score, table.column("id")[row].as_py(), kept)

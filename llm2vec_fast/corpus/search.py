"""Exact search over the shards of a finished job, by cosine: a block of vectors at a time.

Shapes: Q queries, N rows of a block, D dimensions, W bytes of a binary vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from llm2vec_fast.corpus.place import place_of
from llm2vec_fast.corpus.plan import MODEL_PARTS, ManifestError, read_manifest, require_parts
from llm2vec_fast.corpus.store import BLOCK, blocks_of, rows_at
from llm2vec_fast.encoder import LLM2Vec

NO_VECTOR = pa.array(["error", "empty"])
# Binary: so many candidates by Hamming distance for each answer, and at least so many in all.
CANDIDATES, LEAST_CANDIDATES = 10, 100
ROW_BITS = 40  # a row's key is its shard's number and, in the lower bits, its number in it


@dataclass(frozen=True)
class Hit:
    """One answer: its cosine, its id, and the columns that were kept."""

    score: float
    id: str
    kept: dict[str, str | None]


def search(
    directory: str | Path,
    queries: str | Sequence[str] | np.ndarray | Tensor,
    *,
    k: int = 10,
    instruction: str | None = None,
    model: LLM2Vec | None = None,
    device: str | None = None,
) -> list[list[Hit]]:
    """The k nearest documents of each query, best first; equals in the order of their rows.

    directory:   the output of `embed`; queries are encoded with the model its manifest names
    queries:     a text, texts, or (Q, D) vectors of that model, which then is not loaded
    instruction: put before every query (documents keep what they were embedded with)
    model:       that model, if it is loaded already
    returns:     a list of at most k hits for each query; documents without a vector never appear
    raises:      ManifestError if the model is not, or no longer, the one that made the vectors;
                 ShardError (an OSError) naming a shard that is damaged

    Vectors of binary precision: candidates by Hamming distance, 10 k and at least 100, then the
    cosine of the query's own vector with the document's signs.
    """
    directory = place_of(directory)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    manifest = read_manifest(directory)
    form = manifest["vectors"]
    if isinstance(queries, np.ndarray | Tensor):
        query_QD = _given(queries, form["dimension"], instruction)
    else:
        require_parts(directory, manifest, MODEL_PARTS)
        model = model or _load(manifest["model"], device)
        query_QD = _encoded(directory, manifest, queries, model, instruction)
    place = torch.device(device or "cpu") if model is None else model.device
    shards = sorted(directory.glob("part-*.parquet"))
    best = Best(len(query_QD), k)
    if len(query_QD) and form["precision"] == "binary":
        best = _scan_binary(shards, _unit(query_QD), k)
    elif len(query_QD):
        _scan(shards, torch.from_numpy(_unit(query_QD)).to(place), best)
    return _hits(shards, best, manifest["columns"]["keep"])


def hits_as_json(query: str, hits: Sequence[Hit]) -> str:
    """One line of JSON: {"query": ..., "hits": [{"score": ..., "id": ..., "kept": {...}}]}."""
    rows = [{"score": hit.score, "id": hit.id, "kept": hit.kept} for hit in hits]
    return json.dumps({"query": query, "hits": rows}, ensure_ascii=False, default=str)


def _given(queries: np.ndarray | Tensor, dimension: int, instruction: str | None) -> np.ndarray:
    if instruction is not None:
        raise ValueError("an instruction belongs to texts, but the queries are vectors already")
    if isinstance(queries, Tensor):
        queries = queries.detach().float().cpu().numpy()
    query_QD = np.atleast_2d(queries).astype(np.float32)
    if query_QD.ndim != 2 or query_QD.shape[1] != dimension:
        raise ValueError(
            f"queries have shape {queries.shape}, expected (Q, {dimension}): the vectors there "
            f"have {dimension} dimensions (encode with truncate_dim={dimension})"
        )
    if not np.isfinite(query_QD).all():
        raise ValueError("queries hold NaN or infinity")
    return query_QD


def _encoded(directory, manifest, queries, model: LLM2Vec, instruction) -> np.ndarray:
    """Texts as vectors, once it is certain that the model is the one that made the documents'."""
    now, then = model.describe(), manifest["model"]
    for what in ("fingerprint", "settings"):
        if now[what] != then[what]:
            raise ManifestError(
                f"the model is not the one that made {directory}: its {what} is {now[what]}, was "
                f"{then[what]}. Embed again, or search with the old model."
            )
    queries = [queries] if isinstance(queries, str) else list(queries)
    return model.encode(
        queries,
        convert_to_numpy=True,
        instruction=instruction,
        truncate_dim=manifest["vectors"]["dimension"],
    )


def _load(told: dict, device: str | None) -> LLM2Vec:
    return LLM2Vec.from_pretrained(
        told["base"], told["adapters"], dtype=told["dtype"], device=device, **told["settings"]
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


class Best:
    """The best `size` rows of each query so far, as flat arrays sorted by query, score, key."""

    def __init__(self, queries: int, size: int):
        self.queries, self.size = queries, size
        self.query = np.zeros(0, dtype=np.int64)
        self.score = np.zeros(0, dtype=np.float32)
        self.key = np.zeros(0, dtype=np.int64)
        self.worst = np.full(queries, -np.inf, dtype=np.float32)  # what a new row has to beat

    def add(self, score_QN: Tensor, first_key: int) -> None:
        """Takes a block's scores; -inf is no answer. Blocks come in the order of their keys."""
        worst = torch.from_numpy(self.worst).to(score_QN.device)
        better = score_QN > worst[:, None]  # an equal row came earlier and stays
        crowded = better.sum(dim=1) > self.size
        if crowded.any():
            # Everything as good as the block's own k-th, ties too: the order of keys decides.
            least = score_QN[crowded].topk(self.size, dim=1).values[:, -1:]
            better[crowded] &= score_QN[crowded] >= least
        query, row = better.nonzero(as_tuple=True)
        if len(query):
            score = score_QN[query, row].cpu().numpy()
            self._merge(query.cpu().numpy(), score, row.cpu().numpy() + first_key)

    def _merge(self, query: np.ndarray, score: np.ndarray, key: np.ndarray) -> None:
        query = np.concatenate([self.query, query])
        score, key = np.concatenate([self.score, score]), np.concatenate([self.key, key])
        order = np.lexsort((key, -score, query))
        count = np.bincount(query, minlength=self.queries)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        order = order[rank < self.size]
        self.query, self.score, self.key = query[order], score[order], key[order]
        count = np.bincount(self.query, minlength=self.queries)
        full = count == self.size
        self.worst[full] = self.score[(np.cumsum(count) - 1)[full]]


def _blocks(shards: Sequence[Path]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(key of the first row, vectors as stored, which rows have one) of all blocks, in order."""
    for number, path in enumerate(shards):
        for block in blocks_of(path, BLOCK):
            there_N = ~pc.is_in(block.status, NO_VECTOR).to_numpy(zero_copy_only=False)
            yield (number << ROW_BITS) + block.first, block.vectors, there_N


def _scan(shards: Sequence[Path], query_QD: Tensor, best: Best) -> None:
    """float32, float16 and int8: one product of all queries with each block, in fp32.

    The block is always of one shape, behind a short one stands what was there before: a product of
    another shape may add in another order, and equal documents would then differ in the last bit.
    The scale of int8 falls out of the cosine.
    """
    block_ND = torch.zeros(BLOCK, query_QD.shape[1], device=query_QD.device)
    for first_key, stored, there_N in _blocks(shards):
        count = len(stored)
        block_ND[:count].copy_(torch.from_numpy(stored))
        norm_N = torch.linalg.vector_norm(block_ND, dim=1)[:count]
        there = torch.from_numpy(there_N).to(norm_N.device) & (norm_N > 0) & norm_N.isfinite()
        score_QN = (query_QD @ block_ND.T)[:, :count] / norm_N
        best.add(score_QN.masked_fill_(~there, -torch.inf), first_key)


def _scan_binary(shards: Sequence[Path], query_QD: np.ndarray, k: int) -> Best:
    """Candidates by Hamming distance, then by the cosine of the query with signs of +-1."""
    best = Best(len(query_QD), max(k * CANDIDATES, LEAST_CANDIDATES))
    query_QW = np.packbits(query_QD > 0, axis=1)
    signs: dict[int, np.ndarray] = {}  # of candidates: their bytes need no second reading
    for first_key, stored_NW, there_N in _blocks(shards):
        score_QN = np.empty((len(query_QD), len(stored_NW)), dtype=np.float32)
        for q, query_W in enumerate(query_QW):
            score_QN[q] = -np.bitwise_count(stored_NW ^ query_W).sum(axis=1, dtype=np.int32)
        score_QN[:, ~there_N] = -np.inf
        best.add(torch.from_numpy(score_QN), first_key)
        for key in np.unique(best.key[best.key >= first_key]).tolist():
            signs[key] = stored_NW[key - first_key].copy()
        if len(signs) > 2 * len(best.key):
            signs = {key: signs[key] for key in best.key.tolist()}
    return _rescored(best, query_QD, signs, k)


def _rescored(best: Best, query_QD: np.ndarray, signs: dict[int, np.ndarray], k: int) -> Best:
    final, dimension = Best(len(query_QD), k), query_QD.shape[1]
    for q in range(len(query_QD)):
        key = best.key[best.query == q]
        if len(key):
            bits = np.unpackbits(np.stack([signs[at] for at in key.tolist()]), axis=1)
            unit = (bits[:, :dimension].astype(np.float32) * 2 - 1) / np.float32(dimension**0.5)
            # A sum for each row by itself: equal rows get equal scores.
            final._merge(np.full(len(key), q), (unit * query_QD[q]).sum(axis=1), key)
    return final


def _hits(shards: Sequence[Path], best: Best, keep: list[str]) -> list[list[Hit]]:
    """The ids and kept columns of the winners alone."""
    shard, row = best.key >> ROW_BITS, best.key & ((1 << ROW_BITS) - 1)
    records = {
        number: rows_at(shards[number], row[shard == number], ["id", *keep])
        for number in np.unique(shard).tolist()
    }
    answers: list[list[Hit]] = [[] for _ in range(best.queries)]
    for q, score, s, r in zip(best.query, best.score, shard, row, strict=True):
        found = records[int(s)][int(r)]
        answers[q].append(Hit(float(score), found["id"], {name: found[name] for name in keep}))
    return answers

"""Contrastive loss with in-batch negatives, forward and backward together.

    python -m benchmarks.bench_info_nce

Rivals: the formula of sentence-transformers' MultipleNegativesRankingLoss (the whole matrix), eager
and compiled, and the same formula over checkpointed chunks of rows as GradCache users write it.
The limit is work: three products of 2*B*N*D (logits, gradient of queries, gradient of docs).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.compare import Case, both, forward, importable, main, of_backends
from llm2vec_fast.ops.info_nce import info_nce

SCALE = 20.0


def eager(query, docs, symmetric=False):
    logits = SCALE * F.normalize(query, dim=1) @ F.normalize(docs, dim=1).t()
    answer = torch.arange(len(query), device=query.device)
    loss = F.cross_entropy(logits.float(), answer)
    if symmetric:
        loss = (loss + F.cross_entropy(logits[:, : len(query)].t().float(), answer)) / 2
    return loss


def chunked(query, docs, rows=4096):
    """One way only: a column's sum needs all chunks."""
    docs = F.normalize(docs, dim=1)
    answer = torch.arange(len(query), device=query.device)

    def part(query, docs, answer):
        logits = SCALE * F.normalize(query, dim=1) @ docs.t()
        return F.cross_entropy(logits.float(), answer, reduction="sum")

    pairs = zip(query.split(rows), answer.split(rows), strict=True)
    losses = [checkpoint(part, q, docs, a, use_reentrant=False) for q, a in pairs]
    return torch.stack(losses).sum() / len(query)


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        yield _case(device, 256, 256, 576, torch.float32)
        yield _case(device, 256, 512, 576, torch.float32, symmetric=True)
        return
    # B = 65,536 first: the headline must not be what the time runs out on.
    for B in (65_536, 16_384, 4_096):
        yield _case(device, B, B, 4096, torch.bfloat16)
    yield _case(device, 16_384, 32_768, 4096, torch.bfloat16)
    yield _case(device, 16_384, 16_384, 4096, torch.bfloat16, symmetric=True)
    yield _case(device, 32_768, 32_768, 4096, torch.bfloat16, symmetric=True)
    yield _case(device, 16_384, 16_384, 4096, torch.float32)  # what ops.pool gives
    yield _case(device, 16_384, 16_384, 4096, torch.bfloat16, keys=True)


def variants() -> Iterator[Case]:
    for dtype in (torch.float16, torch.float32):
        yield _case("meta", 37, 53, 252, dtype, symmetric=True, keys=True)
        yield _case("meta", 4096, 4096, 2056, dtype, keys=True)
    yield _case("meta", 65_536, 131_072, 4096, torch.bfloat16, symmetric=True, keys=True)
    for symmetric in (False, True):
        yield _case("meta", 4096, 8192, 4096, torch.bfloat16, symmetric, timed=forward)


def _case(device, B, N, D, dtype, symmetric=False, keys=False, timed=both) -> Case:
    def make():
        query = torch.randn(B, D, device=device, dtype=dtype)
        docs = torch.randn(N, D, device=device, dtype=dtype)
        docs[:B] += query  # answers resemble their queries
        given = (query.requires_grad_(), docs.requires_grad_())
        return (*given, torch.randint(0, N, (N,), device=device)) if keys else given

    def ours(query, docs, doc_keys=None):
        return info_nce(query, docs, SCALE, symmetric, doc_keys=doc_keys)

    # A GPU multiplies in fp16, also where inputs are fp32: shares are of that rate.
    multiplied = torch.float16 if device == "cuda" and dtype == torch.float32 else dtype
    rivals = of_backends("info_nce", ours, device, dtype)
    if device == "cuda":
        rivals.pop("ours reference", None)  # fp32 on no tensor core: seconds a call, and no rival
    if not keys:
        whole = partial(eager, symmetric=symmetric)
        rivals |= {"eager": whole}
        if not symmetric:
            rivals |= {"chunked eager": chunked}
        if device == "cuda":
            rivals |= importable(compile=lambda: torch.compile(whole, dynamic=False))
    kind = " symmetric" * symmetric + " keys" * keys
    what = "forward" if timed is forward else "forward+backward"
    return Case(
        "info_nce", what, f"B={B} N={N} D={D}{kind}", multiplied, make,
        {name: timed(run) for name, run in rivals.items()},
        flop=(1 if timed is forward else 3) * 2 * B * N * D,
        notes={"inputs": str(dtype).removeprefix("torch.")},
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_info_nce", cases)

"""Pooling: forward and backward against a loop over texts, segment_reduce, padded and nested means.

    python -m benchmarks.bench_pool

The limit is traffic: forward reads every token once and writes B fp32 vectors, backward reads those
and writes every token. The loop is what the official library does, the masked mean over a padded
batch what sentence-transformers does (here without a single token of padding, its best case).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.compare import Case, backward, forward, main, of_backends
from llm2vec_fast import ops


def segments(hidden, spans, mode, normalize):
    assert mode == "mean" and not normalize
    return torch.segment_reduce(hidden.float(), "mean", lengths=(spans[:, 1] - spans[:, 0]).long())


def padded(hidden, spans, mode, normalize):
    assert mode == "mean" and not normalize
    hidden = hidden.unflatten(0, (len(spans), -1))
    mask = torch.ones(hidden.shape[:2], device=hidden.device)[..., None].expand(hidden.shape)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def nested(hidden, spans, mode, normalize):
    assert mode == "mean" and not normalize
    offsets = torch.cat([spans[:1, 0], spans[:, 1]]).long()
    return torch.nested.nested_tensor_from_jagged(hidden, offsets).mean(dim=1)


def lengths_of(kind: str, texts: int) -> list[int]:
    if kind == "log-normal":  # median 120, p99 2k, sorted as the engine sorts them
        quantiles = (torch.arange(texts, dtype=torch.float64) + 0.5) / texts
        normal = torch.special.ndtri(quantiles)
        return (120 * torch.exp(1.21 * normal)).long().clamp(1, 8192).tolist()
    return [int(kind)] * texts


def cases(device: str) -> Iterator[Case]:
    sizes = [
        ("512", 32, 4096), ("512", 128, 4096), ("32", 512, 4096), ("log-normal", 64, 4096),
        ("8192", 1, 4096), ("512", 128, 576),
    ]  # fmt: skip
    for kind, texts, width in [("64", 8, 576)] if device == "cpu" else sizes:
        for what in ("forward", "backward"):
            yield _case(device, what, kind, texts, width, "mean", False)
    if device != "cpu":
        yield _case(device, "forward", "512", 128, 4096, "weighted_mean", True)
        yield _case(device, "backward", "512", 128, 4096, "weighted_mean", True)
        yield _case(device, "forward", "512", 128, 4096, "last", True)


def variants() -> Iterator[Case]:
    for dtype in (torch.float16, torch.float32):
        yield _case("meta", "backward", "8192", 1, 4096, "weighted_mean", True, dtype)
        yield _case("meta", "backward", "37", 252, 507, "mean", True, dtype)
    yield _case("meta", "backward", "512", 128, 4096, "first", False)


def _case(device, what, kind, texts, width, mode, normalize, dtype=None) -> Case:
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    lengths = lengths_of(kind, texts)
    ends = torch.tensor(lengths).cumsum(0)
    tokens = sum(lengths)

    def make():
        hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
        spans = torch.stack([ends - torch.tensor(lengths), ends], 1).int().to(device)
        return hidden, spans, mode, normalize

    rivals = of_backends("pool", ops.pool, device, dtype) | {"loop": ops.pool_ref}
    if mode == "mean" and not normalize:
        rivals |= {"segment_reduce": segments, "nested": nested}
        rivals |= {"padded": padded} if kind != "log-normal" else {}
    timed = {"forward": forward, "backward": backward}[what]
    form = f"T={tokens} B={texts} D={width}" + f" {mode}" + " L2" * normalize
    return Case(
        "pool", what, form, dtype, make, {name: timed(run) for name, run in rivals.items()},
        bytes=tokens * width * dtype.itemsize + 4 * texts * width,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_pool", cases)

"""Attention over packed texts: forward and backward against torch's and Tri Dao's kernels.

    python -m benchmarks.bench_attention

The limit is work: 4 L^2 H FLOP a head and text forward (half of it when causal), 2.5 times that
backward; a backward without atomics (ours triton) needs 3.5 times and is counted as 2.5. `sdpa
dense` sees the same texts as one dense batch, which only equal lengths allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, backward, forward, main, of_backends
from llm2vec_fast import ops
from llm2vec_fast.ops.attention import attention

# (N, K, H): Mistral-7B and Llama-3 8B, Sheared-LLaMA-1.3B, SmolLM2-135M
HEADS = [(32, 8, 128), (16, 16, 128), (9, 3, 64)]


def skewed(tokens: int, seed: int = 0) -> list[int]:
    """Log-normal lengths, median 120, 99th percentile 2k, sorted as the packer sorts them."""
    noise, lengths = torch.Generator().manual_seed(seed), []
    while sum(lengths) < tokens:
        log = 4.79 + 1.21 * torch.randn((), generator=noise).item()
        lengths.append(min(max(round(2.718281828**log), 4), tokens - sum(lengths)))
    return sorted(lengths)


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        for what in ("forward", "backward"):
            yield _case(device, what, "4x64", [64] * 4, (9, 3, 64), torch.float32)
        return
    sizes = {"32x512": [512] * 32, "8x2048": [2048] * 8, "log-normal": skewed(16_384)}
    for heads, (name, lengths), causal in itertools.product(HEADS, sizes.items(), (False, True)):
        for what in ("forward", "backward"):
            yield _case(device, what, name, lengths, heads, torch.bfloat16, causal=causal)
    for what in ("forward", "backward"):
        yield _case(device, what, "32x512", [512] * 32, HEADS[0], torch.bfloat16, dropout_p=0.3)


def variants() -> Iterator[Case]:
    """What is compiled for absent GPUs but not measured."""
    masks = [{}, {"causal": True}, {"window": 128}, {"causal": True, "window": 128}]
    masks += [{"dropout_p": 0.3}, {"causal": True, "dropout_p": 0.3}]
    some = itertools.product((80, 96, 256), [{}, {"causal": True, "window": 128}])
    for size, options in [*itertools.product((64, 128), masks), *some]:
        yield _case("meta", "backward", "2x300", [300] * 2, (4, 2, size), torch.bfloat16, **options)
    for dtype, size in itertools.product((torch.float16, torch.float32), (64, 128, 256)):
        yield _case("meta", "backward", "2x300", [300] * 2, (4, 2, size), dtype)
    yield _case("meta", "forward", "8x40", [40] * 8, HEADS[0], torch.bfloat16)  # short texts


def _case(
    device, what, name, lengths, heads, dtype, *, causal=False, window=None, dropout_p=0.0
) -> Case:
    (N, K, H), tokens = heads, sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)

    def make():
        packed = torch.randn(tokens, N + 2 * K, H, device=device, dtype=dtype)
        return tuple(x.requires_grad_() for x in packed.detach().split([N, K, K], dim=1))

    def ours(q, k, v):
        return attention(
            q, k, v, cu_seqlens, max(lengths),
            causal=causal, window=window, dropout_p=dropout_p, seed=1,
        )  # fmt: skip

    def dense(q, k, v):
        q, k, v = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout_p, enable_gqa=True
        )

    rivals = of_backends("attention", ours, device, dtype)
    if device == "cuda":
        rivals = _that_serve(rivals, ours, dropout_p, tokens)
    if device != "meta" and len(set(lengths)) == 1 and window is None:
        rivals |= {"sdpa dense": dense}
    timed, factor = (forward, 1) if what == "forward" else (backward, 2.5)
    flop = sum(4 * length**2 * H * N for length in lengths) * factor / (2 if causal else 1)
    options = f" causal={causal:d}" + (f" dropout={dropout_p}" if dropout_p else "")
    options += f" window={window}" if window else ""
    return Case(
        "attention", what, f"{name} {N}/{K}x{H}{options}", dtype, make,
        {rival: timed(run) for rival, run in rivals.items()}, flop=flop,
    )  # fmt: skip


def _that_serve(rivals: dict, ours, dropout_p: float, tokens: int) -> dict:
    """Without those that cannot run such a case; the reference only where it ends in time."""
    absent = {"ours varlen"} if dropout_p else set()
    if tokens > 2048:
        absent |= {"ours reference"}
    rivals = {name: run for name, run in rivals.items() if name not in absent}
    if dropout_p:  # not listed by of_backends, which asks without dropout

        def flash_dropout(*inputs):
            with ops.use("flash_dropout", "attention"):
                return ours(*inputs)

        rivals["ours flash_dropout"] = flash_dropout
    return rivals


if __name__ == "__main__":
    main("bench_attention", cases)

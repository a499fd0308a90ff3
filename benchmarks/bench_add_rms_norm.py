"""Residual add and RMSNorm: forward and backward against eager torch, torch.compile, Liger, others.

    python -m benchmarks.bench_add_rms_norm

The limit is traffic. Forward reads x and the residual, writes y and r; backward reads dy, dr and r,
writes one dx for both: four times (T, D) either way. The norm of query or key heads reads one and
writes one, backward reads two and writes one. LoRA freezes the weight: then there is no dweight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, backward, forward, importable, main, of_backends
from llm2vec_fast.ops.add_rms_norm import add_rms_norm

EPS = 1e-5


def eager(x, residual, weight, eps=EPS):
    """As Hugging Face's LlamaDecoderLayer and LlamaRMSNorm."""
    r = x if residual is None else x + residual
    wide = r.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(r.dtype), r


def torch_rms_norm(x, residual, weight, eps=EPS):
    r = x if residual is None else x + residual
    return F.rms_norm(r, weight.shape, weight, eps), r


def _compiled():
    torch._dynamo.reset()  # after 8 shapes of one function it would quietly stay eager
    return torch.compile(eager, dynamic=False)


def _liger():
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x, residual, weight, eps=EPS):
        # Not in place: it would write into the gradients that the next repetition needs.
        if residual is None:
            return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False), x
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    return run


def _flash_attn():
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, residual, weight, eps=EPS: rms_norm_fn(
        x, weight, None, residual=residual, eps=eps, prenorm=True
    )


def ours(x, residual, weight, eps=EPS):
    return add_rms_norm(x, residual, weight, eps)


def _rivals(device: str, dtype: torch.dtype) -> dict:
    rivals = of_backends("add_rms_norm", ours, device, dtype)
    rivals |= {"eager": eager, "F.rms_norm": torch_rms_norm}
    if device == "cuda":
        rivals |= importable(
            compile=_compiled,
            liger=_liger,
            flash_attn=_flash_attn,
        )
    return rivals


def cases(device: str) -> Iterator[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # (tokens, D): Mistral-7B and Llama-3 8B, Sheared-LLaMA-1.3B, SmolLM2-135M
    sizes = [(16_384, 4_096), (32_768, 2_048), (65_536, 576)]
    for tokens, width in [(256, 576)] if device == "cpu" else sizes:
        yield _case("forward", tokens, width, dtype, device)
        yield _case("backward, frozen", tokens, width, dtype, device, trained=False)
        yield _case("backward", tokens, width, dtype, device)
    # (tokens, query heads, kv heads, H): Qwen3-8B
    tokens, heads = (64, (4, 2, 64)) if device == "cpu" else (16_384, (32, 8, 128))
    yield _heads_case("forward", tokens, *heads, dtype, device)
    yield _heads_case("backward, frozen", tokens, *heads, dtype, device, trained=False)
    yield _heads_case("backward", tokens, *heads, dtype, device)


def variants() -> Iterator[Case]:
    """Compiled only: other widths, dtypes and head dimensions."""
    half, single = torch.float16, torch.float32
    bf16 = torch.bfloat16
    widths = [(37, bf16), (1_024, bf16), (3_072, bf16), (8_192, bf16), (16_384, bf16)]
    for width, dtype in [*widths, (4_096, half), (4_096, single), (8_192, single)]:
        for what, trained in [("forward", True), ("backward, frozen", False), ("backward", True)]:
            yield _case(what, 512, width, dtype, "meta", trained)
            yield _case(what, 512, width, dtype, "meta", trained, weight_dtype=single)
    for head_dim in (64, 80, 96, 128, 256):
        for what, trained in [("forward", True), ("backward, frozen", False), ("backward", True)]:
            yield _heads_case(what, 512, 16, 8, head_dim, bf16, "meta", trained)


def _case(what, tokens, width, dtype, device, trained=True, weight_dtype=None) -> Case:
    def make():
        def drawn():
            return torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)

        weight = torch.randn(width, device=device, dtype=weight_dtype or dtype)
        return drawn(), drawn(), weight.requires_grad_(trained)

    timed = forward if what == "forward" else backward
    return Case(
        "add_rms_norm", what, f"T={tokens} D={width}", dtype, make,
        {name: timed(run) for name, run in _rivals(device, dtype).items()},
        bytes=4 * tokens * width * dtype.itemsize,
    )  # fmt: skip


def _heads_case(what, tokens, heads, kv_heads, width, dtype, device, trained=True) -> Case:
    """The norm of the query heads, read where they lie in the fused projection."""

    def make():
        qkv = torch.randn(tokens, heads + 2 * kv_heads, width, device=device, dtype=dtype)
        weight = torch.randn(width, device=device, dtype=dtype)
        return qkv[:, :heads].requires_grad_(), weight.requires_grad_(trained)

    def alone(run):
        return lambda x, weight: run(x, None, weight)[0]

    timed = forward if what == "forward" else backward
    return Case(
        "add_rms_norm", what, f"T={tokens} N={heads} H={width}", dtype, make,
        {name: timed(alone(run)) for name, run in _rivals(device, dtype).items()},
        bytes=(2 if what == "forward" else 3) * tokens * heads * width * dtype.itemsize,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_add_rms_norm", cases)

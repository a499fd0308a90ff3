"""The gated activation of LLaMA's feed-forward layer, and how gate and up lie.

T tokens, F feed-forward, D model
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops.backend import choose, kernels


def unpack_gate_up(gate_up_T2F: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Views of gate and up in a fused projection, its weight or its bias: gate first, then up."""
    gate, up = gate_up_T2F.chunk(2, dim)
    return gate, up


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up.

    gate_up_T2F:  (..., 2F), laid out as `unpack_gate_up` reads it
    returns:      (..., F) in the same dtype, computed in fp32
    raises:       ValueError if the last dimension is odd
    source:       Shazeer 2020, arXiv:2002.05202
    """
    if gate_up_T2F.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension must be even, got {tuple(gate_up_T2F.shape)}")
    backend = choose("swiglu", gate_up_T2F)
    if backend in ("triton", "eager"):
        run = kernels("swiglu", backend)
        if not torch.is_grad_enabled():  # a node costs microseconds even where nobody needs it
            return run.forward(gate_up_T2F)
        return _SwiGLU.apply(gate_up_T2F, run)
    if backend in ("cuda", "cpu"):
        return kernels("swiglu", backend).swiglu(gate_up_T2F)
    return swiglu_ref(gate_up_T2F)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F, run):
        ctx.save_for_backward(gate_up_T2F)
        ctx.run = run
        return run.forward(gate_up_T2F)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TF):
        return ctx.run.backward(dy_TF, *ctx.saved_tensors), None


def swiglu_ref(gate_up_T2F):
    gate_TF, up_TF = unpack_gate_up(gate_up_T2F)
    acc = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    return F.silu(gate_TF.to(acc)).mul_(up_TF.to(acc)).to(gate_up_T2F.dtype)

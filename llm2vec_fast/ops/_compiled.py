"""Operations as single nodes of a torch.compile graph.

Eager code never comes here: it calls kernels directly, which is several times cheaper. What
Inductor fuses well by itself (norm, rope, SwiGLU, linear layers) is traced through its plain-torch
reference; what it cannot see into (loops over texts, kernels that never form the logits) is an
operator of the library `llm2vec_fast`. Its backward runs the forward once more, with autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("llm2vec_fast", "FRAGMENT")


def registered(name: str, schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]):
    """Makes `run` the operator torch.ops.llm2vec_fast.<name>, differentiable in every floating
    tensor; returns the function to call under torch.compile.

    schema: its arguments and result as torch writes them, "(Tensor x, int n) -> Tensor"
    fake:   gives an empty result of the right shape, dtype and device
    """
    arguments = schema.partition("(")[2].rpartition(")")[0]
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.define(f"{name}_backward(Tensor gradient, bool[] wanted, {arguments}) -> Tensor[]")

    def forward(*inputs):
        with torch.no_grad():
            return run(*inputs)

    def backward(gradient, wanted, *inputs):
        inputs, leaves = list(inputs), []
        with torch.enable_grad():
            for n, needs in enumerate(wanted):
                if needs:
                    inputs[n] = inputs[n].detach().requires_grad_()
                    leaves.append(inputs[n])
            return list(torch.autograd.grad(run(*inputs), leaves, gradient))

    def backward_fake(gradient, wanted, *inputs):
        return [torch.empty_like(x) for x, needs in zip(inputs, wanted, strict=True) if needs]

    def remember(ctx, inputs, output):
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]

    def differentiate(ctx, gradient):
        pairs = zip(ctx.saved_tensors, ctx.rest, strict=True)
        inputs = [rest if tensor is None else tensor for tensor, rest in pairs]
        wanted = [bool(needs) for needs in ctx.needs_input_grad]
        operator = getattr(torch.ops.llm2vec_fast, f"{name}_backward")
        found = iter(operator(gradient, wanted, *inputs) if any(wanted) else ())
        return tuple(next(found) if needs else None for needs in wanted)

    for suffix, function, empty in (("", forward, fake), ("_backward", backward, backward_fake)):
        _LIBRARY.impl(f"{name}{suffix}", function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llm2vec_fast::{name}{suffix}", empty, lib=_LIBRARY)
    torch.library.register_autograd(
        f"llm2vec_fast::{name}", differentiate, setup_context=remember, lib=_LIBRARY
    )
    return getattr(torch.ops.llm2vec_fast, name)

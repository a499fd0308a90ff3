"""Under torch.compile every operation is part of one graph, with the values and gradients of eager.

backend="aot_eager" traces forward and backward as Inductor would have them, without a C++ compiler.
"""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import ops

T, D = 11, 64
CU = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
SPANS = torch.tensor([[1, 4], [4, 5], [5, 9]])
ROWS, TARGETS = torch.tensor([0, 3, 7]), torch.tensor([5, -100, 20])
ANGLE = torch.rand(T, 8, generator=torch.Generator().manual_seed(1))


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(x):
    q, k, v = x.view(T, 4, 16), x.view(T, 4, 16)[:, :2], x.view(T, 4, 16)[:, 2:]
    return ops.attention(q, k, v, CU, 6, causal=True)


def rope(x):
    # Multiplied first: what is changed in place must not be a leaf.
    return ops.rope_(x * 2.0, torch.arange(T), ANGLE.cos(), ANGLE.sin(), 2, 1)


def rope_attend(x):
    return ops.rope_attention(x * 2.0, torch.arange(T), ANGLE.cos(), ANGLE.sin(), CU, 6, 2, 1)


NORM = values(D, seed=2)
WEIGHT, A, B = values(48, D, seed=3), values(8, D, seed=4), values(48, 8, seed=5)
SEGMENTS = ((0, 16, 0, 4, 2.0), (16, 48, 4, 8, 0.5))
CASES = {
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x.flip(0), NORM, 1e-5),
    "rms_norm": lambda x: ops.add_rms_norm(x, None, NORM, 1e-5),
    "swiglu": ops.swiglu,
    "rope": rope,
    "attention": attend,
    "rope_attention": rope_attend,
    "pool": lambda x: ops.pool(x, SPANS, "weighted_mean", True),
    "masked_token_loss": lambda x: ops.masked_token_loss(x, WEIGHT, ROWS, TARGETS, num_items=7),
    "info_nce": lambda x: ops.info_nce(x[:4], x[4:], symmetric=True, doc_keys=torch.arange(7) // 2),
    "lora_linear": lambda x: ops.lora_linear(x, WEIGHT, None, A, B, SEGMENTS),
    "swiglu_linear": lambda x: ops.swiglu_linear(x, WEIGHT[:, : D // 2]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_and_the_values_of_eager(name, values_and_gradients):
    torch._dynamo.reset()
    run, x = CASES[name], values(T, D)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = values_and_gradients(compiled, [x])
    expected = values_and_gradients(run, [x])
    for ours, theirs in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("name", ["attention", "pool", "masked_token_loss", "info_nce"])
def test_the_registered_operators_are_what_torch_asks_of_operators(name):
    """torch's own checks: schema, fake, autograd registration, tracing with dynamic shapes."""
    inputs = {
        "attention": (
            values(T, 4, 16), values(T, 2, 16, seed=1), values(T, 2, 16, seed=2), CU, 6,
            True, None, 0.25, 0.0, None,
        ),
        "pool": (values(T, D), SPANS, "mean", False),
        "masked_token_loss": (values(T, D), WEIGHT, ROWS, TARGETS, -100),
        "info_nce": (values(4, D), values(7, D), 20.0, False, None, None),
    }[name]  # fmt: skip
    inputs = [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    operator = getattr(torch.ops.llm2vec_fast, name).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, tuple(inputs), test_utils=checks)


def test_a_forced_backend_is_not_forgotten():
    """What `use` forces raises if it cannot run, compiled or not."""
    torch._dynamo.reset()
    with ops.use("varlen", "attention"), pytest.raises(Exception, match="CUDA"):
        torch.compile(attend, backend="eager")(values(T, D))

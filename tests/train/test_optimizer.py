"""The optimizer against torch's AdamW and clipping; bf16 parameters; going on from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm2vec_fast.train.optimizer import Optimizer
from llm2vec_fast.train.ranks import Ranks

SHAPES = {"qkv.weight": (6, 5), "norm.weight": (5,), "down.weight": (3, 7), "down.bias": (7,)}
SETTINGS = {"learning_rate": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
ALONE = Ranks()


def parameters(dtype=torch.float32, seed=0) -> dict[str, nn.Parameter]:
    noise = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=noise).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Norms from below 1 to far above it."""
    noise = torch.Generator().manual_seed(100 + step)
    scale = 0.02 * 2 ** (step % 8)
    return {n: (scale * torch.randn(s, generator=noise)).to(dtype) for n, s in SHAPES.items()}


def backward(params: dict[str, nn.Parameter], grads: dict[str, torch.Tensor]) -> None:
    """A backward pass that gives each parameter its gradient."""
    sum((params[name] * grads[name]).sum() for name in params).backward()


def step(optimizer: Optimizer, params, number: int, dtype=torch.float32) -> float:
    optimizer.clear()
    backward(params, gradients(number, dtype))
    return optimizer.step(ALONE).item()


@pytest.mark.parametrize("max_norm", [1.0, 0.0], ids=["clipped", "never clipped"])
def test_thirty_steps_are_those_of_torch(max_norm):
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours.items(), max_grad_norm=max_norm, **SETTINGS)
    decayed = [p for p in theirs.values() if p.dim() > 1]
    others = [p for p in theirs.values() if p.dim() == 1]  # norms and biases
    adamw = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=SETTINGS["learning_rate"], betas=SETTINGS["betas"], eps=SETTINGS["eps"],
        weight_decay=SETTINGS["weight_decay"],
    )  # fmt: skip
    norms = []
    for number in range(30):
        norms.append(step(optimizer, ours, number))
        adamw.zero_grad()
        backward(theirs, gradients(number))
        norm = nn.utils.clip_grad_norm_(theirs.values(), max_norm or float("inf"))
        adamw.step()
        assert norms[-1] == pytest.approx(norm.item(), rel=1e-6)
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name].data, weight.data, rtol=2e-6, atol=2e-7)
    assert min(norms) < 1 < max(norms)


def test_decay_alone_moves_matrices_and_nothing_else():
    params, before = parameters(), parameters()
    optimizer = Optimizer(params.items(), learning_rate=0.1, weight_decay=0.5)
    optimizer.clear()
    optimizer.step(ALONE)
    for name, weight in params.items():
        left = 0.95 if weight.dim() > 1 else 1.0
        torch.testing.assert_close(weight.data, left * before[name].data)


def test_the_learning_rate_follows_a_schedule():
    from torch.optim.lr_scheduler import LambdaLR

    params, before = parameters(), parameters()
    optimizer = Optimizer(params.items(), learning_rate=0.1)
    schedule = LambdaLR(optimizer.adamw, lambda step: 0.0 if step == 0 else 1.0)
    moved = []
    for number in range(2):
        step(optimizer, params, number)
        schedule.step()
        moved.append(any(not torch.equal(params[n].data, before[n].data) for n in params))
    assert moved == [False, True]


def test_gradients_of_bf16_parameters_are_added_in_fp32():
    params = {"weight": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    optimizer = Optimizer(params.items(), learning_rate=1e-3, max_grad_norm=0.0)
    optimizer.clear()
    for _ in range(1000):  # in bf16 the sum would stand still at 256
        params["weight"].sum().backward()
    assert params["weight"].grad is None
    assert optimizer.step(ALONE).item() == pytest.approx(1000 * 4)
    optimizer.clear()
    params["weight"].sum().backward()
    assert optimizer.step(ALONE).item() == pytest.approx(4)


def test_many_tiny_updates_of_bf16_parameters_are_not_lost():
    wide, narrow = parameters(), parameters(torch.bfloat16)
    with torch.no_grad():
        for name, weight in wide.items():
            weight.copy_(narrow[name])
    settings = {"learning_rate": 2e-5, "max_grad_norm": 1.0}
    truth = Optimizer(wide.items(), **settings)
    ours = Optimizer(narrow.items(), **settings)
    lost, before = parameters(torch.bfloat16), parameters(torch.bfloat16)
    naive = torch.optim.AdamW(lost.values(), lr=2e-5, weight_decay=0.0)
    for _ in range(600):
        grads = {name: g.bfloat16().float() for name, g in gradients(0).items()}
        for optimizer in (truth, ours):
            optimizer.clear()
        backward(wide, grads)
        backward(narrow, {name: g.bfloat16() for name, g in grads.items()})
        truth.step(ALONE)
        ours.step(ALONE)
        naive.zero_grad()
        backward(lost, {name: g.bfloat16() for name, g in grads.items()})
        naive.step()
    assert all(weight.dtype == torch.bfloat16 for weight in narrow.values())
    for name, weight in wide.items():
        assert torch.equal(narrow[name].data, weight.data.bfloat16())
    size = before["qkv.weight"].data.abs()
    large = (size > 0.5) & (size < 2)
    moved = narrow["qkv.weight"].data != before["qkv.weight"].data
    assert moved[large].all()
    assert torch.equal(lost["qkv.weight"].data[large], before["qkv.weight"].data[large])


def mixed() -> dict[str, nn.Parameter]:
    """bf16 weights beside fp32 ones: both kinds in one vector."""
    narrow = parameters(torch.bfloat16)
    return {name: p if "down" in name else nn.Parameter(p.float()) for name, p in narrow.items()}


def mixed_step(optimizer: Optimizer, params, number: int) -> None:
    grads = {name: g.to(params[name].dtype) for name, g in gradients(number).items()}
    optimizer.clear()
    backward(params, grads)
    optimizer.step(ALONE)


def test_going_on_from_a_checkpoint_is_bitwise_the_same():
    first, again = mixed(), mixed()
    optimizer, resumed = Optimizer(first.items(), **SETTINGS), Optimizer(again.items(), **SETTINGS)
    assert optimizer.layout() == resumed.layout()
    for number in range(5):
        mixed_step(optimizer, first, number)
    kept = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    resumed.restore(optimizer.tensors())
    assert all(torch.equal(weight.data, again[name].data) for name, weight in first.items())
    for number in range(5, 12):
        mixed_step(optimizer, first, number)
    assert any(not torch.equal(t, kept[name]) for name, t in optimizer.tensors().items())
    for name, tensor in resumed.tensors().items():  # the other's steps left it alone
        assert torch.equal(tensor, kept[name]), name
    for number in range(5, 12):
        mixed_step(resumed, again, number)
    for name, weight in first.items():
        assert weight.dtype == again[name].dtype
        assert torch.equal(weight.data, again[name].data), name
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_what_is_frozen_stays_out():
    params = parameters()
    params["down.weight"].requires_grad_(False)
    optimizer = Optimizer(params.items(), learning_rate=1e-3)
    assert optimizer.layout() == [["qkv.weight", [6, 5]], ["norm.weight", [5]], ["down.bias", [7]]]
    for weight in params.values():
        weight.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing can be trained"):
        Optimizer(params.items(), learning_rate=1e-3)


def test_the_mean_over_ranks_is_clipped_not_each_rank():
    class Halved(Ranks):
        def mean_(self, x):
            return x.mul_(0.5)  # as if the other rank's gradient were zero

    params = {"weight": nn.Parameter(torch.ones(2, 2))}
    optimizer = Optimizer(params.items(), learning_rate=1e-3, max_grad_norm=1.0)
    optimizer.clear()
    params["weight"].sum().backward()
    assert optimizer.step(Halved()).item() == pytest.approx(1.0)
    assert optimizer.vectors[0].grad.tolist() == pytest.approx([0.5] * 4, rel=1e-5)

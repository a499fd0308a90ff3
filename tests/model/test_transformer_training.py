"""Training passes of the model: dropout that can be made again, recomputation, gradients."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import adapt
from llm2vec_fast.model.transformer import Dropout, Linear, Lora, Transformer

LENGTHS = (1, 23, 7, 40)
BOTH = Dropout(attention=0.3, lora=0.2, seed=11)
BACKENDS = pytest.mark.parametrize("backend", [None, "reference"], ids=["default", "reference"])


@pytest.fixture
def model(tiny_model, ours):
    """model(family="llama", dtype=float32): adapters of random A and B in training."""

    def make(family="llama", dtype=torch.float32) -> Transformer:
        found = ours(tiny_model(None, family), dtype=dtype)
        adapt.attach(found, 4, 8)
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, _, b_OR in adapt.factors(found):
                b_OR.copy_(0.3 * torch.randn(b_OR.shape, generator=noise))
        return found

    return make


@pytest.fixture
def batch() -> PackedBatch:
    noise = torch.Generator().manual_seed(1)
    return PackedBatch.build(
        [torch.randint(5, 300, (n,), generator=noise).tolist() for n in LENGTHS]
    )


@pytest.fixture
def forced():
    """forced(backend): a context in which that backend runs everything; None: the usual choice."""
    return lambda backend: contextlib.nullcontext() if backend is None else ops.use(backend)


def gradients(model: Transformer, batch, drop=BOTH, recompute=False) -> list[torch.Tensor]:
    """Hidden states, then the gradients of a random weighting of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden_TD = model(batch, drop, recompute)
    weights_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(2))
    loss = (hidden_TD.float() * weights_TD).sum()
    return [hidden_TD.detach(), *torch.autograd.grad(loss, trained)]


# Dropout


@BACKENDS
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equal_dropout_gives_equal_passes_and_other_seeds_others(
    model, batch, forced, family, backend
):
    net = model(family)
    with forced(backend):
        first, again = gradients(net, batch), gradients(net, batch, Dropout(0.3, 0.2, 11))
        others = [
            gradients(net, batch, drop)
            for drop in (
                Dropout(0.3, 0.2, 12),
                Dropout(0.3, 0.0, 11),
                Dropout(0.0, 0.2, 11),
                Dropout(),
            )
        ]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in others:
        assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_torchs_own_random_numbers_are_not_touched(model, batch):
    net = model()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = gradients(net, batch, recompute=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = gradients(net, batch, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_place_of_the_model_shares_its_masks_with_another(model, batch, monkeypatch):
    """The seeds that reach the operations: other layers, projections and passes, other seeds."""
    net, seeds = model(), []

    def spy(name):
        real = getattr(ops, name)

        def run(*args, **kwargs):
            seeds.append(kwargs["seed"])
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, run)

    for name in ("lora_linear", "swiglu_linear", "rope_attention"):
        spy(name)
    with torch.no_grad():
        for number in range(3):
            net(batch, BOTH.within(number))
    # qkv, attention, o, gate and up, down; each of the projections' parts counts by itself inside
    assert len(seeds) == len(set(seeds)) == 3 * 5 * net.config.n_layers


def test_seeds_of_many_chunks_layers_and_places_do_not_collide():
    found = [
        Dropout(0.3, 0.05, seed).within(chunk).within(layer).within(place).seed
        for seed in (0, 1, 42, (1 << 62) - 1)
        for chunk in range(160)
        for layer in range(32)
        for place in range(5)
    ]
    assert len(found) > 100_000 and len(set(found)) == len(found)
    assert min(found) >= 0 and max(found) < 1 << 62
    # Nor do they follow a pattern: each bit is set in half of them, whatever its neighbours are.
    bits = np.unpackbits(np.array(found, "<u8").view(np.uint8).reshape(-1, 8), axis=1)
    bits = bits.astype(np.float32)[:, bits.any(axis=0)]
    assert bits.shape[1] == 62
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(bits.T) - np.eye(62)).max() < 0.03


def test_seeds_alone_do_not_move_what_does_not_drop():
    assert Dropout(seed=5).within(3) == Dropout(seed=5)
    inner = Dropout(0.3, 0.0, 5).within(3)
    assert (inner.attention, inner.lora) == (0.3, 0.0) and inner.seed != 5


@BACKENDS
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_lora_dropout_keeps_its_share_and_scales_it(forced, backend, p):
    T, D = 300, 200
    linear = Linear(D, 2 * D, bias=False)
    linear.weight.data.zero_()
    linear.weight.requires_grad_(False)
    a_RD, b_OR = torch.eye(D).repeat(2, 1), torch.eye(2 * D)  # each half of the output is drop(x)
    linear.lora = Lora(a_RD, b_OR, [(0, D, 0, D, 1.0), (D, 2 * D, D, 2 * D, 1.0)])
    with forced(backend), torch.no_grad():
        y_TO = linear(torch.ones(T, D), Dropout(lora=p, seed=3))
        other_TO = linear(torch.ones(T, D), Dropout(lora=p, seed=4))
    kept = y_TO != 0
    torch.testing.assert_close(y_TO[kept], torch.full_like(y_TO[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - (1 - p)) < 4 * deviation
    # The parts of a fused projection and other seeds are independent.
    for one, two in ((kept[:, :D], kept[:, D:]), (kept, other_TO != 0)):
        both = ((one & two).float().mean() - (1 - p) ** 2).abs()
        assert both < 5 * ((1 - p) ** 2 / one.numel()) ** 0.5
    # So are tokens and features.
    for share, n in ((kept.float().mean(0), T), (kept.float().mean(1), 2 * D)):
        assert share.std() == pytest.approx((p * (1 - p) / n) ** 0.5, rel=0.25)


@BACKENDS
def test_the_backward_pass_drops_what_the_forward_pass_dropped(model, batch, forced, backend):
    """A step against the gradient changes the loss by what the gradient says."""
    net = model()
    trained = [p for p in net.parameters() if p.requires_grad]

    def loss() -> torch.Tensor:
        hidden_TD = net(batch, BOTH)
        noise = torch.Generator().manual_seed(2)
        return (hidden_TD * torch.randn(hidden_TD.shape, generator=noise)).sum()

    with forced(backend):
        slopes = torch.autograd.grad(loss(), trained)
        length = sum(slope.square().sum() for slope in slopes).sqrt()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, slope in zip(trained, slopes, strict=True):
                    weight += sign * 1e-3 * slope / length
                ends.append(loss().double())
                for weight, slope in zip(trained, slopes, strict=True):
                    weight -= sign * 1e-3 * slope / length
    assert ((ends[0] - ends[1]) / 2e-3).item() == pytest.approx(length.item(), rel=5e-3)


# Recomputation


@BACKENDS
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputed_layers_give_the_same_gradients(model, batch, forced, family, backend):
    net = model(family)
    with forced(backend):
        for drop in (BOTH, Dropout()):
            kept = gradients(net, batch, drop)
            again = gradients(net, batch, drop, recompute=True)
            assert all(value.count_nonzero() for value in kept)
            assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@BACKENDS
def test_recomputed_layers_in_bf16(model, batch, forced, backend):
    """The states are the same; gradients may differ where the residual's gradients are added up:
    in the node of the norm at once, or by autograd. Neither is nearer to the truth.
    """
    net, wide = model(dtype=torch.bfloat16), model()
    with forced(backend):
        truth, kept = gradients(wide, batch), gradients(net, batch)
        again = gradients(net, batch, recompute=True)
    assert torch.equal(kept[0], again[0])

    def error(found) -> float:
        pairs = list(zip(found[1:], truth[1:], strict=True))
        parts = [(got - want).norm() / want.norm() for got, want in pairs]
        return torch.stack(parts).square().mean().sqrt().item()

    assert error(again) <= 1.2 * error(kept) < 0.1


def test_recompute_of_a_model_that_is_trained_whole(tiny_model, ours, batch):
    net = ours(tiny_model(None, "llama")).requires_grad_(True)
    kept = gradients(net, batch, Dropout(0.3, 0.0, 1))
    again = gradients(net, batch, Dropout(0.3, 0.0, 1), recompute=True)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6 * a.abs().max().item())


def test_recompute_keeps_one_tensor_a_layer(model, batch):
    net = model()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def kept(recompute: bool) -> int:
        found = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.float32 and len(x) == batch.n_tokens:
                storage = x.untyped_storage()
                if storage.data_ptr() not in own:
                    found[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hold = net(batch, BOTH, recompute)
        assert hold.requires_grad
        return sum(found.values())

    state = batch.n_tokens * net.config.hidden_size * 4
    # The layers' inputs and the pair that the last norm adds up: its sum and rstd.
    assert kept(recompute=True) <= (net.config.n_layers + 1.1) * state
    assert kept(recompute=False) > 3 * kept(recompute=True)

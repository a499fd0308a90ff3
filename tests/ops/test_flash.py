"""Adapters of FlashAttention: signatures, refusals, the generator, as far as no GPU is needed."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from llm2vec_fast.ops import _flash
from llm2vec_fast.ops.backend import Call

CUDA = Call("attention", "cuda", 90, torch.bfloat16, head_dim=128)


def test_torchs_operators_take_what_we_pass():
    """From torch 2.11 on: these arguments by position, these by name."""
    forward = torch.ops.aten._flash_attention_forward.default._schema
    names = [a.name for a in forward.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)
    assert len(forward.returns) == 5
    backward = torch.ops.aten._flash_attention_backward.default._schema
    names = [a.name for a in backward.arguments]
    assert names[:12] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k",
        "max_q", "max_k", "dropout_p", "is_causal",
    ]  # fmt: skip
    assert len(names[:14]) == 14 and not backward.arguments[13].kwarg_only
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)


@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 3), (False, 3)])
def test_the_pair_runs_on_meta_tensors(causal, window):
    packed = torch.empty(20, 8, 64, device="meta", dtype=torch.bfloat16)
    q, k, v = packed.split([4, 2, 2], dim=1)
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    options = (12, causal, window, 0.125, 0.0, None)
    o, saved = _flash.aten_forward(q, k, v, cu, *options)
    assert o.shape == q.shape and saved[0].shape == (4, 20)
    own = _flash.aten_backward(o, q, k, v, o, saved, cu, *options)
    assert [x.shape for x in own] == [q.shape, k.shape, v.shape]
    into = tuple(torch.empty_like(packed).split([4, 2, 2], dim=1))
    assert _flash.aten_backward(o, q, k, v, o, saved, cu, *options, into=into) is into


def test_what_flash_attention_could_not_read_is_copied():
    packed = torch.randn(20, 8, 16).half()
    for fine in packed.split([4, 2, 2], dim=1):
        assert _flash.readable(fine) is fine
    wide = torch.randn(20, 8 * 16 + 8).half()
    for amiss in (
        packed.transpose(0, 2).contiguous().transpose(0, 2),  # columns apart
        wide[:, 4:132].unflatten(1, (8, 16)),  # begins between two boundaries
        wide[:, :132].reshape(-1)[: 20 * 128 + 76].as_strided((20, 8, 16), (132, 16, 1)),
    ):
        copy = _flash.readable(amiss)
        assert torch.equal(copy, amiss) and copy.is_contiguous() and copy.storage_offset() == 0
    leaf = wide.float()[:, 1:129].requires_grad_()
    _flash.readable(leaf).sum().backward()
    assert (leaf.grad == 1).all()


def test_edges():
    assert _flash._edges(False, None) == (-1, -1)
    assert _flash._edges(True, None) == (-1, 0)
    assert _flash._edges(True, 1) == (0, 0)
    assert _flash._edges(False, 5) == (4, 4)


def test_refusals():
    assert _flash.varlen_refuses(CUDA) is None
    assert "dropout" in _flash.varlen_refuses(CUDA._replace(dropout=True))
    assert "only for dropout" in _flash.flash_dropout_refuses(CUDA)
    with_dropout = CUDA._replace(dropout=True)
    assert _flash.flash_dropout_refuses(with_dropout) is None
    for change, reason in (
        ({"device": "cpu"}, "CUDA"),
        ({"arch": 75}, "7.5"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 12}, "12"),
        ({"head_dim": 264}, "264"),
        ({"head_dim": 256, "arch": 89}, "99 KB"),
    ):
        assert reason in _flash.flash_dropout_refuses(with_dropout._replace(**change))


class Generator:
    """A CUDA generator as far as `seeded` needs one."""

    def __init__(self):
        self.state = (77, 40)

    def initial_seed(self):
        return self.state[0]

    def get_offset(self):
        return self.state[1]

    def manual_seed(self, seed):
        self.state = (seed, 0)

    def set_offset(self, offset):
        self.state = (self.state[0], offset)


def test_the_generator_is_lent_and_given_back(monkeypatch):
    generators = (Generator(), Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    with _flash.seeded(torch.device("cuda", 1), 5):
        assert generators[1].state == (5, 0) and generators[0].state == (77, 40)
        generators[1].state = (5, 8)  # the kernel has drawn
    assert generators[1].state == (77, 40)
    with pytest.raises(KeyError), _flash.seeded(torch.device("cuda", 0), 6):
        raise KeyError
    assert generators[0].state == (77, 40)
    with _flash.seeded(torch.device("cpu"), None):
        pass
    assert all(hasattr(torch.Generator, name) for name in ("get_offset", "set_offset"))


@pytest.fixture
def flash_attn_package(monkeypatch):
    """A package with the signatures of flash_attn 2.7 and 2.8; it notes what it was called with."""
    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
               alibi_slopes=None, deterministic=False, return_attn_probs=False,
               block_table=None):  # fmt: skip
        calls.append((max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size))
        return q

    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
                seqused_k=None, zero_tensors=False):  # fmt: skip
        calls.append((dropout_p, softmax_scale, causal, window_size_left, window_size_right))
        return q, "lse", "mask", "state"

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                 max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                 window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                 zero_tensors=False):  # fmt: skip
        calls.append((softmax_lse, rng_state, causal, window_size_left, window_size_right))
        for x in (dq, dk, dv):
            x.fill_(3)

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    package.flash_attn_varlen_func, package.flash_attn_interface = varlen, interface
    interface._flash_attn_varlen_forward = forward
    interface._flash_attn_varlen_backward = backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    _flash._flash_attn_func.cache_clear()
    _flash._flash_attn_pair_module.cache_clear()
    yield interface, calls
    _flash._flash_attn_func.cache_clear()
    _flash._flash_attn_pair_module.cache_clear()


def test_flash_attn_2(flash_attn_package, monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    _, calls = flash_attn_package
    q = torch.zeros(6, 2, 8)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    assert _flash.flash_attn(q, q, q, cu, 6, True, 4, 0.5, 0.1, 7) is q
    assert calls.pop() == (6, 6, 0.1, 0.5, True, (3, 0))
    assert _flash.has_flash_attn_pair()
    o, saved = _flash.flash_attn_forward(q, q, q, cu, 6, False, 4, 0.5, 0.1, 7)
    assert o is q and saved == ("lse", "state")
    assert calls.pop() == (0.1, 0.5, False, 3, 3)
    into = tuple(torch.zeros(6, 6, 8).split(2, dim=1))
    got = _flash.flash_attn_backward(
        q, q, q, q, o, saved, cu, 6, True, None, 0.5, 0.1, 7, into=into
    )
    assert calls.pop() == ("lse", "state", True, -1, 0)
    assert all(a is b and (a == 3).all() for a, b in zip(got, into, strict=True))


def test_flash_attn_as_custom_operators(flash_attn_package):
    """As flash_attn wraps them from torch 2.4 on: the signature is that of the wrapper."""
    interface, _ = flash_attn_package
    plain = interface._flash_attn_varlen_forward

    class Wrapped:
        _init_fn = staticmethod(plain)

        def __call__(self, *args, **kwargs):
            return plain(*args, **kwargs)

    interface._flash_attn_varlen_forward = Wrapped()
    assert _flash.has_flash_attn_pair()
    made = torch.library.custom_op("llm2vec_fast_test::identity", mutates_args=())(_identity)
    assert made._init_fn is _identity


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_an_older_flash_attn_has_no_pair(flash_attn_package):
    interface, _ = flash_attn_package
    interface._flash_attn_varlen_forward = lambda q, k, v, window_size=(-1, -1): None
    assert not _flash.has_flash_attn_pair()


@pytest.mark.parametrize("name, every", [("flash_attn_3", -1), ("flash_attn_4", None)])
def test_flash_attn_3_and_4(monkeypatch, name, every):
    module, calls = types.ModuleType("newer"), []

    def varlen(q, k, v, **options):
        calls.append(options)
        return (q, None) if name == "flash_attn_3" else q

    module.flash_attn_varlen_func = varlen
    monkeypatch.setattr(_flash.importlib, "import_module", lambda name: module)
    _flash._newer_func.cache_clear()
    q, cu = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    run = _flash.newer(name)
    assert run(q, q, q, cu, 6, False, None, 0.5) is q
    assert run(q, q, q, cu, 6, True, 4, 0.5) is q
    assert calls[0]["window_size"] == (every, every) and not calls[0]["causal"]
    assert calls[1]["window_size"] == (3, 0) and calls[1]["causal"]
    assert calls[1]["max_seqlen_k"] == 6 and calls[1]["softmax_scale"] == 0.5
    _flash._newer_func.cache_clear()


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4"])
def test_what_flash_attn_3_and_4_refuse(monkeypatch, name):
    good = CUDA._replace(forced=True)
    assert "cannot be imported" in _flash.newer_refuses(name, good)
    monkeypatch.setattr(_flash.importlib.util, "find_spec", lambda module: object())
    assert _flash.newer_refuses(name, good) is None
    for changed, reason in (
        ({"forced": False}, "measured"),
        ({"dropout": True}, "dropout"),
        ({"arch": 80}, "8.0"),
        ({"device": "cpu"}, "CUDA"),
        ({"dtype": torch.float32}, "float32"),
    ):
        assert reason in _flash.newer_refuses(name, good._replace(**changed))


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch):
    """Its wheel brings flash_attn/cute and no flash_attn/__init__.py."""
    namespace = types.SimpleNamespace(origin=None)
    monkeypatch.setattr(_flash.importlib.util, "find_spec", lambda module: namespace)
    assert "not installed" in _flash.flash_attn_refuses(CUDA)

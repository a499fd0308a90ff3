"""rope_ against complex rotation in numpy, and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2vec_fast.ops import rope_, rope_ref_


def tables(positions: int, half: int, theta=10_000.0):
    angle = np.arange(positions)[:, None] * theta ** (-np.arange(half) / half)
    return (torch.from_numpy(f(angle)).float() for f in (np.cos, np.sin))


def truth(qkv, positions, cos, sin, n_heads, n_kv_heads):
    """Each pair (i, i + H/2) of a query or key is a complex number turned by its angle."""
    half = cos.shape[1]
    out = qkv.double().numpy().copy().reshape(len(qkv), -1, 2 * half)
    turn = cos.double().numpy() + 1j * sin.double().numpy()
    for token, position in enumerate(positions.tolist()):
        for head in range(n_heads + n_kv_heads):
            z = out[token, head, :half] + 1j * out[token, head, half:]
            z = z * turn[position]
            out[token, head] = np.concatenate([z.real, z.imag])
    return torch.from_numpy(out.reshape(qkv.shape))


def draw(shape, dtype=torch.float32, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)


def plain(qkv, positions, cos, sin, n_heads, n_kv_heads):
    """Plain torch with every step, tables too, in the dtype of the projection."""
    half = cos.shape[1]
    heads = qkv.unflatten(1, (-1, 2 * half))
    c, s = (t[positions.long()].to(qkv.dtype)[:, None] for t in (cos, sin))
    left, right = heads.split(half, -1)
    turned = torch.cat([left * c - right * s, right * c + left * s], -1)
    kept = heads[:, n_heads + n_kv_heads :]
    return torch.cat([turned[:, : n_heads + n_kv_heads], kept], 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (5, 1)])
@pytest.mark.parametrize("tokens, half", [(1, 1), (37, 3), (5, 32), (9, 63)])
def test_equals_complex_rotation(within_rule, dtype, heads, tokens, half):
    n, k = heads
    cos, sin = tables(50, half)
    positions = torch.arange(tokens, dtype=torch.int32) * 7 % 50
    qkv = draw((tokens, (n + 2 * k) * 2 * half), dtype)
    want = truth(qkv, positions, cos, sin, n, k)
    other = plain(qkv, positions, cos, sin, n, k)
    values = qkv[:, (n + k) * 2 * half :].clone()
    got = rope_(qkv, positions, cos, sin, n, k)
    assert got is qkv
    assert torch.equal(got[:, (n + k) * 2 * half :], values)
    within_rule(got, other, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(rounded_once, dtype):
    cos, sin = tables(37, 32)
    positions, qkv = torch.arange(37), draw((37, 8 * 64), dtype)
    want = truth(qkv, positions, cos, sin, 4, 2)
    rounded_once(rope_(qkv, positions, cos, sin, 4, 2), want)


@pytest.mark.parametrize("n, k", [(4, 4), (4, 2)])
def test_equals_transformers(n, k):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    half, tokens = 8, 11
    cos, sin = tables(tokens, half)
    qkv = draw((tokens, (n + 2 * k) * 2 * half))
    heads = qkv.unflatten(1, (-1, 2 * half)).transpose(0, 1)[None]
    q, key = heads[:, :n], heads[:, n : n + k]
    want_q, want_k = apply_rotary_pos_emb(
        q, key, torch.cat([cos, cos], 1)[None], torch.cat([sin, sin], 1)[None]
    )
    got = rope_(qkv.clone(), torch.arange(tokens), cos, sin, n, k)
    got = got.unflatten(1, (-1, 2 * half)).transpose(0, 1)[None]
    torch.testing.assert_close(got[:, :n], want_q, rtol=0, atol=1e-6)
    torch.testing.assert_close(got[:, n : n + k], want_k, rtol=0, atol=1e-6)


def test_position_zero_is_left_alone_and_lengths_are_kept():
    cos, sin = tables(40, 4)
    qkv = draw((2, 3 * 8))
    before = qkv.clone()
    rope_(qkv, torch.tensor([0, 39]), cos, sin, 1, 1)
    assert torch.equal(qkv[0], before[0])
    assert not torch.equal(qkv[1], before[1])
    torch.testing.assert_close(qkv[1, :8].norm(), before[1, :8].norm())


def test_scores_depend_on_the_distance_only():
    cos, sin = tables(64, 8)
    q, k = draw((1, 16)), draw((1, 16), seed=1)

    def score(at_q, at_k):
        rows = torch.cat([q, k, q], 1).repeat(2, 1)
        rope_(rows, torch.tensor([at_q, at_k]), cos, sin, 1, 1)
        return rows[0, :16] @ rows[1, 16:32]

    torch.testing.assert_close(score(3, 10), score(50, 57), rtol=0, atol=1e-5)
    assert (score(3, 10) - score(10, 3)).abs() > 1e-3


def test_works_in_place_on_rows_of_a_wider_tensor():
    cos, sin = tables(9, 4)
    wide = draw((9, 40))
    before, positions = wide.clone(), torch.arange(9, dtype=torch.int32)
    want = rope_(wide[:, 8:32].clone(), positions, cos, sin, 1, 1)
    got = rope_(wide[:, 8:32], positions, cos, sin, 1, 1)
    assert torch.equal(got, want)
    assert torch.equal(wide[:, 8:32], want)
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 32:], before[:, 32:])
    columns = before[:, 8:32].t().contiguous().t()
    assert torch.equal(rope_(columns, positions, cos, sin, 1, 1), want)


def test_no_tokens():
    cos, sin = tables(4, 4)
    assert (
        rope_(torch.empty(0, 24), torch.empty(0, dtype=torch.int32), cos, sin, 1, 1).shape[0] == 0
    )


def test_gradients():
    cos, sin = (t.double() for t in tables(6, 2))
    positions = torch.tensor([0, 1, 2, 0, 5])
    qkv = draw((5, 4 * 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: rope_ref_(x.clone(), positions, cos, sin, 2, 1), [qkv]
    )


def test_wrong_shapes_are_named():
    cos, sin = tables(9, 4)
    positions = torch.arange(5)
    with pytest.raises(ValueError, match=r"rope_.*\(5, 23\).*24"):
        rope_(torch.zeros(5, 23), positions, cos, sin, 1, 1)
    with pytest.raises(ValueError, match=r"\(5, 24\).*\(T, 32\)"):
        rope_(torch.zeros(5, 24), positions, cos, sin, 2, 1)
    with pytest.raises(ValueError, match=r"\(1, 5, 24\)"):
        rope_(torch.zeros(1, 5, 24), positions, cos, sin, 1, 1)
    with pytest.raises(ValueError, match=r"\(4,\).*\(5, 24\)"):
        rope_(torch.zeros(5, 24), positions[:4], cos, sin, 1, 1)
    with pytest.raises(ValueError, match=r"\(9, 4\).*\(8, 4\)"):
        rope_(torch.zeros(5, 24), positions, cos, sin[:8], 1, 1)

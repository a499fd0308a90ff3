"""The forward pass of LLaMA, Mistral, Qwen2 and Qwen3 on packed texts; read it top to bottom.

T tokens, B texts, D model, N query heads, K kv heads, H head dim, F feed-forward, S = (N + 2K) H
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.config import ModelConfig, Rope
from llm2vec_fast.ops.lora_linear import Segment

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of one training pass. Equal values drop the same elements, so that a pass can be
    computed again (recompute, GradCache) and no mask is ever stored.
    """

    attention: float = 0.0  # of the attention weights
    lora: float = 0.0  # of the adapters' inputs
    seed: int = 0

    def within(self, place: int) -> Dropout:
        """The same for one part of the model: parts with different numbers drop independently."""
        if not (self.attention or self.lora):
            return self
        mixed = (self.seed ^ (place + 1) * 0x9E3779B97F4A7C15) * 0xD6E8FEB86659FD93
        return replace(self, seed=(mixed ^ mixed >> 32) & (1 << 62) - 1)


NO_DROPOUT = Dropout()


class Norm(nn.Module):
    """RMSNorm fused with the residual add before it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)


class Lora(nn.Module):
    """Low-rank updates in training, stacked: one for each part of a fused projection."""

    def __init__(self, a_RD: Tensor, b_OR: Tensor, segments: Sequence[Segment]):
        super().__init__()
        self.a, self.b, self.segments = nn.Parameter(a_RD), nn.Parameter(b_OR), tuple(segments)


class Linear(nn.Module):
    """nn.Linear without its random initialisation: the weights come from a file.

    lora: None, or adapters in training beside the frozen weight
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.lora: Lora | None = None

    def forward(self, x_TD: Tensor, drop: Dropout = NO_DROPOUT) -> Tensor:
        if self.lora is None:
            return F.linear(x_TD, self.weight, self.bias)
        return ops.lora_linear(
            x_TD, self.weight, self.bias, self.lora.a, self.lora.b, self.lora.segments,
            dropout_p=drop.lora, seed=drop.seed,
        )  # fmt: skip

    def after_swiglu(self, gate_up_T2F: Tensor, drop: Dropout = NO_DROPOUT) -> Tensor:
        """The same of silu(gate) * up, in one autograd node with it."""
        if self.lora is None:
            return ops.swiglu_linear(gate_up_T2F, self.weight, self.bias)
        return ops.swiglu_linear(
            gate_up_T2F, self.weight, self.bias, self.lora.a, self.lora.b, self.lora.segments,
            dropout_p=drop.lora, seed=drop.seed,
        )  # fmt: skip


class Embedding(nn.Module):
    """Token ids to vectors; like Linear, without initialisation."""

    def __init__(self, vocab_size: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.weight)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, causal: bool, window: int | None):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.causal = causal
        # The official library drops the sliding window once attention is bidirectional.
        self.window = window if causal else None
        heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, config.qkv_bias)
        self.o = Linear(config.n_heads * config.head_dim, config.hidden_size, config.o_bias)
        self.q_norm = Norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_TD: Tensor, batch: PackedBatch, rope: Tables, drop: Dropout = NO_DROPOUT
    ) -> Tensor:
        qkv_TS = self.qkv(x_TD, drop.within(0))
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH, v_TKH = ops.split_heads(qkv_TS, self.n_heads, self.n_kv_heads)
            q_TNH, k_TKH = self.q_norm(q_TNH, None)[0], self.k_norm(k_TKH, None)[0]
            qkv_TS = torch.cat([q_TNH, k_TKH, v_TKH], dim=1).flatten(1)
        o_TNH = ops.rope_attention(
            qkv_TS, batch.positions, *rope, batch.cu_seqlens, batch.max_seqlen,
            self.n_heads, self.n_kv_heads, causal=self.causal, window=self.window,
            dropout_p=drop.attention, seed=drop.within(1).seed,
        )  # fmt: skip
        return self.o(o_TNH.flatten(1), drop.within(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(D, 2 * width, config.mlp_bias)
        self.down = Linear(width, D, config.mlp_bias)

    def forward(self, x_TD: Tensor, drop: Dropout = NO_DROPOUT) -> Tensor:
        gate_up_T2F = self.gate_up(x_TD, drop.within(3))
        return self.down.after_swiglu(gate_up_T2F, drop.within(4))


class Block(nn.Module):
    """The residual travels beside the activations: each add fuses into the norm after it.

    In fp8 (`fp8.quantize_`) the norms give a QuantTensor to the projection that follows.
    """

    def __init__(self, config: ModelConfig, causal: bool, window: int | None):
        super().__init__()
        self.attn_norm = Norm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config, causal, window)
        self.mlp_norm = Norm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        batch: PackedBatch,
        rope: Tables,
        drop: Dropout = NO_DROPOUT,
    ) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.attn_norm(x_TD, residual_TD)
        x_TD = self.attn(x_TD, batch, rope, drop)
        x_TD, residual_TD = self.mlp_norm(x_TD, residual_TD)
        return self.mlp(x_TD, drop), residual_TD


class Transformer(nn.Module):
    """Token ids to last hidden states, after the final norm; no language-model head."""

    def __init__(self, config: ModelConfig, causal: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, causal, w) for w in config.layer_windows)
        self.norm = Norm(config.hidden_size, config.norm_eps)
        self.fp8_keep: tuple[str, ...] | None = None  # of a model that fp8.quantize_ changed
        self._rope: Tables | None = None

    def forward(
        self, batch: PackedBatch, drop: Dropout = NO_DROPOUT, recompute: bool = False
    ) -> Tensor:
        """(T, D) hidden states of a packed batch, in the weights' dtype.

        recompute: keep one tensor per layer and compute the layers again in the backward pass
        """
        rope = self.rope_tables(batch.max_seqlen, batch.ids.device)
        x_TD, residual_TD = self.embed(batch.ids), None
        for number, layer in enumerate(self.layers):
            rest = (batch, rope, drop.within(number))
            if recompute:
                # Their sum is all that the layer needs of the pair: half of what would be kept.
                x_TD = x_TD if residual_TD is None else x_TD + residual_TD
                x_TD, residual_TD = checkpoint(
                    layer, x_TD, None, *rest, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD, residual_TD = layer(x_TD, residual_TD, *rest)
        return self.norm(x_TD, residual_TD)[0]

    def rope_tables(self, length: int, device: torch.device) -> Tables:
        """cos and sin of at least `length` positions, (P, H/2) fp32 each; grown by doubling."""
        if self._rope is None or len(self._rope[0]) < length or self._rope[0].device != device:
            positions = max(512, 1 << (length - 1).bit_length())
            # Inference tensors could not be saved for a backward pass by a later call.
            with torch.inference_mode(False):
                self._rope = rope_tables(self.config.rope, self.config.head_dim, positions, device)
        return self._rope


def rope_tables(rope: Rope, head_dim: int, positions: int, device: torch.device) -> Tables:
    """cos and sin tables, (positions, head_dim / 2) fp32 each.

    source: llama3 scaling as in Meta's llama-models (apply_scaling), computed in fp32 as there
    """
    exponent_E = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq_E = 1.0 / rope.theta**exponent_E
    if rope.kind == "linear":
        freq_E = freq_E / rope.factor
    elif rope.kind == "llama3":
        # Short wavelengths stay, long ones are stretched by `factor`, those between are blended.
        turns_E = rope.original_max_position * freq_E / (2 * math.pi)
        blend_E = (turns_E - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend_E = blend_E.clamp(0, 1)
        freq_E = (1 - blend_E) * freq_E / rope.factor + blend_E * freq_E
    angle_PE = torch.arange(positions).float()[:, None] * freq_E
    return angle_PE.cos().to(device), angle_PE.sin().to(device)

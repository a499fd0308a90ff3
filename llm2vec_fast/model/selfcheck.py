"""One cheap look at load time: does attention see what it was asked to see?"""

from __future__ import annotations

import torch

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.transformer import Transformer


@torch.inference_mode()
def check_attention_mode(model: Transformer) -> None:
    """Raises RuntimeError if the first layer is not causal, or not bidirectional, as asked.

    Other libraries turned silently causal more than once. Here the layer itself is asked, on two
    made-up texts of four positions that differ in the last one only: does the first position
    change?
    """
    weight, length = model.embed.weight, 4
    noise = torch.randn(2 * length, weight.shape[1], generator=torch.Generator().manual_seed(0))
    noise[length : 2 * length - 1] = noise[: length - 1]
    x_TD = noise.to(weight.device, weight.dtype)
    batch = PackedBatch.build([[0] * length] * 2, device=weight.device)
    layer, rope = model.layers[0], model.rope_tables(length, weight.device)
    y_TD = layer.attn(layer.attn_norm(x_TD, None)[0], batch, rope).float()
    changed = bool((y_TD[0] - y_TD[length]).norm() > 1e-3 * y_TD[0].norm())
    if changed == model.causal:
        asked, got = ("causal", "bidirectional") if model.causal else ("bidirectional", "causal")
        raise RuntimeError(
            f"attention was asked to be {asked}, but the first position acts {got}: the attention "
            f"backend is wrong ({ops.available('attention', weight.device.type, weight.dtype)}), "
            "or the attention weights of the first layer are zero"
        )

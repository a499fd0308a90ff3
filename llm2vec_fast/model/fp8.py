"""The forward pass in fp8: a loaded model whose projections become e4m3, for inference alone.

T tokens, D in features, O out features, F feed-forward

`ops/fp8.py` says how a matrix is quantised and multiplied. Here modules take the place of others:
norms write e4m3 for the projection after them, SwiGLU for `down`, and `o` quantises what attention
gives it. The embedding, the last norm, rope, attention and the residual stay in bf16.

On a CPU the references do the same arithmetic: a simulation that says what vectors a GPU would
give, several times slower than bf16. No GPU has run this forward pass yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm2vec_fast import ops
from llm2vec_fast.model.transformer import NO_DROPOUT, Dropout, Linear, Norm, Transformer
from llm2vec_fast.ops.fp8 import QuantTensor

# What stays in bf16, by benchmarks/results/fp8_quality-cpu.json: SmolLM2-135M with its adapters
# mntp and simcse, the first 500 pairs of STS-B dev, simulated. Mean 1-cos to fp32 is 0.0053 where
# nothing is kept, 0.0039 with `down`, 0.0026 with this, for 17 % of a Mistral-7B's products where
# `down` is 27 %. Spearman moves by 0.01 (0.5, 0.4). bf16's own 1-cos is 0.00015, with twice the
# significant bits: no set comes within four times of it, `o` alone in fp8 is at nine. Other models
# have not been measured.
KEEP = ("qkv", "0", "-1")
TILE = 16  # tensor cores multiply e4m3 in multiples of it


class Fp8Norm(Norm):
    """Norm whose result leaves as e4m3."""

    def __init__(self, norm: Norm):
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[QuantTensor, Tensor]:
        return ops.add_rms_norm_fp8(x_TD, residual_TD, self.weight, self.eps)


class Fp8Linear(nn.Module):
    """A Linear in e4m3, a scale for each output feature; its input is quantised by tokens."""

    def __init__(self, linear: Linear):
        super().__init__()
        data_OD, scale_O1 = ops.quantize_rows(linear.weight.detach())
        self.register_buffer("data_OD", data_OD)
        self.register_buffer("scale_O1", scale_O1)
        self.bias = linear.bias

    def forward(self, x: QuantTensor | Tensor, drop: Dropout = NO_DROPOUT) -> Tensor:
        x = x if isinstance(x, QuantTensor) else ops.quantize_rows(x)
        return ops.fp8_linear(x, QuantTensor(self.data_OD, self.scale_O1), self.bias)

    def after_swiglu(self, gate_up_T2F: Tensor, drop: Dropout = NO_DROPOUT) -> Tensor:
        return self(ops.swiglu_fp8(gate_up_T2F))


@torch.no_grad()
def quantize_(model: Transformer, keep: Sequence[str] = KEEP) -> None:
    """Turns the projections of a bf16 model into e4m3, one after the other: of each only one form
    stays in memory. Adapters must be merged before.

    keep:   parts of the paths of projections that stay in bf16: "down" is that of every layer,
            "attn" and "mlp" are halves of every layer, "0" the first layer and "-1" the last
    raises: ValueError if a part is in no path or all projections are kept, and if one that is not
            is not in bf16, has adapters in training, or sizes that tensor cores do not multiply
    """
    names, layers = set(keep), model.layers
    paths = [path for path, part in layers.named_modules() if isinstance(part, Linear)]
    parts = {path: _parts(path, len(layers)) for path in paths}
    unknown = names.difference(*parts.values())
    if unknown:
        raise ValueError(f"fp8: no projection has {sorted(unknown)} in its path, nothing to keep")
    chosen = [path for path in paths if names.isdisjoint(parts[path])]
    if not chosen:
        raise ValueError(f"fp8: keeping {', '.join(keep)} of {len(layers)} layers leaves nothing")
    for path in chosen:
        _check(path, layers.get_submodule(path))
    for path in chosen:  # by paths: a list of modules would keep the old ones alive
        layers.set_submodule(path, Fp8Linear(layers.get_submodule(path)))
    for layer in layers:
        if isinstance(layer.attn.qkv, Fp8Linear):
            layer.attn_norm = Fp8Norm(layer.attn_norm)
        if isinstance(layer.mlp.gate_up, Fp8Linear):
            layer.mlp_norm = Fp8Norm(layer.mlp_norm)
    model.fp8_keep = tuple(keep)


def _parts(path: str, n_layers: int) -> set[str]:
    number, *names = path.split(".")
    return {number, str(int(number) - n_layers), *names}


def _check(path: str, linear: Linear) -> None:
    shape = tuple(linear.weight.shape)
    if linear.lora is not None:
        raise ValueError(f"fp8 is for inference: layers.{path} has an adapter in training")
    if linear.weight.dtype != torch.bfloat16:
        raise ValueError(f"fp8 is made of a bfloat16 model: layers.{path} is {linear.weight.dtype}")
    if shape[0] % TILE or shape[1] % TILE:
        raise ValueError(
            f"fp8 multiplies in multiples of {TILE}, and layers.{path} is {shape}: "
            "load this model with dtype='bfloat16'"
        )

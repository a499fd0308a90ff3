"""Operations: tensors in, tensors out. Each has a plain-torch `*_ref`, the kernels' truth."""

from llm2vec_fast.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref
from llm2vec_fast.ops.attention import attention, attention_ref
from llm2vec_fast.ops.backend import available, use
from llm2vec_fast.ops.fp8 import (
    QuantTensor,
    add_rms_norm_fp8,
    add_rms_norm_fp8_ref,
    fp8_linear,
    fp8_linear_ref,
    quantize_rows,
    quantize_rows_ref,
    swiglu_fp8,
    swiglu_fp8_ref,
)
from llm2vec_fast.ops.info_nce import info_nce, info_nce_ref
from llm2vec_fast.ops.lora_linear import lora_linear, lora_linear_ref
from llm2vec_fast.ops.masked_token_loss import masked_token_loss, masked_token_loss_ref
from llm2vec_fast.ops.pool import pool, pool_ref
from llm2vec_fast.ops.rope import rope_, rope_ref_
from llm2vec_fast.ops.rope_attention import rope_attention, split_heads
from llm2vec_fast.ops.swiglu import swiglu, swiglu_ref
from llm2vec_fast.ops.swiglu_linear import swiglu_linear, swiglu_linear_ref

__all__ = [
    "QuantTensor",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "add_rms_norm_fp8_ref",
    "add_rms_norm_ref",
    "attention",
    "attention_ref",
    "available",
    "fp8_linear",
    "fp8_linear_ref",
    "info_nce",
    "info_nce_ref",
    "lora_linear",
    "lora_linear_ref",
    "masked_token_loss",
    "masked_token_loss_ref",
    "pool",
    "pool_ref",
    "quantize_rows",
    "quantize_rows_ref",
    "rope_",
    "rope_attention",
    "rope_ref_",
    "split_heads",
    "swiglu",
    "swiglu_fp8",
    "swiglu_fp8_ref",
    "swiglu_linear",
    "swiglu_linear_ref",
    "swiglu_ref",
    "use",
]

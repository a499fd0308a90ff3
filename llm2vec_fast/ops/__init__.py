"""Operations: tensors in, tensors out. Each has a plain-torch `*_ref`, the kernels' truth."""

from llm2vec_fast.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref
from llm2vec_fast.ops.attention import attention, attention_ref
from llm2vec_fast.ops.backend import available, use
from llm2vec_fast.ops.pool import pool, pool_ref
from llm2vec_fast.ops.rope import rope_, rope_ref_
from llm2vec_fast.ops.swiglu import swiglu, swiglu_ref

__all__ = [
    "add_rms_norm",
    "add_rms_norm_ref",
    "attention",
    "attention_ref",
    "available",
    "pool",
    "pool_ref",
    "rope_",
    "rope_ref_",
    "swiglu",
    "swiglu_ref",
    "use",
]

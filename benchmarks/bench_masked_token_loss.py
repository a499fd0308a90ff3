"""Masked-token loss: Linear + cross-entropy of the masked rows, with and without a head gradient.

    python -m benchmarks.bench_masked_token_loss

The limit is matmul: logits and the states' gradient take 2*M*D*V operations each, the head's
gradient as many again. Memory is the other figure: rivals that hold all logits show it as MB.
"hf full logits" is what a Hugging Face model does with labels: logits of all T tokens in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, both, forward, importable, main, of_backends
from llm2vec_fast.ops.masked_token_loss import masked_token_loss


def eager(hidden_TD, weight_VD, rows_M, targets_M):
    logits_MV = F.linear(hidden_TD[rows_M], weight_VD)
    return F.cross_entropy(logits_MV.float(), targets_M)


def hf_full_logits(hidden_TD, weight_VD, rows_M, targets_M):
    labels_T = targets_M.new_full((hidden_TD.shape[0],), -100)
    labels_T[rows_M] = targets_M
    logits_TV = F.linear(hidden_TD, weight_VD).float()
    return F.cross_entropy(logits_TV, labels_T, ignore_index=-100)


def _torch_chunked():
    options = torch.nn.LinearCrossEntropyOptions()  # from torch 2.13
    return lambda hidden_TD, weight_VD, rows_M, targets_M: F.linear_cross_entropy(
        hidden_TD[rows_M], weight_VD, targets_M, options=options
    )


def _liger():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(hidden_TD, weight_VD, rows_M, targets_M):
        loss = LigerFusedLinearCrossEntropyFunction.apply(hidden_TD[rows_M], weight_VD, targets_M)
        return loss[0] if isinstance(loss, tuple) else loss  # newer ones add further results

    return run


def _cce():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden_TD, weight_VD, rows_M, targets_M: linear_cross_entropy(
        hidden_TD[rows_M], weight_VD, targets_M
    )


def _rivals(device: str, dtype: torch.dtype, full: bool) -> dict:
    rivals = of_backends("masked_token_loss", masked_token_loss, device, dtype)
    rivals |= {"eager": eager}
    if full:
        rivals |= {"hf full logits": hf_full_logits}
    if device == "cuda":
        rivals.pop("ours reference", None)  # fp32 on no tensor core: seconds a call, and no rival
        rivals |= importable(
            compile=lambda: torch.compile(eager, dynamic=False),
            torch_chunked=_torch_chunked, liger=_liger, cce=_cce,
        )  # fmt: skip
    return rivals


def cases(device: str) -> Iterator[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # (tokens, masked, D, V): Mistral-7B and Llama-2-7B at 20 % masked, Llama-3 8B, Gemma 2 2B
    sizes = [(16_384, 3_277, 4_096, 32_000), (16_384, 3_277, 4_096, 128_256),
             (5_120, 1_024, 2_304, 262_144)]  # fmt: skip
    for tokens, masked, width, vocab in [(512, 102, 576, 8_192)] if device == "cpu" else sizes:
        rivals = _rivals(device, dtype, full=vocab <= 32_000)
        size = (tokens, masked, width, vocab, dtype, device)
        yield _case(rivals, "frozen head", both, 4, size)
        yield _case(rivals, "trained head", both, 6, size, trained=True)
        yield _case(rivals, "forward", forward, 2, size)


def variants() -> Iterator[Case]:
    """Compiled, not measured: other dtypes, SmolLM2, a vocabulary that is no multiple of 64."""
    kinds = [(torch.bfloat16, 576, 49_152), (torch.bfloat16, 2_048, 32_001)]
    kinds += [(torch.bfloat16, 7, 37), (torch.float16, 2_048, 32_000), (torch.float32, 576, 49_152)]
    for dtype, width, vocab in kinds:
        rivals = _rivals("meta", dtype, full=False)
        size = (2_048, 410, width, vocab, dtype, "meta")
        yield _case(rivals, "trained head", both, 6, size, trained=True)
        yield _case(rivals, "forward", forward, 2, size)


def _case(rivals, what, timed, passes, size, trained=False) -> Case:
    tokens, masked, width, vocab, dtype, device = size

    def make():
        hidden_TD = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
        # Logits of about standard deviation 2, as trained models have them.
        weight_VD = torch.randn(vocab, width, device=device, dtype=dtype).mul_(2 / width**0.5)
        rows_M = torch.randperm(tokens, device=device)[:masked].sort().values
        targets_M = torch.randint(vocab, (masked,), device=device)
        return hidden_TD, weight_VD.requires_grad_(trained), rows_M, targets_M

    return Case(
        "masked_token_loss", what, f"T={tokens} M={masked} D={width} V={vocab}", dtype, make,
        {name: timed(run) for name, run in rivals.items()},
        flop=passes * masked * width * vocab,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_masked_token_loss", cases)

"""The contrastive loss of queries and their answers, with negatives from the batch and all ranks.

B queries, N docs of this rank, W ranks, D model; "rows" are what a softmax stands for, "columns"
what it runs over
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops._compiled import registered
from llm2vec_fast.ops.backend import choose, kernels

Keys = tuple[Tensor, Tensor, Tensor, Tensor]  # own, partner of rows; own, partner of columns
_NO_ROW, _NO_COLUMN = -1, -2  # identities that equal nothing
_SHORTEST = 1e-12


def info_nce(
    query_BD: Tensor,
    docs_ND: Tensor,
    scale: float = 20.0,
    symmetric: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    query_keys: Tensor | None = None,
    doc_keys: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of each query against all docs; logits are scale * cosine.

    query_BD:   (B, D) bf16/fp16/fp32, need not be normalised
    docs_ND:    (N, D) of the same dtype, N >= B: query i's answer is doc i, docs from B on are hard
                negatives, and every query sees every doc
    scale:      one over the temperature
    symmetric:  also the first B docs against all queries; the mean of both directions
    group:      a torch.distributed group: docs (and keys) of all its ranks are gathered, with
                gradient, and every rank must call with equal B and N. The loss stays the mean over
                this rank's B; gathered gradients are summed. So averaging the parameters' gradients
                over ranks, as DDP does, gives those of the loss over the whole batch. None: this
                rank alone
    query_keys: (B,) int64, equal for equal texts; doc_keys: (N,) likewise, in the same naming.
                A doc j other than query i's own answer is no negative, and left out, if its text
                is that of the answer (doc_keys[j] == doc_keys[i]) or of the query
                (doc_keys[j] == query_keys[i]), or if it answers the same query
                (query_keys[j] == query_keys[i]). Either may be given alone
    returns:    scalar fp32; 0 for B = 0. Gradients have the inputs' dtype. A vector shorter than
                1e-12 counts as zero: all its cosines are 0, and so is its gradient
    raises:     ValueError on shapes, dtypes, N < B, a scale that is not positive
    source:     van den Oord 2018, arXiv:1807.03748; keys and symmetry as in SimCSE,
                arXiv:2104.08821; scale 20 and cosine as LLM2Vec's HardNegativeNLLLoss

    On a GPU vectors are normalised in fp32, multiplied in fp16 (gradients of logits times 2^15) and
    summed in fp32; softmax in fp32. The gradients are computed together with the loss, so the B x N
    matrix exists only in chunks of rows: 3 products of 2*B*N*D; symmetric 4, or 3 where all rows
    fit the workspace of 768 MB; symmetric over ranks 6. The same bits every time.
    """
    call = (query_BD, docs_ND, scale, symmetric, query_keys, doc_keys)
    _check(*call)
    if group is None and torch.compiler.is_compiling():
        return _operator(query_BD, docs_ND, float(scale), symmetric, query_keys, doc_keys)
    return _run(*call, group)


def _run(query_BD, docs_ND, scale, symmetric, query_keys, doc_keys, group=None):
    loss = _fused if choose("info_nce", query_BD, docs_ND) == "triton" else _full_matrix
    return _across_ranks(loss, group, query_BD, docs_ND, scale, symmetric, query_keys, doc_keys)


def info_nce_ref(
    query_BD, docs_ND, scale=20.0, symmetric=False, group=None, *, query_keys=None, doc_keys=None
):
    call = (query_BD, docs_ND, scale, symmetric, query_keys, doc_keys)
    _check(*call)
    return _across_ranks(_full_matrix, group, *call)


def _check(query_BD, docs_ND, scale, symmetric, query_keys, doc_keys) -> None:
    shapes = f"query {tuple(query_BD.shape)}, docs {tuple(docs_ND.shape)}"
    if query_BD.dim() != 2 or docs_ND.dim() != 2 or query_BD.shape[1] != docs_ND.shape[1]:
        raise ValueError(f"info_nce: query must be (B, D) and docs (N, D), got {shapes}")
    if len(docs_ND) < len(query_BD):
        raise ValueError(f"info_nce: every query needs its doc, N >= B, got {shapes}")
    if query_BD.dtype != docs_ND.dtype or not query_BD.dtype.is_floating_point:
        raise ValueError(
            "info_nce: query and docs must have one floating dtype, got "
            f"{query_BD.dtype} and {docs_ND.dtype}"
        )
    if not scale > 0:
        raise ValueError(f"info_nce: scale must be positive, got {scale}")
    for name, keys, beside in (("query", query_keys, query_BD), ("doc", doc_keys, docs_ND)):
        if keys is not None and (keys.shape != beside.shape[:1] or keys.dtype != torch.int64):
            raise ValueError(
                f"info_nce: {name}_keys must be ({len(beside)},) int64, "
                f"got {tuple(keys.shape)} {keys.dtype}"
            )


def _across_ranks(loss: Callable, group, query, docs, scale, symmetric, query_keys, doc_keys):
    B, N = len(query), len(docs)
    if B == 0:  # no ranks are asked: B is 0 on all of them. Joined to the inputs for autograd
        return query.float().sum() + docs[:0].float().sum()
    world, rank = (
        (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
    )
    if world == 1:
        rows, columns = _identities(query_keys, doc_keys, query, docs, 1)
        keys = None if rows is None else (*rows[0], *columns)
        return loss(query, docs, scale, 0, symmetric, keys)
    if query_keys is not None:
        query_keys = _gathered(query_keys, group)
    if doc_keys is not None:
        doc_keys = _gathered(doc_keys, group)
    rows, columns = _identities(query_keys, doc_keys, query, docs, world)
    keys = None if rows is None else (*rows[rank], *columns)
    value = loss(query, _Gather.apply(docs, group), scale, rank * N, False, keys)
    if not symmetric:
        return value
    # The other direction with the roles exchanged: the rule of keys reads the same both ways.
    if rows is not None:
        keys = _exchanged(rows, rank)
    queries = _Gather.apply(query, group)
    return (value + loss(docs[:B], queries, scale, rank * B, False, keys)) / 2


def _identities(query_keys, doc_keys, query, docs, world):
    """Keys (of all ranks) as small int32 numbers, equal where keys are equal.

    returns: a pair (own, partner) of (B,) numbers for the rows of each rank, and one of (W * N,)
             numbers for all columns; (None, None) without keys. A query's partner is its answer, a
             doc's the query that it answers.
    """
    if query_keys is None and doc_keys is None:
        return None, None
    B, N = len(query), len(docs)
    given = torch.cat([keys for keys in (query_keys, doc_keys) if keys is not None])
    ordered = given.sort().values

    def small(keys, width, missing):
        if keys is None:
            return torch.full((world, width), missing, dtype=torch.int32, device=query.device)
        return torch.searchsorted(ordered, keys, out_int32=True).view(world, width)

    asked = small(query_keys, B, _NO_ROW)
    answered = small(doc_keys, N, _NO_ROW)[:, :B].contiguous()
    asking = torch.full((world, N), _NO_COLUMN, dtype=torch.int32, device=query.device)
    if query_keys is not None:
        asking[:, :B] = asked
    columns = small(doc_keys, N, _NO_COLUMN).view(-1), asking.view(-1)
    return list(zip(asked, answered, strict=True)), columns


def _exchanged(rows, rank) -> Keys:
    """Docs of one rank as rows, queries of all as columns."""
    asked, answered = (torch.cat(side) for side in zip(*rows, strict=True))
    own, partner = rows[rank][1], rows[rank][0]

    def column(numbers):
        return numbers.where(numbers != _NO_ROW, _NO_COLUMN)

    return own, partner, column(asked), column(answered)


def _gathered(x: Tensor, group) -> Tensor:
    everyone = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous(), group=group)
    return everyone


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in order; each rank gets back the sum of all gradients of its own."""

    @staticmethod
    def forward(ctx, x_RD, group):
        ctx.group = group
        return _gathered(x_RD, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_XD):
        group = ctx.group
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = len(d_XD) // world
        if "nccl" in dist.get_backend(group):
            d_RD = d_XD.new_empty(rows, d_XD.shape[1])
            dist.reduce_scatter_tensor(d_RD, d_XD.contiguous(), group=group)
            return d_RD, None
        d_XD = d_XD.clone(memory_format=torch.contiguous_format)  # gloo's reduction is in place
        dist.all_reduce(d_XD, group=group)
        return d_XD[rank * rows : (rank + 1) * rows], None


def _fused(rows_BD, columns_ND, scale, first, symmetric, keys: Keys | None) -> Tensor:
    needs_grad = rows_BD.requires_grad or columns_ND.requires_grad
    if torch.is_grad_enabled() and needs_grad:
        return _InfoNCE.apply(rows_BD, columns_ND, scale, first, symmetric, keys)
    return kernels("info_nce").forward(rows_BD, columns_ND, float(scale), first, symmetric, keys)[0]


class _InfoNCE(torch.autograd.Function):
    """The loss is the last node of a graph: its gradients are computed in forward, where the logits
    are, and only multiplied by what comes back.
    """

    @staticmethod
    def forward(ctx, rows_BD, columns_ND, scale, first, symmetric, keys):
        loss, drows_BD, dcolumns_ND = kernels("info_nce").forward(
            rows_BD, columns_ND, float(scale), first, symmetric, keys, *ctx.needs_input_grad[:2]
        )
        ctx.dtype = rows_BD.dtype
        ctx.save_for_backward(drows_BD, dcolumns_ND)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        scaled = kernels("info_nce").scaled
        drows_BD, dcolumns_ND = (
            None if saved is None else scaled(saved, dloss, ctx.dtype)
            for saved in ctx.saved_tensors
        )
        return drows_BD, dcolumns_ND, None, None, None, None


def _full_matrix(rows_BD, columns_ND, scale, first, symmetric, keys: Keys | None) -> Tensor:
    cosine_BN = _unit(rows_BD) @ _unit(columns_ND).t()
    B, N = cosine_BN.shape
    logits_BN = scale * cosine_BN
    answer_B = first + torch.arange(B, device=rows_BD.device)
    if keys is not None:
        own, partner = keys[0][:, None], keys[1][:, None]
        same_BN = (keys[2] == own) | (keys[2] == partner) | (keys[3] == own)
        beside_BN = torch.arange(N, device=rows_BD.device) != answer_B[:, None]
        logits_BN = logits_BN.masked_fill(same_BN & beside_BN, float("-inf"))
    loss = F.cross_entropy(logits_BN, answer_B)
    if symmetric:
        loss = (loss + F.cross_entropy(logits_BN[:, :B].t(), answer_B)) / 2
    return loss


def _unit(x_RD: Tensor) -> Tensor:
    x_RD = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    norm_R1 = torch.linalg.vector_norm(x_RD, dim=1, keepdim=True)
    # Where, not F.normalize: its gradient of a zero vector is 1e12 times what arrives.
    is_zero_R1 = norm_R1 <= _SHORTEST
    return (x_RD / norm_R1.masked_fill(is_zero_R1, 1.0)).masked_fill(is_zero_R1, 0.0)


def _fake(query_BD, *_):
    return query_BD.new_empty((), dtype=torch.promote_types(query_BD.dtype, torch.float32))


_operator = registered(
    "info_nce",
    "(Tensor query, Tensor docs, float scale, bool symmetric, Tensor? query_keys, "
    "Tensor? doc_keys) -> Tensor",
    _run,
    _fake,
)

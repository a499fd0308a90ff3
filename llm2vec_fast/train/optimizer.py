"""AdamW over the trainable parameters as one fp32 vector.

All parameters are views of a few long vectors, and so are their gradients: one kernel each to
clear, to sum over ranks, to measure and to step, however many parameters there are. Parameters in
bf16 (full fine-tuning) are rounded copies of the fp32 vector; their gradients are added up in fp32
as they arrive, so that many chunks lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llm2vec_fast.train.ranks import Ranks

Named = tuple[str, nn.Parameter]


class Vector:
    """Parameters end to end in fp32, with their gradient."""

    def __init__(self, named: list[Named], weight_decay: float):
        self.named, self.weight_decay = named, weight_decay
        device = named[0][1].device
        size = sum(p.numel() for _, p in named)
        self.values = torch.empty(size, device=device)
        self.grad = torch.zeros(size, device=device)
        self.values.grad = self.grad
        self.rounded: list[tuple[Tensor, Tensor]] = []  # (parameter, its place in `values`)
        at = 0
        for _, parameter in named:
            place = slice(at, at + parameter.numel())
            at = place.stop
            value = self.values[place].view(parameter.shape)
            grad = self.grad[place].view(parameter.shape)
            value.copy_(parameter.detach())
            if parameter.dtype == torch.float32:
                parameter.data, parameter.grad = value, grad
            else:
                self.rounded.append((parameter.detach(), value))
                parameter.register_post_accumulate_grad_hook(_adder(grad))


def _adder(total: Tensor):
    def add(parameter: Tensor) -> None:
        total.add_(parameter.grad)
        parameter.grad = None

    return add


class Optimizer:
    """Fused AdamW with decoupled weight decay, and clipping by the global norm.

    Norms and biases are not decayed, as in transformers' Trainer.
    """

    def __init__(
        self,
        named: Iterable[Named],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        trainable = [(name, p) for name, p in named if p.requires_grad]
        if not trainable:
            raise ValueError("no parameter asks for a gradient: nothing can be trained")
        self.max_grad_norm = max_grad_norm
        matrices = [pair for pair in trainable if pair[1].dim() > 1]
        others = [pair for pair in trainable if pair[1].dim() <= 1]
        kinds = ((matrices, weight_decay), (others, 0.0))
        self.vectors = [Vector(pairs, decay) for pairs, decay in kinds if pairs]
        groups = [{"params": [v.values], "weight_decay": v.weight_decay} for v in self.vectors]
        self.adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)

    def clear(self) -> None:
        for vector in self.vectors:
            vector.grad.zero_()

    @torch.no_grad()
    def step(self, ranks: Ranks) -> Tensor:
        """Averages the gradients over ranks, clips, steps. Returns the norm before clipping, 0-d
        on the device; nothing waits for it. max_grad_norm = 0 never clips.
        """
        for vector in self.vectors:
            ranks.mean_(vector.grad)
        norms = [torch.linalg.vector_norm(vector.grad) for vector in self.vectors]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if self.max_grad_norm > 0:
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for vector in self.vectors:
                vector.grad.mul_(factor)
        self.adamw.step()
        for vector in self.vectors:
            if vector.rounded:
                kept, values = zip(*vector.rounded, strict=True)
                torch._foreach_copy_(list(kept), list(values))
        return norm

    def layout(self) -> list[list]:
        """Names and shapes in order: what the vectors of a checkpoint must have been made of."""
        return [[name, list(p.shape)] for vector in self.vectors for name, p in vector.named]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        out = {}
        for number, vector in enumerate(self.vectors):
            state = self.adamw.state[vector.values]
            out |= {f"{name}.{number}": state[name] for name in ("step", "exp_avg", "exp_avg_sq")}
            out[f"values.{number}"] = vector.values
        return out

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `tensors` of an optimizer of the same layout gave, bit for bit."""
        for number, vector in enumerate(self.vectors):
            vector.values.copy_(tensors[f"values.{number}"])
            for parameter, value in vector.rounded:
                parameter.copy_(value)
            # Copies: the next step changes them in place.
            self.adamw.state[vector.values] = {
                name: tensors[f"{name}.{number}"].to(vector.values.device, copy=True)
                for name in ("step", "exp_avg", "exp_avg_sq")
            }

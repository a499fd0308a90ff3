"""A frozen base spread over the GPUs of a run (FSDP2), for bases that one GPU does not hold.

Each layer is gathered just before it computes and let go right after. The adapters stay whole on
every rank: they are small, and their gradients are averaged like anybody's.
"""

from __future__ import annotations

import torch
from torch import nn

from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.transformer import Lora, Transformer


def shard_base(model: Transformer, device: torch.device) -> None:
    """Shards the frozen weights of a model over all ranks, layer by layer; adapters move whole.

    The process group must be there. The weights may still be on the CPU: each rank takes its part
    to its device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    adapters: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Lora):
            module.to(device)
            adapters |= set(module.parameters())
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    fully_shard(model, mesh=mesh, ignored_params=adapters)
    # The first pass makes the buffers that layers are gathered into. Made by an evaluation they
    # would be inference tensors, which a training pass may not write to.
    with torch.no_grad():
        model(PackedBatch.build([[0]], device=device))

"""A frozen base that is spread over the processes of a run (FSDP2): each keeps 1/n of the rows of every weight.

A block's weights are gathered for its forward and its backward pass, and dropped again. The links are not sharded: they
are small, and every process needs them whole. How one folds into such a weight, `layers.weights.sharded` says.
"""

from __future__ import annotations

import torch
from torch import nn

from .targets import block_of


def shard(model: nn.Module, device: torch.device) -> None:
    """Freeze `model` and keep on `device` only this process's rows of its parameters, block by block."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.requires_grad_(False)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for block in dict.fromkeys(block_of(name) for name in linears if block_of(name) != name):
        fully_shard(model.get_submodule(block), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)

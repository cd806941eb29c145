"""A frozen base that is spread over the processes of a run (FSDP2): each keeps 1/n of the rows of every weight.

A block's weights are gathered for its forward and its backward pass, and dropped again. The links are not sharded: they
are small, every process needs them whole, and a process folds a link into its own rows without asking the others.
What adds up a fold's report over the processes is the only message of a fold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cola_kernels import FoldReport
from cola_kernels.reference import fold_report

from ..errors import UserError
from .factors import Factors
from .targets import block_of


class Rows(NamedTuple):
    """The rows [first, first + n) of a weight, which this process has. They share the weight's memory."""

    weight: Tensor  # [n, K]
    first: int
    mesh: Any  # the processes that have the others; None where the weight is whole


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


def is_sharded(weight: Tensor) -> bool:
    return hasattr(weight, "device_mesh")


def whole(weight: Tensor) -> Tensor:
    """All rows: of a sharded weight a copy, which every process has to ask for."""
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def own_rows(weight: Tensor) -> Rows:
    """Raises UserError for a weight that is spread in another way than by its rows."""
    weight = weight.detach()
    if not is_sharded(weight):
        return Rows(weight, 0, None)
    sharded: Any = weight
    if sharded.device_mesh.ndim != 1 or not sharded.placements[0].is_shard(0):
        raise UserError(
            f"A weight is spread as {sharded.placements} over {sharded.device_mesh}, but a link folds into whole "
            "weights and into rows over one group of processes only: shard the model with fully_shard."
        )
    mesh, n = sharded.device_mesh, len(sharded)
    each = -(-n // mesh.size())  # as torch.chunk cuts
    return Rows(sharded.to_local(), min(n, each * mesh.get_local_rank()), mesh)


def over_all(report: FoldReport, rows: Rows, factors: Factors) -> FoldReport:
    """The report on the whole weight, from every process's report on its own rows."""
    import torch.distributed as dist

    end = rows.first + len(rows.weight)
    a, b = factors.a.double(), factors.b[rows.first : end].double() * factors.scale
    delta_sq = torch.sum((b.t() @ b) * (a @ a.t()))  # |B A|² without B A
    sums = torch.stack([report.retained * delta_sq, delta_sq, report.error**2 * delta_sq]).to(rows.weight.device)
    dist.all_reduce(sums, group=rows.mesh.get_group())
    return fold_report(*sums)

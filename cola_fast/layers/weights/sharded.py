"""Dense weights that are spread over the processes of a run (FSDP2): each has 1/n of the rows, see `layers.sharding`.

A process folds a link into its own rows without asking the others. A fold sends one message: the sums of its report.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cola_kernels import FoldReport
from cola_kernels.reference import fold_report

from ...errors import UserError
from ..factors import Factors
from .dense import Dense, merge, stays_finite


class Rows(NamedTuple):
    """The rows [first, first + n) of a weight, which this process has. They share the weight's memory."""

    weight: Tensor  # [n, K]
    first: int
    mesh: Any  # the processes that have the others


class Sharded(Dense):
    """A DTensor. To read all of it makes a copy, which every process has to ask for."""

    linear = ""
    in_one_piece = False

    @classmethod
    def recognises(cls, tensor: Tensor) -> bool:
        return hasattr(tensor, "device_mesh")

    @classmethod
    def held_by(cls, linear: type[nn.Module]) -> bool:
        return False

    def untrainable(self) -> str | None:
        return "spread over several processes"

    def parts(self) -> list[Tensor]:
        return [self.dense()]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = whole(self.tensor.detach())
        return weight if dtype is None else weight.to(dtype)

    def own_rows(self) -> Rows:
        """Raises UserError for a weight that is spread in another way than by its rows."""
        weight = self.tensor.detach()
        if weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            raise UserError(
                f"A weight is spread as {weight.placements} over {weight.device_mesh}, but a link folds into whole "
                "weights and into rows over one group of processes only: shard the model with fully_shard."
            )
        mesh, n = weight.device_mesh, len(weight)
        each = -(-n // mesh.size())  # as torch.chunk cuts
        return Rows(weight.to_local(), min(n, each * mesh.get_local_rank()), mesh)

    def fold(self, factors: Factors, *, rounding: str, seed: int, report: bool) -> FoldReport | None:
        rows, update = self.own_rows(), factors.folded()
        mine = update.rows(rows.first, len(rows.weight))
        found = merge(rows.weight, mine, rounding=rounding, seed=seed, first_row=rows.first, report=report)
        return None if found is None else _over_all(found, rows, update)

    def holds(self, factors: Factors) -> bool:
        rows = self.own_rows()
        return stays_finite(rows.weight, factors.folded().rows(rows.first, len(rows.weight)))


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, sharded or not."""
    return tensor.full_tensor() if Sharded.recognises(tensor) else tensor  # type: ignore[attr-defined]


def _over_all(report: FoldReport, rows: Rows, factors: Factors) -> FoldReport:
    """The report on the whole weight, from every process's report on its own rows."""
    import torch.distributed as dist

    end = rows.first + len(rows.weight)
    a, b = factors.a.double(), factors.b[rows.first : end].double() * factors.scale
    delta_sq = torch.sum((b.t() @ b) * (a @ a.t()))  # |B A|² without B A
    sums = torch.stack([report.retained * delta_sq, delta_sq, report.error**2 * delta_sq]).to(rows.weight.device)
    dist.all_reduce(sums, group=rows.mesh.get_group())
    return fold_report(*sums)

"""Dense weights: 16, 32 or 64 bits a number, changed in place by a fold."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_kernels import FoldReport, merge_

from ..factors import Factors
from ..output_gate import output_gate, row_squares
from .weight import Weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS = 64  # of a weight that are computed at once to see whether they stay finite


class Dense(Weight):
    """A plain parameter; the last kind, which every tensor is that is no other."""

    title = "dense"
    linear = "a plain torch.nn.Linear"
    bases = ("dense", "nf4", "ledger")
    quantised = False

    @classmethod
    def recognises(cls, tensor: Tensor) -> bool:
        return True

    @classmethod
    def held_by(cls, linear: type[nn.Module]) -> bool:
        return linear is nn.Linear

    def obstacle(self) -> str | None:
        if self.tensor.dtype in DTYPES:
            return None
        dtype = self.tensor.dtype
        return f"has a weight of {dtype}, but a link needs one of 16, 32 or 64 bits: load the model in 16 bits."

    def untrainable(self) -> str | None:
        return None if self.tensor.is_floating_point() else "quantised"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.tensor.dtype
        return dtype

    def use_in(self, dtype: torch.dtype) -> None:
        if self.tensor.is_floating_point():
            self.tensor.data = self.tensor.data.to(dtype)

    def describe(self) -> str | None:
        return None

    def parts(self) -> list[Tensor]:
        return [self.tensor.detach()]

    def numbers(self) -> dict[str, Tensor]:
        return {"": self.tensor}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        weight: Tensor = self.tensor.detach()
        return weight if dtype is None else weight.to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.tensor, bias)

    def fold(self, factors: Factors, *, rounding: str, seed: int, report: bool) -> FoldReport | None:
        return merge(self.tensor.detach(), factors, rounding=rounding, seed=seed, report=report)

    def holds(self, factors: Factors) -> bool:
        return stays_finite(self.tensor.detach(), factors.folded())


def merge(weight: Tensor, factors: Factors, **options: Any) -> FoldReport | None:
    """`merge_` of a whole update, its gates included, into a dense weight."""
    update = factors.folded()
    a, b = update.a.to(weight.device), update.b.to(weight.device)
    c = None
    if update.magnitude is not None:
        magnitude = update.magnitude.to(weight.device)
        c = output_gate(magnitude, row_squares(weight), weight, a, b, update.scale)
    return merge_(weight, a, b, update.scale, c=c, **options)


def stays_finite(weight: Tensor, update: Factors) -> bool:
    """Whether `W + scale · B A` is finite in W's dtype wherever W is.

    No N x K matrix is made: the entries of a row have a bound. Only where it is too high, which is nearly never, is the
    row computed, a few rows at a time.
    """
    if not weight.numel():
        return True
    most = torch.finfo(weight.dtype).max
    if update.magnitude is not None:
        return float(update.magnitude.abs().max()) <= most  # rows will be of that length
    bounds = (update.b.double().abs() @ update.a.double().abs().amax(1)) * abs(update.scale)  # [N], of B A
    if float(torch.stack(torch.aminmax(weight)).abs().max()) + float(bounds.max()) <= most:
        return True
    a, b = update.a.to(weight.device), update.b.to(weight.device)
    for part, rows in zip(weight.split(ROWS), b.split(ROWS), strict=True):
        folded = torch.addmm(part.to(a.dtype), rows, a, alpha=update.scale)
        if bool(((folded.abs() > most) & part.isfinite()).any()):
            return False
    return True

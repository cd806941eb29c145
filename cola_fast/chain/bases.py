"""Bases: where a module's sealed links live. One small class a kind, chosen once for a chain.

dense    in the weights, fp32, bf16 or fp16. Rounded once; nothing grows.
nf4      in the 4-bit codes of bitsandbytes weights, scales frozen. Nothing grows, but a fold has noise, as large as
         that of quantising; what it kept is reported. A replay needs no more than the seed. `cola_kernels` can also
         round by activations, and carry part of the noise into the next link, for a fold of one's own: both need the
         second moments of every layer's inputs at every knot, for the last 0.1 or 0.2 % of a chain's gain.
ledger   beside weights that never change, as frozen factors in the same fused op. Exact on any weights; memory and
         time grow by R (N + K) numbers a module with every link.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cola_kernels import FoldReport, merge_, nf4_merge_

from ..errors import UserError
from ..layers.factors import Factors
from ..layers.layer import LoRALinear, is_nf4
from ..layers.output_gate import output_gate, row_squares
from ..layers.sharding import over_all, own_rows

ROWS = 64  # of a weight that are computed at once to see whether they stay finite
ROUNDINGS = ("auto", "nearest", "stochastic")


class Base(Protocol):
    kind: str
    rounding: str

    @property
    def merging(self) -> str:
        """How links are rounded that go into a copy of the weights: nearest or stochastic."""
        return "nearest" if self.rounding == "nearest" else "stochastic"

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        """Make `factors` part of the layer's base. The same arguments on the same base give the same bits."""
        ...

    def holds(self, layer: LoRALinear, factors: Factors) -> bool:
        """Whether folding finite `factors` would leave finite numbers, in this process's rows."""
        ...


class DenseBase(Base):
    """fp32, bf16 or fp16 weights, changed in place: `W += scale · B A`, fp32 arithmetic, rounded once. With a magnitude
    rows are then scaled, before that rounding."""

    kind = "dense"

    def __init__(self, rounding: str) -> None:
        self.rounding = rounding

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        rows = own_rows(layer.weight)
        update = factors.folded().rows(rows.first, len(rows.weight))
        found = merge(rows.weight, update, rounding=self.rounding, seed=seed, first_row=rows.first, report=report)
        return over_all(found, rows, factors.folded()) if found is not None and rows.mesh is not None else found

    def holds(self, layer: LoRALinear, factors: Factors) -> bool:
        rows = own_rows(layer.weight)
        return _stays_finite(rows.weight, factors.folded().rows(rows.first, len(rows.weight)))


class NF4Base(DenseBase):
    """NF4 weights, changed in place; weights that the model keeps dense, as in `DenseBase`."""

    kind = "nf4"

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        if not is_nf4(layer):
            return super().fold(layer, factors, seed, report=report)
        a, b = factors.a.to(layer.weight.device), factors.b.to(layer.weight.device)
        return nf4_merge_(layer.weight, a, b, factors.scale, rounding=self.rounding, seed=seed)

    def holds(self, layer: LoRALinear, factors: Factors) -> bool:
        return is_nf4(layer) or super().holds(layer, factors)  # codes stay codes, and scales are frozen


class LedgerBase(Base):
    """Weights that never change: links are kept as concatenated frozen factors, in the dtype the layer computes in."""

    kind = "ledger"
    rounding = "auto"  # nothing is rounded

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        dtype, device = layer.compute_dtype, layer.weight.device
        a, b = factors.a.to(device, dtype), factors.scaled().to(device, dtype)
        if layer.ledger is not None:
            a, b = (torch.cat(parts, dim) for dim, parts in enumerate(zip(layer.ledger, (a, b), strict=True)))
        layer.ledger_A, layer.ledger_B = a, b
        return FoldReport(retained=1.0, error=0.0) if report else None

    def holds(self, layer: LoRALinear, factors: Factors) -> bool:
        a, b = factors.folded().a, factors.folded().b.double() * factors.scale
        return max(float(a.abs().max()), float(b.abs().max())) <= torch.finfo(layer.compute_dtype).max


def merge(weight: Tensor, factors: Factors, **options: Any) -> FoldReport | None:
    """`merge_` of a whole update, its gates included, into a dense weight."""
    update = factors.folded()
    a, b = update.a.to(weight.device), update.b.to(weight.device)
    c = None
    if update.magnitude is not None:
        magnitude = update.magnitude.to(weight.device)
        c = output_gate(magnitude, row_squares(weight), weight, a, b, update.scale)
    return merge_(weight, a, b, update.scale, c=c, **options)


def _stays_finite(weight: Tensor, update: Factors) -> bool:
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


def choose_base(kind: str, rounding: str, modules: Iterable[nn.Linear]) -> Base:
    """`auto` is dense for dense weights and ledger where there are NF4 ones: exact, and small next to the model for the
    few links that chains have. `rounding` auto is stochastic, which keeps in expectation all of an update that is
    smaller than the spacing of 16-bit or 4-bit weights; fp32 weights do not need it.

    Raises UserError for an unknown name, and for dense where weights are NF4 or nf4 where none is.
    """
    any_nf4 = any(map(is_nf4, modules))
    if kind == "auto":
        kind = "ledger" if any_nf4 else "dense"
    if kind not in ("dense", "nf4", "ledger"):
        raise UserError(f"base is {kind!r}, but must be auto, dense, nf4 or ledger.")
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding is {rounding!r}, but must be one of {', '.join(ROUNDINGS)}.")
    if kind == "dense" and any_nf4:
        raise UserError("base is dense, but the model's weights are NF4: use nf4, ledger or auto.")
    if kind == "nf4" and not any_nf4:
        raise UserError("base is nf4, but no targeted weight is NF4: load the model in 4 bits, or use dense or auto.")
    if kind == "ledger":
        return LedgerBase()
    return {"dense": DenseBase, "nf4": NF4Base}[kind]("stochastic" if rounding == "auto" else rounding)

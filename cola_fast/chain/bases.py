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
from typing import Protocol

import torch
from torch import nn

from cola_kernels import FoldReport

from ..errors import UserError
from ..layers import weights
from ..layers.factors import Factors
from ..layers.layer import LoRALinear
from ..layers.weights.nf4 import NF4

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
    """Weights changed in place, each as its kind is: `W += scale · B A`, fp32 arithmetic, rounded once. With a
    magnitude rows are then scaled, before that rounding."""

    kind = "dense"

    def __init__(self, rounding: str) -> None:
        self.rounding = rounding

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        return weights.of(layer).fold(factors, rounding=self.rounding, seed=seed, report=report)

    def holds(self, layer: LoRALinear, factors: Factors) -> bool:
        return weights.of(layer).holds(factors)


class NF4Base(DenseBase):
    """The same where some weights are NF4: their codes change. Weights that the model keeps dense are as ever."""

    kind = "nf4"


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


def choose_base(kind: str, rounding: str, modules: Iterable[nn.Linear]) -> Base:
    """`auto` is dense for dense weights and ledger where there are quantised ones: exact, and small next to the model
    for the few links that chains have. `rounding` auto is stochastic, which keeps in expectation all of an update that
    is smaller than the spacing of 16-bit or 4-bit weights; fp32 weights do not need it.

    Raises UserError for an unknown name, and for one that does not suit the weights.
    """
    found = [weights.of(module) for module in modules]
    any_nf4 = any(isinstance(weight, NF4) for weight in found)
    if kind == "auto":
        kind = "ledger" if any(weight.quantised for weight in found) else "dense"
    if kind not in ("dense", "nf4", "ledger"):
        raise UserError(f"base is {kind!r}, but must be auto, dense, nf4 or ledger.")
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding is {rounding!r}, but must be one of {', '.join(ROUNDINGS)}.")
    for weight in found:
        if kind not in weight.bases:
            raise UserError(
                f"base is {kind}, but the model's weights are {weight.title}: use {', '.join(weight.bases)} or auto."
            )
    if kind == "nf4" and not any_nf4:
        raise UserError("base is nf4, but no targeted weight is NF4: load the model in 4 bits, or use dense or auto.")
    if kind == "ledger":
        return LedgerBase()
    return {"dense": DenseBase, "nf4": NF4Base}[kind]("stochastic" if rounding == "auto" else rounding)

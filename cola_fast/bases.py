"""Bases: where a module's sealed links live. One small class a kind, chosen once for a chain."""

from __future__ import annotations

from typing import Protocol

from cola_kernels import FoldReport, merge_

from .errors import UserError
from .layer import LoRALinear
from .peft_format import Factors


class Base(Protocol):
    kind: str
    rounding: str

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        """Make `factors` part of the layer's base. The same arguments on the same base give the same bits."""
        ...


class DenseBase:
    """fp32, bf16 or fp16 weights, changed in place: `W += scale · B A`, fp32 arithmetic, rounded once."""

    kind = "dense"

    def __init__(self, rounding: str) -> None:
        self.rounding = rounding

    def fold(self, layer: LoRALinear, factors: Factors, seed: int, *, report: bool) -> FoldReport | None:
        weight = layer.weight.data
        a, b = factors.a.to(weight.device), factors.b.to(weight.device)
        return merge_(weight, a, b, factors.scale, rounding=self.rounding, seed=seed, report=report)


def choose_base(kind: str, rounding: str) -> Base:
    """`auto` is dense: the only kind of weights `attach` takes so far. Its rounding is `stochastic`, which keeps in
    expectation all of an update that is smaller than a 16-bit weight's spacing; fp32 weights do not need it."""
    if kind not in ("auto", "dense"):
        raise UserError(f"base is {kind!r}, but must be auto or dense.")
    if rounding not in ("auto", "nearest", "stochastic"):
        raise UserError(f"rounding is {rounding!r}, but must be auto, nearest or stochastic.")
    return DenseBase("stochastic" if rounding == "auto" else rounding)

"""`LoRALinear`: a linear layer whose frozen weight carries an open LoRA link.

A linear becomes a LoRALinear by changing its class, and goes back the same way. The object stays the one the model,
its hooks and its state dict already know: nothing is re-registered, copied or renamed, and `weight` keeps its storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cola_kernels import merge_

from ..errors import UserError
from . import weights
from .grouping import Grouping, Operands
from .obstacles import obstacle
from .output_gate import row_squares
from .weights.weight import Weight

BUFFERS = ("ledger_A", "ledger_B", "row_squares")
GATES = ("lora_e", "lora_magnitude")
PARTS = ("lora_A", "lora_B", *GATES)  # what a link trains, gates only if it has them


class LoRALinear(nn.Linear):
    """`y = x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ + bias`: W [N, K] and bias frozen, lora_A [R, K] and lora_B [N, R] trained.

    A link may also train gates: lora_e [R] on the inner product, or lora_magnitude [N], from which DoRA's gate on the
    output comes, see `layers.output_gate`. W is of one of the kinds of `layers.weights`. Between `close` and `open`
    there is no link and it is the plain linear. Dropout acts in training mode only. Layers of one `grouping` that read
    the same x run as one op and share a dropout mask, see `layers.grouping`.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_e: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    row_squares: Tensor | None  # [N], of the weight; with lora_magnitude
    ledger_A: Tensor | None  # [sum of R, K], sealed links that stay beside the weight, see `chain.bases`
    ledger_B: Tensor | None  # [N, sum of R], scales included
    scale: float
    dropout: float
    folded: int  # sealed links that are part of the base; makes folding idempotent
    grouping: Grouping
    plain: type[nn.Linear]  # the class it came from
    kind: type[Weight]  # of its weight, but that a dense one may be sharded later

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str = "the module", grouping: Grouping | None = None) -> LoRALinear:
        """Turn `linear` into a LoRALinear, in place. Raises UserError where there is an `obstacle`."""
        if isinstance(linear, cls):
            raise UserError(f"{name} already belongs to a chain: call chain.detach() before attaching another.")
        found = obstacle(linear)
        if found is not None:
            raise UserError(f"{name} {found}")
        plain, kind = type(linear), type(weights.of(linear))
        layer = cast(LoRALinear, linear)
        layer.__class__ = cls
        layer.plain, layer.kind = plain, kind
        for key in PARTS:
            layer.register_parameter(key, None)
        for key in BUFFERS:
            layer.register_buffer(key, None, persistent=False)
        layer.scale = layer.dropout = 0.0
        layer.folded = 0
        layer.grouping = grouping or Grouping()
        return layer

    def to_linear(self) -> nn.Linear:
        """Back to the plain linear, with whatever has been folded into its weight, but without a ledger."""
        self.close()
        linear = cast(nn.Linear, self)
        linear.__class__ = self.plain
        for key in (*PARTS, *BUFFERS, "scale", "dropout", "folded", "grouping", "plain", "kind"):
            delattr(linear, key)
        return linear

    @property
    def ledger(self) -> tuple[Tensor, Tensor] | None:
        """A [sum of R, K] and B [N, sum of R] of the sealed links beside the weight, if there are any."""
        return None if self.ledger_A is None or self.ledger_B is None else (self.ledger_A, self.ledger_B)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the base is used in: a quantised weight's is that of the weight it was quantised from."""
        return weights.of(self).dtype

    def dense_weight(self) -> Tensor:
        """`[N, K]`: the weight with every sealed link in it, in `compute_dtype`. A copy, but for a dense weight without
        a ledger. The ledger is rounded stochastically, always with the same draws."""
        found = weights.of(self)
        weight = found.dense()
        return self.with_ledger(weight, copy=not found.quantised)

    def with_ledger(self, weight: Tensor, *, copy: bool = True) -> Tensor:
        """`weight` [N, K] with the sealed links in it that stand beside this layer's."""
        if self.ledger is not None:
            weight = weight.clone() if copy else weight
            merge_(weight, *self.ledger, 1.0, rounding="stochastic")
        return weight

    def open(
        self,
        a: Tensor,
        b: Tensor,
        *,
        scale: float,
        dropout: float,
        e: Tensor | None = None,
        magnitude: Tensor | None = None,
    ) -> None:
        """Start a link from a [R, K], b [N, R] and its gates; they become parameters on the weight's device.

        Raises UserError for a magnitude on a weight that is spread over processes: its rows' norms need all of it.
        """
        if magnitude is not None and not weights.of(self).in_one_piece:
            raise UserError("A gate on the output (DoRA) needs whole weights, but the model is sharded: leave out one.")
        for key, value in zip(PARTS, (a, b, e, magnitude), strict=True):
            setattr(self, key, None if value is None else nn.Parameter(value.to(self.weight.device)))
        self.row_squares = None if magnitude is None else row_squares(self.weight)
        self.scale, self.dropout = scale, dropout
        self.grouping.forget(self)

    def close(self) -> None:
        self.lora_A = self.lora_B = self.lora_e = self.lora_magnitude = self.row_squares = None
        self.grouping.forget(self)

    def operands(self) -> Operands | None:
        """Of the op this layer is; None without a link."""
        a, b = self.lora_A, self.lora_B
        if a is not None and b is not None:
            dropout = self.dropout if self.training else 0.0
            gates = self.lora_e, self.lora_magnitude, self.row_squares
            return Operands(self.weight, a, b, self.scale, self.bias, dropout, self.ledger_A, self.ledger_B, *gates)
        return None if self.ledger is None else Operands(self.weight, *self.ledger, 1.0, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        operands = self.operands()
        if operands is None:
            return weights.of(self).product(input, self.bias)
        if self.kind.multiplies:
            return operands.added_to(weights.of(self).product(input, self.bias), input)
        return operands.complete(self.grouping(self, operands, input), input)

    def rescales(self) -> bool:
        """Whether a gate on the output has been trained: the weight's rows are to be of other lengths."""
        if self.lora_magnitude is None or self.row_squares is None:
            return False
        return not torch.equal(self.lora_magnitude.detach(), self.row_squares.sqrt().to(self.lora_magnitude.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        """`model.half()` and the like: squares of rows are fp32 at least, whatever becomes of the weight."""
        super()._apply(fn, recurse)
        weights.of(self).moved()
        if self.row_squares is not None:
            self.row_squares = row_squares(self.weight)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """With what a quantised weight needs to be read again."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in weights.of(self).state().items():
            destination[f"{prefix}{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected, weight = args[3], weights.of(self)
        for key in weight.state():
            if f"{prefix}{key}" in unexpected and weight.take(key, state_dict[f"{prefix}{key}"]):
                unexpected.remove(f"{prefix}{key}")

    def extra_repr(self) -> str:
        rank = "no open link" if self.lora_A is None else f"r={self.lora_A.shape[0]}, scale={self.scale:g}"
        return f"{super().extra_repr()}, {rank}"


def wrap_all(modules: Mapping[str, nn.Linear], grouping: Grouping) -> dict[str, LoRALinear]:
    """Turn linears into LoRALinears of one grouping, in place: all, or with a UserError none."""
    done: dict[str, LoRALinear] = {}
    try:
        for name, module in modules.items():
            done[name] = LoRALinear.from_linear(module, name, grouping)
    except UserError:
        for layer in done.values():
            layer.to_linear()
        raise
    return done


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Links are kept in fp32, so that AdamW's small steps are not rounded away; fp64 for an fp64 model."""
    return torch.promote_types(weight.dtype, torch.float32)

"""`LoRALinear`: an `nn.Linear` whose frozen weight carries an open LoRA link.

A Linear becomes a LoRALinear by changing its class, and goes back the same way. The object stays the one the model,
its hooks and its state dict already know: nothing is re-registered, copied or renamed, and `weight` keeps its storage.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .grouping import Grouping, Operands


class LoRALinear(nn.Linear):
    """`y = x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ + bias`: W [N, K] and bias frozen, lora_A [R, K] and lora_B [N, R] trained.

    Between `close` and `open` there is no link and it is the plain linear. Dropout acts in training mode only. Layers
    of one `grouping` that read the same x run as one op and share a dropout mask, see `cola_fast.grouping`.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    scale: float
    dropout: float
    folded: int  # sealed links already folded into `weight`; makes folding idempotent
    grouping: Grouping

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str = "the module", grouping: Grouping | None = None) -> LoRALinear:
        """Turn `linear` into a LoRALinear, in place. Raises UserError for anything but a plain `nn.Linear`."""
        if isinstance(linear, cls):
            raise UserError(f"{name} already belongs to a chain: call chain.detach() before attaching another.")
        if type(linear) is not nn.Linear:
            raise UserError(
                f"{name} is a {type(linear).__module__}.{type(linear).__name__}, but a link can only be attached to a "
                "plain torch.nn.Linear: choose other targets."
            )
        if "forward" in vars(linear):
            raise UserError(
                f"{name} has had its forward replaced by another library (accelerate's device_map does this), which "
                "would bypass the link: load the model without it."
            )
        layer = cast(LoRALinear, linear)
        layer.__class__ = cls
        layer.register_parameter("lora_A", None)
        layer.register_parameter("lora_B", None)
        layer.scale = layer.dropout = 0.0
        layer.folded = 0
        layer.grouping = grouping or Grouping()
        return layer

    def to_linear(self) -> nn.Linear:
        """Back to the plain linear, with whatever has been folded into its weight."""
        self.close()
        del self._parameters["lora_A"], self._parameters["lora_B"], self.scale, self.dropout, self.folded, self.grouping
        linear = cast(nn.Linear, self)
        linear.__class__ = nn.Linear
        return linear

    def open(self, a: Tensor, b: Tensor, *, scale: float, dropout: float) -> None:
        """Start a link from a [R, K] and b [N, R]; they become parameters on the weight's device."""
        self.lora_A = nn.Parameter(a.to(self.weight.device))
        self.lora_B = nn.Parameter(b.to(self.weight.device))
        self.scale, self.dropout = scale, dropout
        self.grouping.forget(self)

    def close(self) -> None:
        self.lora_A = self.lora_B = None
        self.grouping.forget(self)

    def operands(self) -> Operands | None:
        """Of the op this layer is; None without an open link."""
        if self.lora_A is None or self.lora_B is None:
            return None
        dropout = self.dropout if self.training else 0.0
        return Operands(self.weight, self.lora_A, self.lora_B, self.scale, self.bias, dropout)

    def forward(self, input: Tensor) -> Tensor:
        operands = self.operands()
        if operands is None:
            return F.linear(input, self.weight, self.bias)
        return self.grouping(self, operands, input)

    def extra_repr(self) -> str:
        rank = "no open link" if self.lora_A is None else f"r={self.lora_A.shape[0]}, scale={self.scale:g}"
        return f"{super().extra_repr()}, {rank}"


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Links are kept in fp32, so that AdamW's small steps are not rounded away; fp64 for an fp64 model."""
    return torch.promote_types(weight.dtype, torch.float32)

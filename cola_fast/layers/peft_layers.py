"""PEFT's LoRA layers with a fused forward. Needs PEFT, so `layers.peft_drop_in` imports it only when it is used.

Each class in `FUSED` is a subclass of a PEFT layer with another `forward`, which a layer gets by changing its class. It
fuses a call when PEFT would compute `base(x) + scale · B(A(drop(x)))` with plain modules, and hands every other call to
PEFT's forward. So a state that PEFT's methods can bring about at any time needs no bookkeeping here.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from torch import Tensor, nn

from cola_kernels import lora_linear, unpack_nf4_
from cola_kernels.autograd import autocast_dtype

PLAIN_TENSORS = (nn.Parameter, Tensor)  # not a DTensor, and not a quantised weight


class Fused:
    """Mixed into a PEFT layer in front of its own class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, Fused):  # this method was kept, by a hook, while the layer was given back to PEFT
            kept: Tensor = type(self).forward(self, x, *args, **kwargs)
            return kept
        adapter = self._lone_adapter() if not args and not kwargs else None
        if adapter is None or not self._takes(x, adapter):
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        else:
            result = self._op(x, adapter)
        return result

    def _op(self: Any, x: Tensor, adapter: str) -> Tensor:
        base, dropout = self.base_layer, self.lora_dropout[adapter]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return lora_linear(x, base.weight, a, b, self.scaling[adapter], base.bias, dropout=p)

    def _get_name(self) -> str:
        """Printed as PEFT prints it, which some code reads."""
        return next(original.__name__ for original, fused in FUSED.items() if type(self) is fused)

    def _lone_adapter(self: Any) -> str | None:
        """The one adapter that acts on this layer, if its state is as simple as that."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        return active[0] if len(active) == 1 else None

    def _takes(self: Any, x: Tensor, adapter: str) -> bool:
        if base_obstacle(self) is not None or adapter_obstacle(self, adapter) is not None:
            return False
        weight, a = self.base_layer.weight, self.lora_A[adapter].weight
        if not x.device == weight.device == a.device or x.shape[-1] != a.shape[1]:
            return False
        if autocast_dtype(x.device) is not None:
            return x.dtype != torch.float64
        return self._takes_dtype(x) and bool(self.cast_input_dtype_enabled or x.dtype == a.dtype)

    def _takes_dtype(self: Any, x: Tensor) -> bool:
        return bool(x.dtype == self.base_layer.weight.dtype)


class FusedLinear(Fused, lora.Linear):
    """`peft.tuners.lora.Linear` on `cola_kernels.lora_linear`."""


# PEFT's class -> ours, and the class of the base layer it needs
FUSED: dict[type, type] = {lora.Linear: FusedLinear}
BASES: dict[type, type[nn.Module]] = {FusedLinear: nn.Linear}

if is_bnb_4bit_available():  # PEFT has imported bitsandbytes then
    from bitsandbytes.nn import Linear4bit

    class FusedLinear4bit(Fused, lora.Linear4bit):
        """`peft.tuners.lora.Linear4bit` on `cola_kernels.lora_linear`, where the weight is NF4.

        bitsandbytes multiplies in its layer's compute dtype, whatever x is and autocast says, and returns x's dtype.
        """

        def _op(self: Any, x: Tensor, adapter: str) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return super()._op(x.to(self.base_layer.compute_dtype or x.dtype), adapter).to(x.dtype)

        def _takes_dtype(self: Any, x: Tensor) -> bool:
            return x.is_floating_point()

    FUSED[lora.Linear4bit] = FusedLinear4bit
    BASES[FusedLinear4bit] = Linear4bit


def obstacle(layer: Any) -> str | None:
    """Why no call of this layer could be fused; None if some can."""
    if type(layer) not in FUSED and not isinstance(layer, Fused):
        return f"PEFT's {type(layer).__name__} layer has no fused form"
    if "forward" in vars(layer):
        return "its forward was replaced, as hooks of accelerate do"
    found = base_obstacle(layer)
    if found is not None:
        return found
    adapters = [adapter_obstacle(layer, adapter) for adapter in layer.lora_A]
    return None if None in adapters else (adapters or ["it has no adapter"])[0]


def base_obstacle(layer: Any) -> str | None:
    base, kind = layer.base_layer, BASES[FUSED.get(type(layer), type(layer))]
    if not _is_plain(base, kind):
        return f"its base layer is no plain {kind.__name__} but a {type(base).__name__}, or has hooks"
    if kind is not nn.Linear:
        try:
            unpack_nf4_(base.weight)  # changes only what bitsandbytes repacked in eval mode, which would train wrongly
        except ValueError as error:
            return f"its base {error}"
    elif type(base.weight) not in PLAIN_TENSORS or not base.weight.is_floating_point():
        return f"its base weight is a {type(base.weight).__name__} of {base.weight.dtype}"
    return "its base weight is trained" if base.weight.requires_grad else None


def adapter_obstacle(layer: Any, adapter: str) -> str | None:
    if adapter in layer.lora_variant:
        return f"its adapter uses {type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias[adapter]:
        return "its adapter has a bias (lora_bias)"
    if not isinstance(layer.scaling[adapter], int | float):
        return "its adapter's scaling is no number"
    dropout, a, b = layer.lora_dropout[adapter], layer.lora_A[adapter], layer.lora_B[adapter]
    if not ((_is_plain(dropout, nn.Dropout) and dropout.p < 1) or _is_plain(dropout, nn.Identity)):
        return f"its adapter's dropout is a {type(dropout).__name__}, or has hooks"
    for module in (a, b):
        if not _is_plain(module, nn.Linear) or type(module.weight) not in PLAIN_TENSORS:
            return "its adapter's factors are no plain nn.Linear, or have hooks"
    return None


def fuse(layer: nn.Module) -> None:
    if not isinstance(layer, Fused):
        layer.__class__ = FUSED[type(layer)]


def restore(module: nn.Module) -> None:
    for original, fused in FUSED.items():
        if type(module) is fused:
            module.__class__ = original


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly of that class, with its own forward and no hooks, so that not calling it goes unnoticed."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and "forward" not in vars(module) and not hooks

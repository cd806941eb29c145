"""The PEFT drop-in: an existing PEFT model, faster, still PEFT's.

`accelerate_peft` changes the class of PEFT's LoRA layers to subclasses whose forward runs `cola_kernels.lora_linear`
(`layers.peft_layers`). Nothing else changes: parameters, names, configurations and every method stay PEFT's, so
saving, loading, merging, disabling and switching adapters work as before, and undoing it is changing the class back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..errors import UserError
from ..versions import require_tested


@dataclass(frozen=True)
class DropInReport:
    """What `accelerate_peft` did. `print(report)` shows it."""

    model: nn.Module
    replaced: tuple[str, ...]  # names of the layers that run on our op
    left: dict[str, str]  # names of PEFT's other LoRA layers -> why they run as before

    def undo(self) -> None:
        """Give every layer of the model PEFT's own class back."""
        restore_peft(self.model)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} LoRA layers run on cola_kernels, {len(self.left)} as before"]
        for reason, count in Counter(self.left.values()).most_common():
            first = next(name for name, why in self.left.items() if why == reason)
            others = f" and {count - 1} more" if count > 1 else ""
            lines.append(f"  {first}{others}: {reason}")
        return "\n".join(lines)


def accelerate_peft(model: nn.Module) -> DropInReport:
    """Run the LoRA layers of a PEFT model on `cola_kernels.lora_linear`, where that computes the same function.

    A layer falls back to PEFT's own forward, call by call, whenever its state asks for something else: adapters
    disabled, merged, several active at once, or mixed in a batch; DoRA and the other variants; a bias on the adapter.
    Base weights may be NF4 (bitsandbytes); FP4 and LLM.int8 ones stay with PEFT. Call it again after adding adapters to
    further layers.

    Outputs and gradients are PEFT's up to rounding. One difference is by design: with fp32 adapters on a 16-bit model
    PEFT computes the low-rank branch in fp32, whereas the op uses the factors in the activations' dtype (beside NF4
    weights: in the layer's compute dtype), accumulates in fp32, and returns fp32 gradients. Second derivatives (double
    backward) are not available until `undo`.

    Args:
        model: a `PeftModel`, or any module that contains PEFT's LoRA layers; changed in place.

    Raises:
        UserError: PEFT is not installed or not a tested version, or no layer can be replaced. The model is then as it
            was.
    """
    require_tested("peft", "accelerate_peft")
    from peft.tuners.lora import LoraLayer

    from . import peft_layers

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise UserError("The model has no LoRA layers of PEFT: call accelerate_peft on what get_peft_model returned.")
    left = {name: why for name, layer in layers.items() if (why := peft_layers.obstacle(layer)) is not None}
    if len(left) == len(layers):
        name, why = next(iter(left.items()))
        raise UserError(
            f"None of the model's {len(layers)} LoRA layers can run on cola_kernels ({name}: {why}): use the model as "
            "it is, PEFT runs all of them."
        )
    replaced = [name for name in layers if name not in left]
    for name in replaced:
        peft_layers.fuse(layers[name])
    return DropInReport(model, tuple(replaced), left)


def restore_peft(model: nn.Module) -> None:
    """Undo `accelerate_peft`: every layer gets PEFT's own class back. Does nothing to other models."""
    from . import peft_layers

    for module in model.modules():
        peft_layers.restore(module)

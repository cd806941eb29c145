"""The 4-bit weights of bitsandbytes. Links go onto NF4 ones; FP4 ones are known, so that their numbers are counted and
compared, but take none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_kernels import FoldReport, nf4, nf4_dequantize, nf4_merge_

from ...errors import UserError
from ..factors import Factors
from .weight import Weight

REPACKS = "support_avx512bf16_for_cpu"  # what bitsandbytes calls the permission


class NF4(Weight):
    """Known by its `quant_state`, which says how it was quantised."""

    title = "NF4"
    size = "4 bits"
    linear = "a 4-bit (NF4) layer of bitsandbytes"
    option = "load_in_4bit"
    bytes_each = 0.5 + (1 + 4 / 256) / 64  # the code, and its share of a scale quantised in blocks of 256
    bases = ("nf4", "ledger")

    @classmethod
    def recognises(cls, tensor: Tensor) -> bool:
        return hasattr(tensor, "quant_state")

    @classmethod
    def held_by(cls, linear: type[nn.Module]) -> bool:
        return linear.__name__ == "Linear4bit" and linear.__module__.startswith("bitsandbytes.")

    @classmethod
    def stored(cls, settings: Mapping[str, Any]) -> bool:
        in_4bit = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
        return bool(in_4bit) and str(settings.get("bnb_4bit_quant_type", "fp4")).lower() == "nf4"

    @classmethod
    def settings(cls, dtype: torch.dtype) -> Any:
        """QLoRA's quantisation: NF4 in blocks of 64, the scales quantised too, computing in `dtype`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )

    def obstacle(self) -> str | None:
        try:
            nf4.read(self.tensor)
        except ValueError as error:
            return f"cannot take a link: {error}"
        return None

    @property
    def _state(self) -> Any:
        """None of a weight that is not quantised yet, or has lost it."""
        return getattr(self.tensor, "quant_state", None)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight it was quantised from."""
        dtype: torch.dtype = self.tensor.dtype if self._state is None else self._state.dtype
        return dtype

    def use_in(self, dtype: torch.dtype) -> None:
        if self._state is not None:
            self._state.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape if self._state is None else self._state.shape)

    def describe(self) -> str | None:
        state = self._state
        if state is None:
            return None
        return f"{state.quant_type}, blocks of {state.blocksize}{', double' if state.nested else ''}"

    def parts(self) -> list[Tensor]:
        scales = [] if self._state is None else [self._state.absmax]
        return [self.tensor.detach(), *scales]

    def numbers(self) -> dict[str, Tensor]:
        state = self._state
        if state is None:
            return {"": self.tensor}
        scales = {".absmax": state.absmax, ".offset": state.offset}
        if state.nested:
            scales[".nested_absmax"] = state.state2.absmax
        return {key: scale for key, scale in scales.items() if isinstance(scale, Tensor)}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return nf4_dequantize(self.tensor, self.dtype if dtype is None else dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)  # bitsandbytes may keep it in another
        return F.linear(x, self.dense(x.dtype), bias)

    def fold(self, factors: Factors, *, rounding: str, seed: int, report: bool) -> FoldReport | None:
        """Into the codes; the scales are frozen. It reports always."""
        a, b = factors.a.to(self.tensor.device), factors.b.to(self.tensor.device)
        return nf4_merge_(self.tensor, a, b, factors.scale, rounding=rounding, seed=seed)

    def holds(self, factors: Factors) -> bool:
        return True  # codes stay codes

    def state(self) -> dict[str, Tensor]:
        """What is needed to read it again, under the names that bitsandbytes gives it."""
        if self._state is None:
            return {}
        return {f"weight.{key}": value for key, value in self._state.as_dict(packed=True).items()}

    def attached(self) -> list[Any]:
        state = getattr(self.module, "quant_state", None)
        return [] if state is None else [state]

    @classmethod
    def hold(cls, model: nn.Module) -> list[nn.Module]:
        """In eval mode on a CPU, bitsandbytes would repack 4-bit weights in place, which rounds their scales, and lets
        no gradient through from then on. Returns the modules that were about to.

        Raises UserError for a weight that it has repacked already.
        """
        for name, module in model.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise UserError(
                    f"{name} has run in eval mode, for which it was repacked by bitsandbytes on the CPU, which rounded "
                    "its scales and lets no gradient through: load the model again, or call cola_kernels.unpack_nf4_ "
                    "on every such weight to go on with the rounded scales."
                )
        found = [module for module in model.modules() if getattr(module, REPACKS, False)]
        for module in found:
            setattr(module, REPACKS, False)
        return found

    @classmethod
    def release(cls, module: nn.Module) -> None:
        setattr(module, REPACKS, True)

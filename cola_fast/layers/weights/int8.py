"""The 8-bit weights of bitsandbytes, LLM.int8 (Dettmers et al., arXiv 2208.07339): a base that never changes.

    W[n, k] = code[n, k] · scale[n] / 127                        codes int8, one fp32 scale a row

x Wᵀ is left to bitsandbytes, and the link is added to what it returns, so that attaching changes nothing and the model
is the one that others see. What is exact: the link and its gradients; the gradient of x, through W itself; W as it is
read here, to the bit of what bitsandbytes multiplies by. What is not: where bitsandbytes multiplies in 8 bits (always
on a GPU, in eval mode on a CPU) it rounds x to 8 bits a row as well, but for columns with outliers. Which those are,
all tokens of a batch decide together, so that even a later one changes logits a little. A merged model does none of
that; what compares two models, or looks for leaks between tokens, computes `weights.exactly`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight import EXACT, Weight

DTYPE = "dense_dtype"  # of a Linear8bitLt, which knows none of its own


class Int8(Weight):
    """An `Int8Params`. The first forward moves its scales into the module's `state`."""

    title = "LLM.int8"
    size = "8 bits"
    linear = "an 8-bit (LLM.int8) layer of bitsandbytes"
    option = "load_in_8bit"
    bytes_each = 1.0
    multiplies = True

    @classmethod
    def recognises(cls, tensor: Tensor) -> bool:
        return tensor.dtype == torch.int8 and hasattr(tensor, "SCB")

    @classmethod
    def held_by(cls, linear: type[nn.Module]) -> bool:
        return linear.__name__ == "Linear8bitLt" and linear.__module__.startswith("bitsandbytes.")

    @classmethod
    def stored(cls, settings: Mapping[str, Any]) -> bool:
        in_8bit = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
        return bool(in_8bit) and not settings.get("llm_int8_has_fp16_weight")

    @classmethod
    def settings(cls, dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)

    def obstacle(self) -> str | None:
        if self.module.state.has_fp16_weights:
            return (
                "keeps its weight in 16 bits and quantises it at each call (has_fp16_weights), which hides it from a "
                "link: load the model with load_in_8bit, or in 16 bits."
            )
        if not self.recognises(self.tensor) or self._scales is None:
            return "has not been quantised yet, which moving it to its device does: do that first."
        return None

    @property
    def _scales(self) -> Any:
        """[N]; None on the meta device, and before it is quantised."""
        return getattr(self._kept, "SCB", None) if self.tensor.SCB is None else self.tensor.SCB

    @property
    def _kept(self) -> Any:
        """What a Linear8bitLt computes with."""
        return getattr(self.module, "state", None)

    @property
    def dtype(self) -> torch.dtype:
        """The model's, as `hold` or `use_in` found it; else that of bitsandbytes' own arithmetic."""
        dtype: torch.dtype = getattr(self.module, DTYPE, torch.float16)
        return dtype

    def use_in(self, dtype: torch.dtype) -> None:
        setattr(self.module, DTYPE, dtype)

    def describe(self) -> str | None:
        return "int8, a scale a row"

    def parts(self) -> list[Tensor]:
        return [part for part in (self.tensor.detach(), self._scales) if part is not None]

    def numbers(self) -> dict[str, Tensor]:
        return {} if self._scales is None else {".SCB": self._scales}

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        wide: Tensor = self.tensor.detach().to(self.dtype if dtype is None else dtype, copy=True)
        return wide.mul_(self._scales.unsqueeze(1).mul(1.0 / 127.0))  # in bitsandbytes' order, for its bits

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The bias is the module's own: bitsandbytes adds it."""
        if EXACT.get():
            return F.linear(x, self.dense(x.dtype), None if bias is None else bias.to(x.dtype))
        kind: Any = getattr(self.module, "plain", type(self.module))
        if self.tensor.CB is not None:
            kind.init_8bit_state(self.module)
        y: Tensor = kind.forward(self.module, x)
        return y

    def state(self) -> dict[str, Tensor]:
        if self._scales is None:
            return {}
        return {"SCB": self._scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}  # 0: row by row

    def take(self, key: str, value: Tensor) -> bool:
        if key != "SCB":
            return False
        self._scales.copy_(value)
        return True

    def attached(self) -> list[Any]:
        return [] if self._kept is None else [self._kept]

    def moved(self) -> None:
        if self._kept is not None and self._kept.CB is not None:
            self._kept.CB, self._kept.SCB = self.tensor.data, self._kept.SCB.to(self.tensor.device)

    @classmethod
    def hold(cls, model: nn.Module) -> list[nn.Module]:
        """Tell its layers the dtype of the model, in which a ledger is kept and a merged weight written."""
        known = [p.dtype for p in model.parameters() if p.is_floating_point() and not hasattr(p, "quant_state")]
        found = [module for module in model.modules() if cls.held_by(type(module)) and not hasattr(module, DTYPE)]
        for module in found if known else []:
            setattr(module, DTYPE, known[0])
        return found if known else []

    @classmethod
    def release(cls, module: nn.Module) -> None:
        delattr(module, DTYPE)

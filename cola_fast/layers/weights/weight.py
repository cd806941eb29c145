"""What the library asks of a frozen weight, however it is stored. A kind of weight is a class that answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cola_kernels import FoldReport

from ..factors import Factors

EXACT: ContextVar[bool] = ContextVar("exact", default=False)  # see `weights.exactly`


class Weight:
    """One parameter and the module that it belongs to; it stays where it is, and is looked at anew for each question.

    A kind sets what its class says of itself, and answers for one weight. What is below is right for a quantised kind
    that is listed in `weights.KINDS`, unless it says otherwise.
    """

    title: ClassVar[str]  # in sentences: NF4
    size: ClassVar[str] = ""  # of a number, in sentences: 4 bits
    linear: ClassVar[str] = ""  # the linears that hold it, in sentences
    option: ClassVar[str | None] = None  # the key of `model:` that quantises to it while loading
    bytes_each: ClassVar[float] = 0.0  # memory of a number, scales included; of quantised kinds
    bases: ClassVar[tuple[str, ...]] = ("ledger",)  # where links on it can live, see `chain.bases`
    quantised: ClassVar[bool] = True
    in_one_piece: ClassVar[bool] = True  # all of it is in this process
    multiplies: ClassVar[bool] = False  # its library computes x Wᵀ, in its own way; the link is added to that

    def __init__(self, module: nn.Module, tensor: Tensor) -> None:
        self.module: Any = module
        self.tensor: Any = tensor

    # --- how it is recognised -----------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, tensor: Tensor) -> bool:
        """By the tensor alone, without importing the library that made it."""
        raise NotImplementedError

    @classmethod
    def held_by(cls, linear: type[nn.Module]) -> bool:
        """Whether linears of this very class hold such weights."""
        return False

    @classmethod
    def stored(cls, settings: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this quantization_config holds such weights."""
        return False

    @classmethod
    def settings(cls, dtype: torch.dtype) -> Any:
        """The quantization_config that quantises to it while loading. Only with an `option`."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why it can take no link, as the end of a sentence that begins with the linear's name."""
        return None

    def untrainable(self) -> str | None:
        """Why it cannot be trained whole, beside the links."""
        return "quantised"

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is computed with in."""
        raise NotImplementedError

    def use_in(self, dtype: torch.dtype) -> None:
        """Compute in another dtype from now on."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers it stands for."""
        return tuple(self.tensor.shape)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def describe(self) -> str | None:
        """How it is quantised, for people."""
        raise NotImplementedError

    def parts(self) -> list[Tensor]:
        """What the fingerprint of a base reads samples of: its codes and its scales."""
        raise NotImplementedError

    def numbers(self) -> dict[str, Tensor]:
        """What has to be finite: the end of a name -> the tensor."""
        raise NotImplementedError

    # --- how it is read and computed with -----------------------------------------------------------------------------

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K] in `dtype`, or its own. A copy, but for a dense weight.

        Raises ValueError if it cannot be read.
        """
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + bias`, as the model computes it without a link. Where EXACT is set, with `dense` and no other way."""
        raise NotImplementedError

    def fold(self, factors: Factors, *, rounding: str, seed: int, report: bool) -> FoldReport | None:
        """Add an update in place. Only of kinds with a base other than the ledger."""
        raise NotImplementedError

    def holds(self, factors: Factors) -> bool:
        """Whether `fold` of finite factors would leave finite numbers, in this process's rows."""
        raise NotImplementedError

    # --- what lies beside it ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What the module's state dict holds beside the weight, by key. A merged one drops it."""
        return {}

    def take(self, key: str, value: Tensor) -> bool:
        """Read such a value from a state dict that is loaded. Whether it did."""
        return False

    def attached(self) -> list[Any]:
        """Objects beside the parameters that hold its numbers: what a copy without weights does not copy."""
        return []

    def moved(self) -> None:
        """Called after `model.to(device)` and the like."""

    @classmethod
    def hold(cls, model: nn.Module) -> list[nn.Module]:
        """Make a model's weights fit to train on. Returns the modules for `release`. Raises UserError if they cannot
        be."""
        return []

    @classmethod
    def release(cls, module: nn.Module) -> None:
        """Undo `hold`."""

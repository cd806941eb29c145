"""AdamW of bitsandbytes: moments in 8 bits, in memory that the GPU can page out to the CPU, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .registry import OPTIMIZER, Pair

if TYPE_CHECKING:
    import torch

    from ..config import TrainConfig


def _register(name: str, kind: str) -> None:
    @OPTIMIZER.fill(name)
    def make(groups: list[dict[str, Any]], config: TrainConfig, pairs: Sequence[Pair]) -> torch.optim.Optimizer:
        try:
            from bitsandbytes import optim
        except ImportError:
            raise UserError(
                f"train.optimizer {name} needs bitsandbytes: pip install 'cola_fast[bitsandbytes]'."
            ) from None
        optimizer: torch.optim.Optimizer = getattr(optim, kind)(
            groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        return optimizer


_register("adamw-8bit", "AdamW8bit")
_register("paged-adamw", "PagedAdamW")
_register("paged-adamw-8bit", "PagedAdamW8bit")

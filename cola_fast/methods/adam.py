"""AdamW, and Adam with its older L2 penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .registry import OPTIMIZER, Pair

if TYPE_CHECKING:
    import torch

    from ..config import TrainConfig


@OPTIMIZER.fill("adamw")
def adamw(groups: list[dict[str, Any]], config: TrainConfig, pairs: Sequence[Pair]) -> torch.optim.Optimizer:
    """Weight decay shrinks the factors themselves (decoupled)."""
    import torch

    return torch.optim.AdamW(groups, **_options(groups, config))


@OPTIMIZER.fill("adam")
def adam(groups: list[dict[str, Any]], config: TrainConfig, pairs: Sequence[Pair]) -> torch.optim.Optimizer:
    """Weight decay is an L2 penalty: it is added to the gradient."""
    import torch

    return torch.optim.Adam(groups, **_options(groups, config))


def _options(groups: list[dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    """Fused where PyTorch has it (CUDA and CPU do)."""
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cuda", "cpu") and p.is_floating_point() for p in parameters)
    return {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay, "fused": fused}

"""The open link's optimizer: its parameter groups, and what it keeps of the state of the link before."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from .chain import Chain
from .config import TrainConfig
from .layer import GATES
from .methods import OPTIMIZER


def make_optimizer(chain: Chain, config: TrainConfig) -> torch.optim.Optimizer:
    """`config.optimizer` over what the open link trains. A group's `lr_scale` is its learning rate over schedule.lr.

    Gates do not decay: a magnitude of 0 is no small change, and what shrinks a gate e is its method's affair.
    """
    by_part: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in chain.named_parameters():
        part = name.rsplit(".", 1)[-1]
        by_part[part if part in GATES or config.lr_ratio != 1 else "factors"].append(parameter)
    groups: list[dict[str, Any]] = []
    for part, parameters in by_part.items():
        group = {"params": parameters, "lr_scale": config.lr_ratio if part == "lora_B" else 1.0}
        groups.append({**group, "weight_decay": 0.0} if part in GATES else group)
    return OPTIMIZER.choose(config.optimizer)(groups, config, chain.pairs())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def load_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """State by parameter index. Moments of factors whose shape has changed (a link of another rank) start afresh."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    kept = {i: s for i, s in state.items() if _first_moment(s).shape == shapes[i]}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})


def _first_moment(state: dict[str, Any]) -> torch.Tensor:
    """PyTorch's name for it, or bitsandbytes', which keeps what is quantised a level deeper."""
    moment: torch.Tensor = state.get("__bnb_optimizer_quant_state__", state).get("state1", state.get("exp_avg"))
    return moment

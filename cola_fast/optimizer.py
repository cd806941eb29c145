"""The open link's optimizer: its parameter groups, and what it keeps of the state of the link before."""

from __future__ import annotations

from typing import Any

import torch

from .chain import Chain
from .config import TrainConfig
from .methods import OPTIMIZER


def make_optimizer(chain: Chain, config: TrainConfig) -> torch.optim.Optimizer:
    """`config.optimizer` over what the open link trains. A group's `lr_scale` is its learning rate over schedule.lr."""
    groups: list[dict[str, Any]] = [{"params": chain.parameters(), "lr_scale": 1.0}]
    if config.lr_ratio != 1:
        by_factor: dict[str, list[torch.nn.Parameter]] = {"lora_A": [], "lora_B": []}
        for name, parameter in chain.named_parameters():
            by_factor[name.rsplit(".", 1)[-1]].append(parameter)
        scales = {"lora_A": 1.0, "lora_B": config.lr_ratio}
        groups = [{"params": found, "lr_scale": scales[key]} for key, found in by_factor.items() if found]
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

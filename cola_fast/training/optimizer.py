"""The open link's optimizer: its parameter groups, and what it keeps of the state of the link before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from ..chain.chain import Chain
from ..config import TrainConfig
from ..layers.layer import GATES
from ..methods import OPTIMIZER


def make_optimizer(chain: Chain, config: TrainConfig) -> torch.optim.Optimizer:
    """`config.optimizer` over what the open link trains, and behind it what is trained beside the links. A group's
    `lr_scale` is its learning rate over schedule.lr.

    Gates do not decay: a magnitude of 0 is no small change, and what shrinks a gate e is its method's affair. Nor do
    vectors beside the links: norms and biases.
    """
    by_part: dict[str, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in chain.link_parameters():
        part = name.rsplit(".", 1)[-1]
        by_part[part if part in GATES or config.lr_ratio != 1 else "factors"].append(parameter)
    for parameter in chain.beside.parameters():
        by_part["matrices" if parameter.dim() > 1 else "vectors"].append(parameter)
    groups: list[dict[str, Any]] = []
    for part, parameters in by_part.items():
        group = {"params": parameters, "lr_scale": config.lr_ratio if part == "lora_B" else 1.0}
        groups.append({**group, "weight_decay": 0.0} if part in (*GATES, "vectors") else group)
    return OPTIMIZER.choose(config.optimizer)(groups, config, chain.pairs())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def state_of(optimizer: torch.optim.Optimizer, chain: Chain) -> dict[int, dict[str, Any]]:
    """Its state by parameter index. What is trained beside the links is counted from the end, -1 being the last: the
    next link may have more or fewer parameters."""
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    of_link = total - len(chain.beside.parameters())
    return {i if i < of_link else i - total: s for i, s in optimizer.state_dict()["state"].items()}


def next_state(
    state: dict[int, dict[str, Any]], change: Callable[[dict[int, dict[str, Any]]], dict[int, dict[str, Any]]]
) -> dict[int, dict[str, Any]]:
    """What the next link's optimizer starts from: `change` of the link's state; what is beside it goes on."""
    return change({i: s for i, s in state.items() if i >= 0}) | {i: s for i, s in state.items() if i < 0}


def load_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """From `state_of`. Moments of factors whose shape has changed (a link of another rank) start afresh."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    state = {i % len(shapes): s for i, s in state.items()}
    kept = {i: s for i, s in state.items() if _first_moment(s).shape == shapes[i]}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})


def _first_moment(state: dict[str, Any]) -> torch.Tensor:
    """PyTorch's name for it, or bitsandbytes', which keeps what is quantised a level deeper."""
    moment: torch.Tensor = state.get("__bnb_optimizer_quant_state__", state).get("state1", state.get("exp_avg"))
    return moment

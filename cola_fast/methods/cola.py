"""COLA and LoRA, and what every slot holds unless another method says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .registry import INIT, RANKS, SCALING, STATE, Method, Site, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import ChainConfig
    from ..data.encode import Example

register(
    Method(
        "cola",
        "arXiv 2401.04151",
        "train a link, tie it into the base, reset A, B and the optimizer, repeat",
        {"schedule": {"links": 3, "optimizer_state": "reset"}},
    ),
    Method("lora", "arXiv 2106.09685", "one link", {"schedule": {"links": 1}}),
)


@INIT.fill("kaiming")
def kaiming(site: Site) -> tuple[Tensor, Tensor]:
    """A Kaiming-uniform as PEFT draws it and B = 0; the other way round where B is the frozen factor.

    Drawn on the CPU from its own generator: the same on every device, and independent of what else used the global one.
    """
    import torch

    n, k = site.shape
    a, b = torch.zeros(site.rank, k, dtype=site.dtype), torch.zeros(n, site.rank, dtype=site.dtype)
    drawn, fan_in = (b, site.rank) if site.frozen == "b" else (a, k)
    bound = math.sqrt(1 / fan_in)  # kaiming_uniform_(a=sqrt(5)): gain sqrt(1/3) times sqrt(3 / fan_in)
    drawn.uniform_(-bound, bound, generator=site.generator)
    return a, b


@SCALING.fill("lora")
def by_rank(alpha: float, rank: int, r: int) -> float:
    """Scale alpha / R."""
    return alpha


@SCALING.fill("constant")
def constant(alpha: float, rank: int, r: int) -> float:
    """Scale alpha / r, the chain's: alpha of a module over its rank is the same for all ranks."""
    return alpha * rank / r


@RANKS.fill("uniform")
def uniform(model: nn.Module, examples: Sequence[Example], config: ChainConfig, link: int) -> None:
    """`chain.r`, and `chain.rank_pattern` over it."""


@STATE.fill("reset")
def reset(state: dict[int, dict[str, Any]], share: float, seed: int) -> dict[int, dict[str, Any]]:
    """Nothing is kept, Adam's step count neither."""
    return {}


@STATE.fill("keep")
def keep(state: dict[int, dict[str, Any]], share: float, seed: int) -> dict[int, dict[str, Any]]:
    return state

"""ReLoRA: many links, of which each starts with a little of the optimizer's state and a warm-up of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registry import STATE, Method, register

if TYPE_CHECKING:
    from torch import Tensor

register(
    Method(
        "relora",
        "arXiv 2307.05695",
        "most of Adam's moments zeroed at a tie; one cosine over the chain, jagged by a warm-up in each link. The "
        "share and the warm-up are those of the authors' 1B configuration",
        {
            "schedule": {
                "links": 4,
                "optimizer_state": "prune-magnitude",
                "prune": 0.9,
                "lr_shape": "cosine",
                "rewarm": 100,
            }
        },
    )
)


@STATE.fill("prune-magnitude")
def prune_magnitude(state: dict[int, dict[str, Any]], share: float, seed: int) -> dict[int, dict[str, Any]]:
    """The smallest `share` of each moment's elements become 0. Adam's step count goes on, as in the authors' code.

    As there, each moment is pruned by itself. An element that keeps its first and loses its second takes large steps:
    this wants the warm-up and a smaller learning rate than a reset does.
    """

    def prune(moment: Tensor) -> Tensor:
        smallest = moment.abs().flatten().argsort(stable=True)[: round(share * moment.numel())]
        return moment.flatten().index_fill(0, smallest, 0).view_as(moment)

    return _prune_moments(state, prune)


@STATE.fill("prune-random")
def prune_random(state: dict[int, dict[str, Any]], share: float, seed: int) -> dict[int, dict[str, Any]]:
    """Each element of a moment becomes 0 with probability `share`."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def prune(moment: Tensor) -> Tensor:
        kept = torch.rand(moment.shape, dtype=torch.float32, generator=generator) >= share
        return moment * kept.to(moment.device)

    return _prune_moments(state, prune)


def _prune_moments(state: dict[int, dict[str, Any]], prune: Any) -> dict[int, dict[str, Any]]:
    return {
        index: {key: prune(value) if key.startswith("exp_avg") else value for key, value in entry.items()}
        for index, entry in state.items()
    }

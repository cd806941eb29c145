"""GeLoRA: ranks from the geometry of the hidden states. The mathematics is in `cola_fast.ranks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .registry import RANKS, Method, register

if TYPE_CHECKING:
    from torch import nn

    from ..config import ChainConfig
    from ..data.encode import Example

register(
    Method(
        "gelora",
        "arXiv 2412.09250",
        "a block's rank is what its hidden states gain in intrinsic dimension, plus 1; alpha over rank is constant",
        {"chain": {"ranks": "gelora", "scaling": "constant"}},
    )
)


@RANKS.fill("gelora")
def gelora(model: nn.Module, examples: Sequence[Example], config: ChainConfig, link: int) -> dict[str, int] | None:
    """Before the first link, or before each with `gelora.every_link`. Entries of `rank_pattern` win."""
    from ..ranks import example_batches, gelora_ranks

    if link > 0 and not config.gelora.every_link:
        return None
    batches = example_batches(examples, limit=config.gelora.examples)
    found = gelora_ranks(model, batches, targets=config.targets, mean_rank=config.gelora.mean_rank)
    pattern = config.rank_pattern or {}
    return {**pattern, **{name: rank for name, rank in found.items() if name not in pattern}}

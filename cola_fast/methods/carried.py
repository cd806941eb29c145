"""Methods in which a link goes on with some of what the link before it had learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cola import kaiming
from .registry import INIT, Method, Site, register

if TYPE_CHECKING:
    from torch import Tensor

register(
    Method(
        "periodic-lora",
        "arXiv 2402.16141",
        "at a tie W += (1 - carry)·s·BA, and the next link goes on from A and carry·B. B alone is scaled, as scaling "
        "both would change the model's function; the share is ours",
        {"chain": {"init": "carry", "carry": 0.5}, "schedule": {"links": 3, "optimizer_state": "reset"}},
    ),
    Method(
        "lora-restarts",
        "control arm, ours",
        "LoRA with a chain's optimizer resets but nothing merged: every link goes on from all of the one before",
        {"chain": {"init": "carry", "carry": 1.0}, "schedule": {"links": 3, "optimizer_state": "reset"}},
    ),
)


@INIT.fill("carry")
def carry(site: Site) -> tuple[Tensor, Tensor]:
    """A and `carry` times B of the link before. Afresh where there is none, or it had another rank."""
    before = site.previous()
    if before is None or before.rank != site.rank:
        return kaiming(site)
    return before.a.to(site.dtype), (before.b * (site.carry * before.scale / site.scale)).to(site.dtype)

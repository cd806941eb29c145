"""SoRA: a gate on each rank, drawn to zero by an L1 penalty. What is zero at the tie leaves the link."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import AFTER_STEP, GATE, Gates, Method, Pair, Site, Step, register

register(
    Method(
        "sora",
        "arXiv 2311.11696",
        "a gate on each of the R directions, shrunk by `lr · penalty` after every step; directions whose gate is 0 are "
        "left out of the sealed link. The penalty's weight is ours",
        {"chain": {"gate": "sora"}, "train": {"after_step": "sora", "penalty": 0.5}},
    )
)


@GATE.fill("sora")
def sora_gate(site: Site) -> Gates:
    """e ~ N(0, 1), as in the authors' code."""
    import torch

    return Gates(e=torch.randn(site.rank, generator=site.generator, dtype=site.dtype))


@AFTER_STEP.fill("sora")
def sora(pairs: Sequence[Pair], step: Step) -> None:
    """The proximal step of `penalty · ‖e‖₁`: e moves towards 0 by lr · penalty, and stays there."""
    import torch

    threshold = step.lr * step.config.penalty
    with torch.no_grad():
        for pair in pairs:
            e = pair.require_e("train.after_step: sora")
            e.copy_(torch.nn.functional.softshrink(e, threshold))

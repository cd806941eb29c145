"""AdaLoRA: a link in the form of a singular value decomposition, whose least important values are set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .registry import AFTER_STEP, GATE, GRADIENT, INIT, Gates, Method, Pair, Site, Step, register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import TrainConfig

STD = 0.02  # of A and B at the start, as in the authors' code
SMOOTHING = 0.85  # the paper's beta_1 and beta_2
WARM, SETTLED = 0.1, 0.7  # shares of a link's steps: before the first, nothing is closed; from the second, no more

register(
    Method(
        "adalora",
        "arXiv 2303.10512",
        "`P Λ Q` with P and Q kept near orthogonal; of all modules' singular values the least important are set to 0, "
        "until `budget` of them is left. Begin and end of that (a tenth and seven tenths of a link) are ours",
        {
            "chain": {"gate": "adalora", "init": "gaussian"},
            "train": {"gradient": "orthogonal", "after_step": "adalora", "penalty": 0.1, "budget": 0.67},
        },
    )
)


@INIT.fill("gaussian")
def gaussian(site: Site) -> tuple[Tensor, Tensor]:
    """A and B ~ N(0, 0.02²)."""
    import torch

    n, k = site.shape
    a, b = (torch.empty(shape, dtype=site.dtype) for shape in ((site.rank, k), (n, site.rank)))
    return a.normal_(0, STD, generator=site.generator), b.normal_(0, STD, generator=site.generator)


@GATE.fill("adalora")
def adalora_gate(site: Site) -> Gates:
    """Λ = 0, so that the link adds nothing at first."""
    import torch

    return Gates(e=torch.zeros(site.rank, dtype=site.dtype))


@GRADIENT.fill("orthogonal")
def orthogonal(pairs: Sequence[Pair], config: TrainConfig) -> None:
    """That of `penalty · (‖PᵀP - I‖² + ‖QQᵀ - I‖²)` (section 3.1) on top of the loss's, P being B and Q being A."""
    import torch

    with torch.no_grad():
        for a, b, *_ in pairs:
            if a.grad is not None and b.grad is not None:
                one = torch.eye(len(a), dtype=a.dtype, device=a.device)
                b.grad.add_(b @ (b.t() @ b - one), alpha=4 * config.penalty)
                a.grad.add_((a @ a.t() - one) @ a, alpha=4 * config.penalty)


@AFTER_STEP.fill("adalora")
def adalora(pairs: Sequence[Pair], step: Step) -> None:
    """Measure the importance of each triplet (a column of P, its value, a row of Q), and close what is over budget."""
    import torch

    es = [pair.require_e("train.after_step: adalora") for pair in pairs]
    scores = []
    with torch.no_grad():
        for (a, b, *_), e in zip(pairs, es, strict=True):
            columns, rows = _importance(b, step).mean(0), _importance(a, step).mean(1)
            scores.append(_importance(e, step) + columns + rows)
        flat = torch.cat(scores)
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.topk(round(share_left(step.done, step.config.budget) * len(flat))).indices] = True
        for e, open_ in zip(es, kept.split([len(e) for e in es]), strict=True):
            e.mul_(open_)


def share_left(done: float, budget: float) -> float:
    """The paper's cubic schedule, from 1 to `budget`."""
    left = min(1.0, max(0.0, (SETTLED - done) / (SETTLED - WARM)))
    return budget + (1 - budget) * left**3


def _importance(parameter: nn.Parameter, step: Step) -> Tensor:
    """Smoothed sensitivity |w ∂L/∂w| times its smoothed deviation (section 3.2), of w after the step as in PEFT."""
    import torch

    if parameter.grad is None and parameter not in step.state:  # Adam begins its own state where there is none
        return torch.zeros_like(parameter)
    state = step.state[parameter]
    for key in ("sensitivity", "uncertainty"):
        state.setdefault(key, torch.zeros_like(parameter))
    mean, spread = state["sensitivity"], state["uncertainty"]
    if parameter.grad is not None:
        now = (parameter * parameter.grad).abs()
        mean.lerp_(now, 1 - SMOOTHING)
        spread.lerp_((now - mean).abs(), 1 - SMOOTHING)
    product: Tensor = mean * spread
    return product

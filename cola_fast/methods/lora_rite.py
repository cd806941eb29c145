"""LoRA-RITE: an optimizer whose steps of W do not depend on how the update is split into B and A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .registry import OPTIMIZER, Method, Pair, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import TrainConfig

register(
    Method(
        "lora-rite",
        "arXiv 2410.20625",
        "an optimizer that preconditions each factor in the other's orthonormal basis: any (B Q, Q⁻¹ A) takes the same "
        "steps of W. Ours: the second moment is a mean over rows, so that rates are of Adam's order; it decays by "
        "beta2, and the escaped mass with it; Adam's bias correction",
        {"train": {"optimizer": "lora-rite", "clip": None}},
    )
)


@OPTIMIZER.fill("lora-rite")
def lora_rite(groups: list[dict[str, Any]], config: TrainConfig, pairs: Sequence[Pair]) -> torch.optim.Optimizer:
    """Weight decay shrinks the factors themselves, as AdamW's. A frozen factor is a basis like any other."""
    import torch

    factors = {factor for a, b, *_ in pairs for factor in (a, b)}
    if not all(parameter in factors for group in groups for parameter in group["params"]):
        raise UserError(
            "train.optimizer lora-rite trains the factors A and B alone, but the link has other parameters."
        )

    class LoRARITE(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            options = {parameter: group for group in self.param_groups for parameter in group["params"]}
            for a, b, *_ in pairs:
                wide = a.double().t(), b.double()  # before either has moved
                moves = [
                    (p, _step(self.state[p], p, other, transposed, options[p]))
                    for p, other, transposed in ((a, wide[1], True), (b, wide[0], False))
                    if p.grad is not None
                ]
                for p, move in moves:
                    p.mul_(1 - options[p]["lr"] * options[p]["weight_decay"]).sub_(move, alpha=options[p]["lr"])

    defaults = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return LoRARITE(groups, defaults)


def _step(state: dict[str, Any], p: Tensor, other: Tensor, transposed: bool, options: dict[str, Any]) -> Tensor:
    """What factor p moves by at rate 1, in its shape; the state is updated, in p's dtype. other [L, R], fp64.

    With `other = U T` (polar), the unmagnified gradient `∇p T⁻¹` is W's gradient times U. Preconditioned and averaged
    there, it goes back by `T⁻¹`. What the state holds is turned from the last U into this one by `P = Uᵀ U_last`; what
    the second moment loses by that is added to it in all directions (the escaped mass).
    """
    import torch

    beta1, beta2 = options["betas"]
    rank = other.shape[1]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(p)
        state["second_moment"], state["escaped"] = p.new_zeros(rank, rank), p.new_zeros(())
        state["basis"] = torch.zeros_like(other, dtype=p.dtype)
    assert p.grad is not None
    gradient, first = ((t.t() if transposed else t).double() for t in (p.grad, state["exp_avg"]))  # [L', R]
    basis, inverse = _polar(other, torch.finfo(p.dtype).eps)
    gradient = gradient @ inverse
    turn = basis.t() @ state["basis"].double()

    before = state["second_moment"].double()
    after = turn @ before @ turn.t()
    lost = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).abs().max()
    second = beta2 * after + (1 - beta2) / len(gradient) * gradient.t() @ gradient
    escaped = beta2 * (state["escaped"].double() + lost)

    step = int(state["step"]) + 1
    values, vectors = torch.linalg.eigh(second)
    spread = ((values.clamp(min=0) + escaped) / (1 - beta2**step)).sqrt() + options["eps"]
    preconditioned = gradient @ (vectors / spread) @ vectors.t()
    first = beta1 * first @ turn.t() + (1 - beta1) * preconditioned

    state["step"] += 1
    for key, value in (("second_moment", second), ("escaped", escaped), ("basis", basis)):
        state[key].copy_(value)
    state["exp_avg"].copy_(first.t() if transposed else first)
    move: Tensor = first @ inverse / (1 - beta1**step)
    return (move.t() if transposed else move).to(p.dtype)


def _polar(factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """U [L, R] and T⁻¹ [R, R] of `factor = U T`, T symmetric. Directions it does not have yet (all of B's at its
    start) are 0 in both: they wait for the other factor's step."""
    import torch

    squares, vectors = torch.linalg.eigh(factor.t() @ factor)
    found = squares > len(squares) * eps * squares.max()
    inverse = vectors * torch.where(found, squares, 1.0).rsqrt() * found @ vectors.t()
    return factor @ inverse, inverse

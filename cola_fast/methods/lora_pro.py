"""LoRA-Pro: move A and B so that W moves as close to full fine-tuning's step as their rank allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from .registry import GRADIENT, Method, Pair, register

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import TrainConfig

register(
    Method(
        "lora-pro",
        "arXiv 2407.18242",
        "A's and B's gradients replaced by those whose `s·(dB A + B dA)` is nearest to W's gradient; then Adam "
        "as usual, where the authors apply it to that product (unverified)",
        {"train": {"gradient": "lora-pro", "clip": None}},
    )
)


@GRADIENT.fill("lora-pro")
def lora_pro(pairs: Sequence[Pair], config: TrainConfig) -> None:
    """LoRA-Pro's closed form, in fp64: R x R systems, one of them a Sylvester equation for the X left free."""
    for a, b, scale, e in pairs:
        if e is not None:
            raise UserError("train.gradient lora-pro knows no gates on the rank: set chain.gate to null.")
        if a.grad is None or b.grad is None:
            continue
        da, db = nearest(a.detach().double(), b.detach().double(), a.grad.double(), b.grad.double(), scale)
        a.grad.copy_(da)
        b.grad.copy_(db)


def nearest(a: Tensor, b: Tensor, da: Tensor, db: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """a, da [R, K]; b, db [N, R]. With G the gradient of W (da = s Bᵀ G, db = s G Aᵀ), returns the pair whose
    `s (db A + B da)` is the projection P_B G + G P_A - P_B G P_A, and of all such pairs the nearest to (da, db).

    Directions that A or B does not have yet (all of B's at its start) are left to the other factor.
    """
    import torch

    aa, bb = _pinv(a @ a.t()), _pinv(b.t() @ b)
    pa, pb = bb @ da / s**2, (db - b @ (bb @ (b.t() @ db))) @ aa / s**2
    # BᵀB X + X A Aᵀ = -(BᵀB)⁻¹ dA Aᵀ / s², in the eigenvectors of both sides
    left, u = torch.linalg.eigh(b.t() @ b)
    right, v = torch.linalg.eigh(a @ a.t())
    sums = left[:, None] + right
    x = u @ (u.t() @ -(pa @ a.t()) @ v / sums.clamp(min=torch.finfo(sums.dtype).tiny)) @ v.t()
    return pa + x @ a, pb - b @ x


def _pinv(gram: Tensor) -> Tensor:
    import torch

    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return inverse

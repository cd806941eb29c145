"""LoftQ: the first link of a 4-bit model starts as the best correction of its rank of what quantising lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from .cola import kaiming
from .registry import INIT, WANTS, Method, Site, Wants, register

if TYPE_CHECKING:
    from torch import Tensor

TOO_FAR = 0.5  # NF4 loses about a tenth of a weight's norm; more than this is another model

register(
    Method(
        "loftq",
        "arXiv 2310.08659",
        "on a 4-bit base: the first link starts as the SVD of what quantising lost, which changes the function, on "
        "purpose, towards the 16-bit model's. The alternation's first round only: later ones would quantise the base "
        "anew, and the chain would belong to no checkpoint. Later links start afresh",
        {"chain": {"init": "loftq"}},
    )
)
WANTS["loftq"] = Wants(corrects=True, trained=("a", "b"))


@INIT.fill("loftq")
def loftq(site: Site) -> tuple[Tensor, Tensor]:
    """`s · B A = SVD_R(W - Q)`, the root of the singular values to each side: Q the 4-bit weight, W the original.

    Kaiming for later links, as the first has taken the correction in, and for weights that are not quantised.
    """
    import torch

    if site.index > 0 or site.original is None:
        return kaiming(site)
    original = site.original.to(site.weight.device, torch.float32)
    lost = original - site.weight.float()
    share = float(lost.norm() / original.norm())
    if not share <= TOO_FAR:
        raise UserError(
            f"A 4-bit weight is {share:.0%} away from the original given for it, where NF4 loses about 10%: give the "
            "very model that was quantised."
        )
    u, sigma, vt = torch.linalg.svd(lost, full_matrices=False)
    root = (sigma[: site.rank] / site.scale).sqrt()
    return (root[:, None] * vt[: site.rank]).to(site.dtype), (u[:, : site.rank] * root).to(site.dtype)

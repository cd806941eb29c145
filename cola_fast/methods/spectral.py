"""Starts taken from the weight itself: by its singular value decomposition, or by its QR decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registry import INIT, Method, Site, register

if TYPE_CHECKING:
    from torch import Tensor

register(
    Method(
        "pissa",
        "arXiv 2404.02948",
        "a link starts as the weight's R largest singular directions, which leave the weight until it is tied",
        {"chain": {"init": "pissa"}},
    ),
    Method(
        "olora",
        "arXiv 2406.01775",
        "a link starts from the first R columns of Q and rows of R of the weight's QR decomposition",
        {"chain": {"init": "olora"}},
    ),
)


@INIT.fill("pissa")
def pissa(site: Site) -> tuple[Tensor, Tensor]:
    """`s · B A = U_R S_R V_Rᵀ`, the square root of S_R to each side (as in PEFT)."""
    import torch

    u, sigma, vt = torch.linalg.svd(_wide(site.weight), full_matrices=False)
    root = (sigma[: site.rank] / site.scale).sqrt()
    return (root[:, None] * vt[: site.rank]).to(site.dtype), (u[:, : site.rank] * root).to(site.dtype)


@INIT.fill("olora")
def olora(site: Site) -> tuple[Tensor, Tensor]:
    """`A = R[:R], B = Q[:, :R]` of `W = Q R`; what leaves the weight is `s · B A`, as in PEFT."""
    import torch

    q, r = torch.linalg.qr(_wide(site.weight))
    return r[: site.rank].to(site.dtype), q[:, : site.rank].to(site.dtype)


def _wide(weight: Tensor) -> Tensor:
    import torch

    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))

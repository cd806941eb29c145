"""Starts taken from training data: from a linear's inputs (EVA), or from its weight's gradient (LoRA-GA).

Both look at a few batches. What they have seen is kept at rank 4R, truncated after each batch: exact for one batch,
an incremental SVD for more. So the full gradient exists for one layer at a time, and nothing has the size of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from .registry import INIT, WANTS, Method, Site, Wants, register

if TYPE_CHECKING:
    from torch import Tensor

GAMMA = 16.0  # of LoRA-GA's start: PEFT's default; that it is the paper's for every model is unverified

register(
    Method(
        "eva",
        "arXiv 2410.07170",
        "A starts as the R main directions of the linear's inputs on `calibration` training examples, B = 0. Ours: "
        "inputs are not centred, ranks not redistributed, each link looks again",
        {"chain": {"init": "eva"}},
    ),
    Method(
        "lora-ga",
        "arXiv 2407.05000",
        "A and B start as singular directions 1 to R (right) and R+1 to 2R (left) of W's gradient on `calibration` "
        "training examples; the start leaves the weight, as PiSSA's does. Gamma is 16, as in PEFT. Ours: each link "
        "looks again",
        {"chain": {"init": "lora-ga", "scaling": "rslora"}},
    ),
)


def main_inputs(seen: Tensor | None, rank: int, x: Tensor, dy: Tensor | None) -> Tensor:
    """`S Vᵀ [q, K]` of all inputs up to here, q <= 4R."""
    import torch

    rows = _wide(x) if seen is None else torch.cat((seen, _wide(x)))
    _, s, v = _svd(rows, rank)
    return s[:, None] * v.t()


def main_gradient(
    seen: tuple[Tensor, Tensor, Tensor] | None, rank: int, x: Tensor, dy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, q], S [q], V [K, q] of the sum of `dYᵀ X` up to here, q <= 4R."""
    assert dy is not None
    gradient = _wide(dy).t() @ _wide(x)
    if seen is not None:
        u, s, v = seen
        gradient.addmm_(u * s, v.t())
    return _svd(gradient, rank)


WANTS["eva"] = Wants(main_inputs, trained=("b",))
WANTS["lora-ga"] = Wants(main_gradient, gradients=True, directions=2)


@INIT.fill("eva")
def eva(site: Site) -> tuple[Tensor, Tensor]:
    """`A = V_Rᵀ`, orthonormal rows; B = 0."""
    import torch

    rows: Tensor = site.seen
    if len(rows) < site.rank:
        raise UserError(f"init eva saw {len(rows)} tokens, too few for rank {site.rank}: give it more batches.")
    a = torch.nn.functional.normalize(rows[: site.rank]).to(site.dtype)
    return a, torch.zeros(site.shape[0], site.rank, dtype=site.dtype)


@INIT.fill("lora-ga")
def lora_ga(site: Site) -> tuple[Tensor, Tensor]:
    """`A = c V_{1..R}ᵀ, B = c U_{R+1..2R}` with `c = N^(1/4) / sqrt(gamma)`, whatever the gradient's size."""
    u, _, v = site.seen
    n, rank = site.shape[0], site.rank
    c = n**0.25 / GAMMA**0.5
    return (c * v[:, :rank].t()).to(site.dtype), (c * u[:, rank : 2 * rank]).to(site.dtype)


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised, as the authors do it; the chain seeds it."""
    import torch

    u, s, v = torch.svd_lowrank(matrix, q=min(4 * rank, *matrix.shape), niter=4)
    return u, s, v


def _wide(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""What a fold into NF4 leaves over, and its best low-rank fit: where the next link starts, instead of at zero.

Rounding leaves E = W_before + scale · B A - W_after, mostly noise. A few directions of the inputs make up most of what
that does to a layer's output, E x. For inputs of second moment H = L Lᵀ, the best fit of rank R minimises
|(E - B' A') L|: it is the truncated SVD of E L (Eckart and Young 1936). E is never formed, but read tile by tile in a
subspace iteration (Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011, algorithm 4.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import nf4
from .nf4 import NF4

OVERSAMPLING, ITERATIONS = 8, 4


def carry(
    view: NF4, codes: Tensor, a: Tensor, b: Tensor, scale: float, lower: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Factors A' [R, K] and B' [N, R], fp32, such that scale · B' A' fits what is left over when codes [N, K / 2]
    replace those of `view`; lower [K, K] is the Cholesky factor L of the damped second moment."""
    n, k = view.shape
    whiten = lower.float()
    width = min(rank + OVERSAMPLING, n, k)
    start = torch.randn(k, width, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.to(a.device)).Q  # [K, width], of the right singular vectors of E L
    for _ in range(ITERATIONS):
        _, back = _products(view, codes, a, b, scale, whiten @ basis)
        basis = torch.linalg.qr(whiten.t() @ back).Q
    image, _ = _products(view, codes, a, b, scale, whiten @ basis)  # E L basis, [N, width]
    u, s, vh = torch.linalg.svd(image, full_matrices=False)
    # A and B share the singular values, so that neither starts much larger than the other.
    share = s[:rank].sqrt()
    right = torch.linalg.solve_triangular(lower.t(), (basis @ vh[:rank].t()).double(), upper=True)  # L⁻ᵀ v
    return _fill((share[:, None] * right.t().float()), rank, 0), _fill(u[:, :rank] * share / scale, rank, 1)


def _products(view: NF4, codes: Tensor, a: Tensor, b: Tensor, scale: float, right: Tensor) -> tuple[Tensor, Tensor]:
    """E right [N, P] and Eᵀ E right [K, P]."""
    image = right.new_empty(view.shape[0], right.shape[1])
    back = torch.zeros_like(right)
    for rows in nf4.tiles(view):
        absmax = nf4.scales(view, rows)
        before, after = (nf4.values(c[rows], absmax) for c in (view.codes, codes))
        left = before.sub_(after).addmm_(b[rows], a, alpha=scale)
        image[rows] = left @ right
        back.addmm_(left.t(), image[rows])
    return image, back


def _fill(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros for directions that a matrix smaller than the rank does not have."""
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat((factor, factor.new_zeros(missing)), dim)


def damped_factor(second_moment: Tensor, damping: float, tokens: int | None) -> Tensor:
    """The lower Cholesky factor, fp64 [K, K], of second_moment + λ, where λ is `damping` times its mean diagonal.

    Raises:
        ValueError: not positive definite; or fewer tokens than twice the effective dimension tr(H (H + λ)⁻¹), which do
            not determine the directions that the damping leaves to the data.
    """
    moment = second_moment.double().clone()
    damp = damping * float(moment.diagonal().mean())
    moment.diagonal().add_(damp)
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        raise ValueError(f"second_moment is not positive definite with a damping of {damping:g}: give more damping.")
    if tokens is not None:
        dimension = len(moment) - damp * float(torch.cholesky_inverse(lower).diagonal().sum())
        if tokens < 2 * dimension:
            raise ValueError(
                f"second_moment is the mean over {tokens} tokens, but with a damping of {damping:g} it takes at least "
                f"{math.ceil(2 * dimension)}: give more tokens or more damping."
            )
    return lower

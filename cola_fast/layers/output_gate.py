"""DoRA's output gate, `c = magnitude / norm`: norm [N] is that of the rows of W + scale · B A.

The norm is a constant to autograd (arXiv 2402.09353, section 4.3), and no N x K matrix is made for it:

    ‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b A Aᵀ bᵀ        for a row w of W and b of B

‖w‖² is computed once a link; the product W Aᵀ, as skinny as S, at each forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ELEMENTS = 1 << 20  # of the wide copy that PyTorch makes of 16-bit numbers to add their squares


def row_squares(weight: Tensor) -> Tensor:
    """‖w‖² of each row of weight [N, K], in fp32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    tiles = weight.detach().split(max(1, TILE_ELEMENTS // max(1, weight.shape[1])))
    return torch.cat([torch.linalg.vector_norm(tile, dim=1, dtype=wide) for tile in tiles]).square()


def row_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float, e: Tensor | None = None) -> Tensor:
    """[N], of the rows of weight [N, K] with the update `scale · b diag(e) a`, as wide as squares and never 0.

    squares: `row_squares(weight)`.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        a, b = a.to(squares.dtype), (b if e is None else b * e).to(squares.dtype)
        across = F.linear(weight, a.to(weight.dtype)).to(squares.dtype)  # W Aᵀ [N, R]
        total = squares + (b * (2 * scale * across + scale**2 * (b @ (a @ a.t())))).sum(1)
        norms: Tensor = total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
    return norms


def output_gate(
    magnitude: Tensor, squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, e: Tensor | None = None
) -> Tensor:
    """c [N] of weight [N, K] with the update `scale · b diag(e) a`, differentiable in magnitude alone.

    squares: `row_squares(weight)`. A row that is all zeros has c = 0 if its magnitude is.
    """
    return magnitude / row_norms(weight, squares, a, b, scale, e)

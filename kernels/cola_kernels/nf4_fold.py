"""`nf4_merge_`: fold a low-rank update into an NF4 weight, in place, with every scale frozen: only codes are rewritten.

    target = W + scale · B A                 W on its grid LEVELS · absmax
    y      = target / absmax                 rounded to one of LEVELS, in one of three ways

nearest     keeps next to nothing of an update that is smaller than half a step of the grid.
stochastic  takes the level above with probability (y - below) / (above - below): keeps all of it in expectation.
activation  rounds column by column, and moves the error of each, as the inputs see it, to the columns still to come:
            the recursion of GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
            Transformers", ICLR 2023, algorithm 1), columns of large second moment first.

This is the specification in plain PyTorch, and the path a CPU takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import nf4
from .checks import check_nf4_merge
from .nf4 import LEVELS, NF4
from .philox import DRAW_RANGE, as_seed, draws
from .reference import FoldReport, fold_report

BLOCK_COLUMNS = 128  # of the activation-aware recursion: behind a block, one product updates all columns to come


def nf4_merge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    rounding: str = "activation",
    second_moment: Tensor | None = None,
    tokens: int | None = None,
    damping: float = 0.01,
    held_out: Tensor | None = None,
    seed: int = 0,
) -> FoldReport:
    """`weight += scale · B A` in the codes of an NF4 weight; its scales, and its storage, stay as they are.

    nearest and stochastic work tile by tile. activation needs an fp32 copy of this one weight, and K x K in fp64.

    Args:
        weight: `[N, K]`, a `Params4bit` of bitsandbytes or any tensor with such a `quant_state`.
        lora_a, lora_b: `[R, K]` and `[N, R]`.
        rounding: "activation", "nearest" or "stochastic".
        second_moment: of the inputs, the mean of x xᵀ over tokens, `[K, K]`; for activation only.
        tokens: how many tokens second_moment is the mean of, to check that they are enough.
        damping: added to the diagonal of second_moment, as a share of its mean.
        held_out: a second moment of other inputs, `[K, K]`, in whose metric the fold is reported: an inner product of
            changes E and D is tr(E H Dᵀ), so that error is that of the layer's output. None: the Frobenius product.
        seed: of stochastic rounding; the same seed gives the same codes again.

    Raises:
        ValueError: a weight that is not NF4, or whose rows are not whole blocks; factors that do not fit or are not
            finite; a second moment that is missing, does not fit, is not finite or not definite; too few tokens for
            the damping. The weight is then as it was.
    """
    return fold(REFERENCE, weight, lora_a, lora_b, scale, rounding, second_moment, tokens, damping, held_out, seed)


class Kernels(NamedTuple):
    """What a backend implements."""

    round_codes_: Callable[[NF4, Tensor, Tensor, float, Tensor | None], Tensor]
    round_block: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fold(
    kernels: Kernels,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    rounding: str,
    second_moment: Tensor | None,
    tokens: int | None,
    damping: float,
    held_out: Tensor | None,
    seed: int,
) -> FoldReport:
    """`nf4_merge_` on either backend. Nothing is written before everything that can be refused has been checked."""
    view = nf4.read(weight)
    check_nf4_merge(view, lora_a, lora_b, rounding, second_moment, held_out)
    a, b = lora_a.detach().float(), lora_b.detach().float()
    key = as_seed(seed, a.device) if rounding == "stochastic" else None
    with torch.no_grad():
        if second_moment is not None and rounding == "activation":
            upper, order = inverse_factor(second_moment, damping, tokens)
            codes = activation_codes(kernels, view, a, b, scale, upper, order)
        elif held_out is None:
            return fold_report(*kernels.round_codes_(view, a, b, scale, key))
        else:  # a copy of the codes: the change is measured between the two
            codes = view.codes.clone()
            kernels.round_codes_(view._replace(codes=codes), a, b, scale, key)
        return fold_report(*replace_codes_(view, codes, a, b, scale, held_out))


def round_codes_(view: NF4, a: Tensor, b: Tensor, scale: float, seed: Tensor | None) -> Tensor:
    """Nearest rounding, or stochastic with a seed, tile by tile. Returns `fold_report`'s sums of Frobenius products."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for rows in nf4.tiles(view):
        tile, absmax = view.codes[rows], nf4.scales(view, rows)
        old = nf4.unpack(tile)
        before, delta = nf4.values(old, absmax), torch.mm(b[rows], a).mul_(scale)
        y = normalise(before + delta, absmax, old)
        new = nearest(y) if seed is None else stochastic(y, draws(seed, *y.shape, first_row=rows.start))
        tile.copy_(nf4.pack(new))
        sums += _sums(nf4.values(new, absmax).sub_(before), delta, None)
    return sums


def replace_codes_(view: NF4, codes: Tensor, a: Tensor, b: Tensor, scale: float, metric: Tensor | None) -> Tensor:
    """Write `codes` [N, K / 2] into the weight. Returns `fold_report`'s sums."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    metric = None if metric is None else metric.float()
    for rows in nf4.tiles(view):
        absmax = nf4.scales(view, rows)
        before, after = (nf4.values(nf4.unpack(c[rows]), absmax) for c in (view.codes, codes))
        sums += _sums(after.sub_(before), torch.mm(b[rows], a).mul_(scale), metric)
        view.codes[rows] = codes[rows]
    return sums


def _sums(change: Tensor, delta: Tensor, metric: Tensor | None) -> Tensor:
    """change · delta, delta² and (change - delta)²."""

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return ((left if metric is None else left @ metric) * right).sum(dtype=torch.float64)

    error = change - delta
    return torch.stack((inner(change, delta), inner(delta, delta), inner(error, error)))


def normalise(target: Tensor, absmax: Tensor, codes: Tensor) -> Tensor:
    """target [rows, K] in units of absmax [rows, K / blocksize]; where that is 0, nothing can change: the old level."""
    blocks = target.view(*absmax.shape, -1)
    y = blocks / absmax[:, :, None]
    old = target.new_tensor(LEVELS)[codes.int()].view(blocks.shape)
    return torch.where(absmax[:, :, None] == 0, old, y).view(target.shape)


def nearest(y: Tensor) -> Tensor:
    """The code of the level nearest to y; the lower one half way between."""
    levels = y.new_tensor(LEVELS)
    return torch.bucketize(y, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def stochastic(y: Tensor, draw: Tensor) -> Tensor:
    """The code of one of the levels around y, such that the mean of the levels over draws is y clamped to [-1, 1].

    The probability is rounded to a multiple of 2**-16: y that is a level but for fp32's rounding stays that level.
    """
    levels = y.new_tensor(LEVELS)
    below = torch.bucketize(y, levels[1:-1], out_int32=True, right=True)  # 0 .. 14
    share = (y - levels[below]) / (levels[1:] - levels[:-1])[below]
    threshold = torch.floor(share * DRAW_RANGE + 0.5) - DRAW_RANGE // 2
    return (below + (draw < threshold)).to(torch.uint8)


def activation_codes(
    kernels: Kernels, view: NF4, a: Tensor, b: Tensor, scale: float, upper: Tensor, order: Tensor
) -> Tensor:
    """The codes [N, K / 2] that the GPTQ recursion ends with, taking the columns in `order`; see `inverse_factor`."""
    n, k = view.shape
    left = torch.empty(n, k, device=a.device)  # what the columns still to come have to represent, in `order`
    codes = torch.empty(n, k, dtype=torch.uint8, device=a.device)  # likewise
    for rows in nf4.tiles(view):
        old = nf4.unpack(view.codes[rows])
        left[rows] = nf4.values(old, nf4.scales(view, rows)).addmm_(b[rows], a, alpha=scale)[:, order]
        codes[rows] = old[:, order]
    absmax, block = nf4.scales(view, slice(0, n)), order // view.layout.blocksize
    for first in range(0, k, BLOCK_COLUMNS):
        here, behind = slice(first, first + BLOCK_COLUMNS), slice(first + BLOCK_COLUMNS, k)
        errors = kernels.round_block(left[:, here], codes[:, here], absmax[:, block[here]], upper[here, here])
        left[:, behind].addmm_(errors, upper[here, behind], alpha=-1)
    return nf4.pack(codes[:, order.argsort()])


def round_block(left: Tensor, codes: Tensor, absmax: Tensor, upper: Tensor) -> Tensor:
    """Round the columns of left [N, BK] one after the other; codes and absmax [N, BK], upper [BK, BK].

    The codes are rewritten. Returns the errors [N, BK], weighted as the columns behind the block need them.
    """
    levels = left.new_tensor(LEVELS)
    errors = torch.empty_like(left)
    for i in range(left.shape[1]):
        y = normalise(left[:, i : i + 1], absmax[:, i : i + 1], codes[:, i : i + 1])
        codes[:, i] = nearest(y)[:, 0]
        errors[:, i] = (left[:, i] - levels[codes[:, i].int()] * absmax[:, i]) / upper[i, i]
        left[:, i + 1 :].addr_(errors[:, i], upper[i, i + 1 :], alpha=-1)
    return errors


def inverse_factor(second_moment: Tensor, damping: float, tokens: int | None) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of the damped second moment, fp32 [K, K], computed in fp64; and the
    order of the columns that it is for, those of large second moment first.

    Raises:
        ValueError: not positive definite, or fewer tokens than twice its effective dimension tr(H (H + λ)⁻¹): fewer do
            not determine the directions that the damping λ leaves to the data.
    """
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    moment, k = second_moment[order][:, order].double(), len(order)
    damp = damping * float(moment.diagonal().mean())
    moment.diagonal().add_(damp)
    lower, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        raise ValueError(f"second_moment is not positive definite with a damping of {damping:g}: give more damping.")
    inverse = torch.cholesky_inverse(lower)
    dimension = k - damp * float(inverse.diagonal().sum())
    if tokens is not None and tokens < 2 * dimension:
        raise ValueError(
            f"second_moment is the mean over {tokens} tokens, but with a damping of {damping:g} it takes at least "
            f"{math.ceil(2 * dimension)}: give more tokens or more damping."
        )
    return torch.linalg.cholesky(inverse, upper=True).float().contiguous(), order


REFERENCE = Kernels(round_codes_, round_block)


def carry(residual: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A [R, K], B [N, R] whose product is the best fit of residual [N, K] for these inputs.

    It minimises tr((residual - B A) H (residual - B A)ᵀ): the truncated SVD of residual · H^½ (Eckart, Young 1936). A
    share of 1e-4 of H's mean eigenvalue is added where H has less, so that directions never seen cost something.
    """
    values, vectors = torch.linalg.eigh(second_moment.double())
    root = values.clamp_min(1e-4 * float(values.mean())).sqrt()
    u, s, vh = torch.linalg.svd(residual.double() @ (vectors * root), full_matrices=False)
    half = s[:rank].sqrt()
    a = half[:, None] * vh[:rank] @ (vectors / root).t()
    return a.to(residual.dtype), (u[:, :rank] * half).to(residual.dtype)

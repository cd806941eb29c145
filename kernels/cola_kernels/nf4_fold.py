"""`nf4_merge_`: fold a low-rank update into an NF4 weight, in place, with every scale frozen: only codes are rewritten.

    target = W + scale · B A                 W on its grid LEVELS · absmax
    y      = target / absmax                 rounded to one of LEVELS, in one of three ways

nearest     keeps next to nothing of an update that is smaller than half a step of the grid.
stochastic  takes the level above with probability (y - below) / (above - below): keeps all of it in expectation.
activation  rounds column by column, and moves the error of each, as the inputs see it, to the columns still to come:
            the recursion of GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
            Transformers", ICLR 2023, algorithm 1), columns of large second moment first. Quiet, but it keeps all of an
            update only where that is not much smaller than a step.

Noise that each element draws for itself does little harm; what is lost of an update systematically, does. So a trained
link, some hundredths of a step in size, wants stochastic; nf4_carry.py then takes off most of the noise.

This is the specification in plain PyTorch, and the path a CPU takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import nf4
from .checks import check_nf4_merge
from .nf4 import LEVELS, NF4
from .nf4_carry import carry, damped_factor
from .philox import DRAW_RANGE, as_seed, draws
from .reference import FoldReport, fold_report

BLOCK_COLUMNS = 128  # of the activation-aware recursion: behind a block, one product updates all columns to come


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
    *,
    rounding: str = "stochastic",
    seed: int = 0,
    second_moment: Tensor | None = None,
    tokens: int | None = None,
    damping: float = 0.01,
    held_out: Tensor | None = None,
    carry_rank: int = 0,
) -> tuple[FoldReport, tuple[Tensor, Tensor] | None]:
    """`ops.nf4_merge_` and, with a carry_rank, `ops.nf4_merge_with_carry_`, on either backend.

    Nothing is written before everything that can be refused has been checked.
    """
    view = nf4.read(weight)
    check_nf4_merge(view, lora_a, lora_b, rounding, second_moment, held_out, carry_rank)
    a, b = lora_a.detach().float(), lora_b.detach().float()
    key = as_seed(seed, a.device) if rounding == "stochastic" else None
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        lower = damped_factor(second_moment, damping, tokens) if second_moment is not None and carry_rank else None
        if rounding == "activation" and second_moment is not None:
            upper, order = inverse_factor(second_moment, damping, tokens)
            codes = activation_codes(kernels, view, a, b, scale, upper, order)
        elif held_out is None and lower is None:
            return fold_report(*kernels.round_codes_(view, a, b, scale, key)), None
        else:  # a copy of the codes: what changed is measured between the two
            codes = view.codes.clone()
            kernels.round_codes_(view._replace(codes=codes), a, b, scale, key)
        rest = None if lower is None else carry(view, codes, a, b, scale, lower, carry_rank)
        return fold_report(*replace_codes_(view, codes, a, b, scale, held_out)), rest


def round_codes_(view: NF4, a: Tensor, b: Tensor, scale: float, seed: Tensor | None) -> Tensor:
    """Nearest rounding, or stochastic with a seed, tile by tile. Returns `fold_report`'s sums of Frobenius products."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for rows in nf4.tiles(view):
        tile, absmax = view.codes[rows], nf4.scales(view, rows)
        before, delta = nf4.values(tile, absmax), torch.mm(b[rows], a).mul_(scale)
        y = normalise(before + delta, absmax, nf4.unpack(tile))
        new = nearest(y) if seed is None else stochastic(y, draws(seed, *y.shape, first_row=rows.start))
        tile.copy_(nf4.pack(new))
        sums += _sums(nf4.values(tile, absmax).sub_(before), delta, None)
    return sums


def replace_codes_(view: NF4, codes: Tensor, a: Tensor, b: Tensor, scale: float, metric: Tensor | None) -> Tensor:
    """Write `codes` [N, K / 2] into the weight. Returns `fold_report`'s sums."""
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    metric = None if metric is None else metric.float()
    for rows in nf4.tiles(view):
        absmax = nf4.scales(view, rows)
        before, after = (nf4.values(c[rows], absmax) for c in (view.codes, codes))
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
    # what the columns still to come have to represent, in `order`
    left = torch.empty(n, k, dtype=torch.float32, device=a.device)
    codes = torch.empty(n, k, dtype=torch.uint8, device=a.device)  # likewise
    for rows in nf4.tiles(view):
        old = view.codes[rows]
        left[rows] = nf4.values(old, nf4.scales(view, rows)).addmm_(b[rows], a, alpha=scale)[:, order]
        codes[rows] = nf4.unpack(old)[:, order]
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
    order of the columns that it is for, those of large second moment first. Raises as `damped_factor`."""
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    lower = damped_factor(second_moment[order][:, order], damping, tokens)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float().contiguous(), order


REFERENCE = Kernels(round_codes_, round_block)

"""The ops in plain PyTorch: the specification of the Triton kernels, and the path a CPU takes.

    Y  = X Wᵀ + scale · S Bᵀ + bias        S  = drop(X) Aᵀ
    dX = dY W + undrop(dS A)               dS = scale · dY B
    dA = dSᵀ drop(X)                       dB = scale · dYᵀ S

Letters: M tokens, K in_features, N out_features, R rank; x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R].
Backward keeps x and S, nothing else: dropout is made again from its seed, and with A frozen x is not kept either.
Any float dtype works, float64 included, which is how the other implementations are judged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_lora_linear, check_merge
from .philox import DRAW_RANGE, as_seed, draws


class FoldReport(NamedTuple):
    """What a fold did to one weight, against the update `delta` it was asked to add (Frobenius inner product).

    retained: projection of the change on delta; 1.0 is all of it, 0.0 is nothing.
    error: norm of (change - delta) over norm of delta; 0.0 is exact.
    """

    retained: float
    error: float


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ + bias`, differentiable in x, lora_a, lora_b and bias.

    Args:
        x: `[..., K]`, floating point.
        weight: `[N, K]`, frozen, of x's dtype (or any float dtype under autocast).
        lora_a, lora_b: `[R, K]` and `[N, R]`, any float dtype; used in x's dtype, gradients come back in their own.
        scale: alpha / R.
        bias: `[N]` or None.
        dropout: probability in [0, 1) that an element of x is left out of the low-rank branch.
        seed: of the dropout mask: an int, an int64 scalar tensor on x's device, or None to draw one from torch's
            generator. Ignored without dropout.

    Returns:
        `[..., N]` in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit, dropout outside [0, 1), a weight that requires a gradient.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}: cast one of them, or use torch.autocast.")
    check_lora_linear(x, weight, lora_a, lora_b, bias, dropout)
    mask_seed = as_seed(seed, x.device) if dropout > 0 else None
    return _LoRALinear.apply(x, weight, lora_a, lora_b, bias, scale, dropout, mask_seed)  # type: ignore[no-any-return]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])  # [M, K]
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # [M, N]
        s = F.linear(_drop(rows, dropout, seed), lora_a.to(dtype))  # [M, R]
        y.addmm_(s, lora_b.to(dtype).t(), alpha=scale)
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, s if needs_b else None, weight, lora_a, lora_b, seed)
        ctx.scale, ctx.dropout, ctx.x_shape = scale, dropout, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, weight, lora_a, lora_b, seed = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
        scale, dropout, dtype = ctx.scale, ctx.dropout, dy.dtype
        dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
        dx = da = db = dbias = ds = None
        if needs_x or needs_a:
            ds = torch.mm(dy, lora_b.to(dtype)).mul_(scale)  # [M, R]
        if needs_x:
            dx = torch.mm(dy, weight.to(dtype))  # [M, K]
            if dropout > 0:
                dx += _drop(torch.mm(ds, lora_a.to(dtype)), dropout, seed)
            else:
                dx.addmm_(ds, lora_a.to(dtype))
            dx = dx.reshape(ctx.x_shape)
        if needs_a:
            rows = x.reshape(-1, x.shape[-1])
            da = torch.mm(ds.t(), _drop(rows, dropout, seed)).to(lora_a.dtype)  # [R, K]
        if needs_b:
            db = torch.mm(dy.t(), s).mul_(scale).to(lora_b.dtype)  # [N, R]
        if needs_bias:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return dx, None, da, db, dbias, None, None, None


def _drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout of x `[M, K]`; also its own adjoint, so backward uses it on dX."""
    if dropout == 0 or seed is None:
        return x
    return x * dropout_mask(seed, x.shape[0], x.shape[1], dropout) * _inverse_keep(dropout)


def dropout_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """True where an element is kept. The probability is rounded to a multiple of 2**-16."""
    return draws(seed, rows, columns) >= _threshold(dropout)


def _threshold(dropout: float) -> int:
    return min(round(dropout * DRAW_RANGE), DRAW_RANGE - 1)


def _inverse_keep(dropout: float) -> float:
    """One over the probability of being kept, as rounded: the mean is preserved exactly."""
    return DRAW_RANGE / (DRAW_RANGE - _threshold(dropout))


TILE_ELEMENTS = 1 << 15  # of the fp32 tile merge_ works in: 128 KiB, so that all temporaries together stay small


def merge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    report: bool = False,
) -> FoldReport | None:
    """`weight += scale · B A` in place, tile by tile, rounded once from fp32 (fp64 for an fp64 weight).

    Args:
        weight: `[N, K]` bf16, fp16, fp32 or fp64; any strides; changed in place, its storage stays.
        lora_a, lora_b: `[R, K]` and `[N, R]`.
        rounding: "nearest", or "stochastic": up or down with the probability that makes the expectation exact.
        seed: of stochastic rounding; the same seed gives the same weight again.
        report: also measure what the weight's dtype kept of the update.

    Raises:
        ValueError: shapes that do not fit, a dtype that is not floating point, an unknown rounding.
    """
    check_merge(weight, lora_a, lora_b, rounding)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    n, k = weight.shape
    a = lora_a.detach().to(wide)
    key = as_seed(seed, weight.device)
    along = change_sq = delta_sq = torch.zeros((), dtype=torch.float64, device=weight.device)
    with torch.no_grad():
        tile_rows = max(1, TILE_ELEMENTS // max(k, 1))
        for first in range(0, n, tile_rows):
            tile = weight[first : first + tile_rows]
            b = lora_b.detach()[first : first + tile_rows].to(wide)
            target = torch.addmm(tile.to(wide), b, a, alpha=scale)
            before = tile.clone() if report else None
            if rounding == "stochastic" and weight.dtype in _DROPPED_BITS:
                tile.copy_(_round_stochastic(target, weight.dtype, key, first))
            else:
                tile.copy_(target)
            if before is not None:
                delta = torch.mm(b, a).mul_(scale)
                change = tile.to(wide) - before.to(wide)
                along = along + (change * delta).sum(dtype=torch.float64)
                delta_sq = delta_sq + delta.square().sum(dtype=torch.float64)
                change_sq = change_sq + change.sub_(delta).square_().sum(dtype=torch.float64)
    if not report:
        return None
    if float(delta_sq) == 0:
        return FoldReport(retained=1.0, error=0.0)
    return FoldReport(float(along / delta_sq), float((change_sq / delta_sq).sqrt()))


_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of fp32's mantissa


def _round_stochastic(value: Tensor, dtype: torch.dtype, seed: Tensor, first_row: int) -> Tensor:
    """Round fp32 `[rows, K]` to a neighbour in `dtype`, away from zero with probability distance / spacing.

    A draw is added to the bits that `dtype` has no room for, and what is left of them is cut off: the carry is the
    rounding. Below fp16's smallest normal number, 6.1e-5, the conversion itself rounds to nearest.
    """
    dropped = _DROPPED_BITS[dtype]
    draw = draws(seed, value.shape[0], value.shape[1], first_row=first_row).to(torch.int32) >> (16 - dropped)
    return (value.view(torch.int32) + draw).bitwise_and_(-(1 << dropped)).view(torch.float32).to(dtype)

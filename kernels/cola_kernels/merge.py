"""`merge_`: fold a low-rank update into a dense weight, W = c ⊙ (W + scale · B A), in place, by tiles, in Triton.

A program reads one tile of W, adds its part of the update in fp32, rounds once and writes it back: nothing of W's size
is allocated. Stochastic rounding draws the bits of `philox.draws`, as the reference does, so that for the same sum both
write the same weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .checks import check_merge
from .philox import as_seed
from .reference import DROPPED_BITS, FoldReport
from .tiles import draws, fp32_dot, natural_order, thread_order
from .tuning import Config, cdiv

# Memory-bound and run once a link: one configuration. BR is how much of the rank one step of the product takes.
CONFIG: Config = {"BN": 64, "BK": 64, "BR": 16, "num_warps": 4, "num_stages": 1}


@triton.jit
def _round_stochastic(value, draw, DTYPE: tl.constexpr, DROPPED: tl.constexpr):
    """fp32 in DTYPE, without its last DROPPED bits: the carry of a draw decides, as in the reference."""
    bits = value.to(tl.int32, bitcast=True) + (draw >> (16 - DROPPED))
    if DROPPED == 16:  # the upper half is the bf16
        return (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return (bits & -(1 << DROPPED)).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _merge_kernel(
    p_w,
    p_a,
    p_b,
    p_c,
    p_seed,
    p_report,
    N,
    K,
    R,
    first_row,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scale,
    GATED: tl.constexpr,
    DROPPED: tl.constexpr,
    REPORT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """DROPPED is how many bits of fp32 the weight's dtype has no room for, or 0 to round to nearest.

    With REPORT, a tile leaves in p_report [3, tiles]: change · delta, delta², (change - delta)², summed.
    """
    tiles_k = tl.cdiv(K, BK)
    tile = tl.program_id(0)
    first_k = tile % tiles_k * BK
    o_n = (tile // tiles_k).to(tl.int64) * BN + tl.arange(0, BN)
    o_k = first_k + tl.arange(0, BK)
    p_tile = p_w + o_n[:, None] * stride_wn + o_k.to(tl.int64)[None, :] * stride_wk
    m_w = (o_n < N)[:, None] & (o_k < K)[None, :]
    before = tl.load(p_tile, mask=m_w, other=0.0)  # [BN, BK]: on its way while the product is made
    o_a = tl.max_contiguous(tl.multiple_of(first_k + thread_order(BK), 2), 2)  # the columns of A
    o_a64 = o_a.to(tl.int64)
    delta = tl.zeros([BN, BK], tl.float32)
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        m_b = (o_n < N)[:, None] & (o_r < R)[None, :]
        b_b = tl.load(p_b + o_n[:, None] * stride_bn + o_r[None, :] * stride_br, mask=m_b, other=0.0)  # [BN, BR]
        m_a = (o_r < R)[:, None] & (o_a < K)[None, :]
        b_a = tl.load(p_a + o_r[:, None] * stride_ar + o_a64[None, :] * stride_ak, mask=m_a, other=0.0)  # [BR, BK]
        delta = fp32_dot(b_b.to(tl.float32), b_a.to(tl.float32), delta)
    delta = natural_order(delta) * scale
    target = before.to(tl.float32) + delta
    if GATED:
        target *= tl.load(p_c + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
        delta = target - before.to(tl.float32)
    if DROPPED:
        after = _round_stochastic(target, draws(p_seed, first_row + o_n, first_k, K, BK), before.dtype, DROPPED)
    else:
        after = target.to(before.dtype)
    tl.store(p_tile, after, mask=m_w)
    if REPORT:
        change = after.to(tl.float32) - before.to(tl.float32)
        tiles = tl.num_programs(0)
        tl.store(p_report + tile, tl.sum(change * delta))
        tl.store(p_report + tiles + tile, tl.sum(delta * delta))
        tl.store(p_report + 2 * tiles + tile, tl.sum((change - delta) * (change - delta)))


def merge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    first_row: int = 0,
    report: bool = False,
    c: Tensor | None = None,
) -> FoldReport | None:
    """`weight = c ⊙ (weight + scale · B A)` in place, rounded once from fp32; `reference.merge_` says what the
    arguments are."""
    check_merge(weight, lora_a, lora_b, rounding, c)
    (n, k), r = weight.shape, lora_a.shape[0]
    if weight.numel() == 0:
        return FoldReport(retained=1.0, error=0.0) if report else None
    dropped = DROPPED_BITS.get(weight.dtype, 0) if rounding == "stochastic" else 0
    tiles = cdiv(n, CONFIG["BN"]) * cdiv(k, CONFIG["BK"])
    sums = weight.new_empty(3, tiles, dtype=torch.float32) if report else None
    a, b = lora_a.detach(), lora_b.detach()
    _merge_kernel[(tiles,)](
        weight.detach(),
        a,
        b,
        None if c is None else c.detach().contiguous(),
        as_seed(seed, weight.device) if dropped else None,
        sums,
        n,
        k,
        r,
        first_row,
        *weight.stride(),
        *a.stride(),
        *b.stride(),
        float(scale),
        GATED=c is not None,
        DROPPED=dropped,
        REPORT=report,
        **CONFIG,
    )
    if sums is None:
        return None
    return reference.fold_report(*sums.sum(dim=1, dtype=torch.float64))

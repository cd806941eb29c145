"""`nf4_merge_` in Triton: the codes of an NF4 weight rewritten in place, the update accumulated in fp32.

`nf4_fold` is the specification. Nearest and stochastic rounding are one pass over the codes. The activation-aware
recursion keeps a block of 128 columns of some rows on chip, rows in parallel; behind it, one product in PyTorch updates
the columns to come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dequantize import levels, load_scales
from .nf4 import NF4
from .nf4_fold import BLOCK_COLUMNS, Kernels
from .tiles import dot, draws
from .tuning import Config

# Run once a link: one configuration each. BR is how much of the rank one step of the product takes. Fused products and
# sums are off, so that a target on a level stays on it.
CONFIG: Config = {"BN": 16, "BK": 128, "BR": 16, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
BLOCK_CONFIG: Config = {"BN": 16, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def _nearest(p_levels, y):
    """The code of the nearest level, the lower one half way between: how many of the 15 mid-points lie below y."""
    code = tl.zeros(y.shape, tl.int32)
    for step in tl.static_range(4):
        code += tl.where(y > tl.load(p_levels + 16 + code + (8 >> step) - 1), 8 >> step, 0)
    return code


@triton.jit
def _below(p_levels, y):
    """The code of the level at or below y, at most 14: how many of levels 1 to 15 are not above it."""
    code = tl.zeros(y.shape, tl.int32)
    for step in tl.static_range(4):
        code += tl.where(y >= tl.load(p_levels + code + (8 >> step)), 8 >> step, 0)
    return tl.minimum(code, 14)


@triton.jit
def _stochastic(p_levels, y, draw):
    """The level below y or the one above, by a draw of [0, 65536), as `nf4_fold.stochastic`."""
    below = _below(p_levels, y)
    floor = tl.load(p_levels + below)
    share = tl.div_rn(y - floor, tl.load(p_levels + below + 1) - floor)
    threshold = tl.floor(share * 65536.0 + 0.5)
    return below + (draw.to(tl.float32) < threshold).to(tl.int32)


@triton.jit
def _normalise(p_levels, target, scale, code):
    """target in units of its scale; where that is 0, the old level."""
    y = tl.div_rn(target, tl.where(scale == 0, 1.0, scale))
    return tl.where(scale == 0, tl.load(p_levels + code), y)


@triton.jit
def _merge_kernel(
    p_codes,
    p_absmax,
    p_absmax2,
    p_table,
    p_offset,
    p_levels,
    p_a,
    p_b,
    p_seed,
    p_report,
    N,
    K,
    R,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    scale,
    BS: tl.constexpr,
    BS2: tl.constexpr,
    BLOCKS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """A tile has BLOCKS scales a row. It leaves in p_report [3, tiles] its sums of change · delta, delta² and
    (change - delta)²."""
    tiles_k = tl.cdiv(K, BK)
    tile = tl.program_id(0)
    first_k = tile % tiles_k * BK
    o_n = (tile // tiles_k).to(tl.int64) * BN + tl.arange(0, BN)
    o_k = first_k + tl.arange(0, BK)
    m_n, m_k = o_n < N, o_k < K
    m_w = m_n[:, None] & m_k[None, :]
    delta = tl.zeros([BN, BK], tl.float32)
    for r in range(0, R, BR):
        o_r = r + tl.arange(0, BR)
        m_b = m_n[:, None] & (o_r < R)[None, :]
        b_b = tl.load(p_b + o_n[:, None] * stride_bn + o_r[None, :] * stride_br, mask=m_b, other=0.0)  # [BN, BR]
        m_a = (o_r < R)[:, None] & m_k[None, :]
        p_tile_a = p_a + o_r[:, None] * stride_ar + o_k.to(tl.int64)[None, :] * stride_ak
        b_a = tl.load(p_tile_a, mask=m_a, other=0.0)  # [BR, BK]
        delta = dot(b_b.to(tl.float32), b_a.to(tl.float32), delta)
    delta *= scale
    o_half = first_k // 2 + tl.arange(0, BK // 2)
    p_bytes = p_codes + o_n[:, None] * (K // 2) + o_half[None, :]
    m_bytes = m_n[:, None] & (o_half < K // 2)[None, :]
    byte = tl.load(p_bytes, mask=m_bytes, other=0).to(tl.int32)  # [BN, BK / 2]
    code = tl.reshape(tl.join(byte >> 4, byte & 15), [BN, BK])
    o_block = first_k // BS + tl.arange(0, BLOCKS)
    m_block = m_n[:, None] & (o_block < K // BS)[None, :]
    o_block = o_n[:, None] * (K // BS) + o_block[None, :]
    absmax = load_scales(p_absmax, p_absmax2, p_table, p_offset, o_block, m_block, BS2)  # [BN, BLOCKS]
    absmax = tl.reshape(tl.broadcast_to(absmax[:, :, None], [BN, BLOCKS, BK // BLOCKS]), [BN, BK])
    before = tl.load(p_levels + code) * absmax
    y = _normalise(p_levels, before + delta, absmax, code)
    new = _stochastic(p_levels, y, draws(p_seed, o_n, first_k, K, BK)) if STOCHASTIC else _nearest(p_levels, y)
    high, low = tl.split(tl.reshape(new, [BN, BK // 2, 2]))
    tl.store(p_bytes, ((high << 4) | low).to(tl.uint8), mask=m_bytes)
    change = tl.where(m_w, tl.load(p_levels + new) * absmax - before, 0.0)
    tiles = tl.num_programs(0)
    tl.store(p_report + tile, tl.sum(change * delta))
    tl.store(p_report + tiles + tile, tl.sum(delta * delta))
    tl.store(p_report + 2 * tiles + tile, tl.sum((change - delta) * (change - delta)))


def round_codes_(view: NF4, a: Tensor, b: Tensor, scale: float, seed: Tensor | None) -> Tensor:
    """`nf4_fold.round_codes_`, in Triton."""
    (n, k), r = view.shape, a.shape[0]
    tiles = triton.cdiv(n, CONFIG["BN"]) * triton.cdiv(k, CONFIG["BK"])
    sums = a.new_empty(3, tiles, dtype=torch.float32)
    _merge_kernel[(tiles,)](
        *view[:5],
        levels(a.device),
        a,
        b,
        seed,
        sums,
        n,
        k,
        r,
        *a.stride(),
        *b.stride(),
        float(scale),
        BS=view.layout.blocksize,
        BS2=view.layout.blocksize2,
        BLOCKS=max(1, CONFIG["BK"] // view.layout.blocksize),
        STOCHASTIC=seed is not None,
        **CONFIG,
    )
    return sums.sum(dim=1, dtype=torch.float64)


@triton.jit
def _round_block_kernel(
    p_left,
    p_codes,
    p_absmax,
    p_upper,
    p_errors,
    p_levels,
    N,
    COLUMNS,
    stride_left,
    stride_codes,
    stride_absmax,
    stride_upper,
    stride_errors,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`nf4_fold.round_block` for BN rows: [BN, BK] stays on chip, and one column after the other is taken from it."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_n, m_k = o_n < N, o_k < COLUMNS
    mask = m_n[:, None] & m_k[None, :]
    left = tl.load(p_left + o_n[:, None] * stride_left + o_k[None, :], mask=mask, other=0.0)  # [BN, BK]
    for i in range(0, COLUMNS):
        u = tl.load(p_upper + i * stride_upper + o_k, mask=m_k & (o_k >= i), other=0.0)  # [BK], from the diagonal on
        column = tl.sum(tl.where((o_k == i)[None, :], left, 0.0), axis=1)  # [BN]
        absmax = tl.load(p_absmax + o_n * stride_absmax + i, mask=m_n, other=0.0)
        code = tl.load(p_codes + o_n * stride_codes + i, mask=m_n, other=0).to(tl.int32)
        new = _nearest(p_levels, _normalise(p_levels, column, absmax, code))
        error = tl.div_rn(column - tl.load(p_levels + new) * absmax, tl.load(p_upper + i * stride_upper + i))
        tl.store(p_codes + o_n * stride_codes + i, new.to(tl.uint8), mask=m_n)
        tl.store(p_errors + o_n * stride_errors + i, error, mask=m_n)
        left -= error[:, None] * u[None, :]


def round_block(left: Tensor, codes: Tensor, absmax: Tensor, upper: Tensor) -> Tensor:
    """`nf4_fold.round_block`, in Triton; a row's elements must lie side by side in every operand."""
    n, columns = left.shape
    errors = left.new_empty(n, columns)
    _round_block_kernel[(triton.cdiv(n, BLOCK_CONFIG["BN"]),)](
        left,
        codes,
        absmax,
        upper,
        errors,
        levels(left.device),
        n,
        columns,
        left.stride(0),
        codes.stride(0),
        absmax.stride(0),
        upper.stride(0),
        errors.stride(0),
        BK=BLOCK_COLUMNS,
        **BLOCK_CONFIG,
    )
    return errors


TRITON = Kernels(round_codes_, round_block)

"""The skinny products of the LoRA linear in Triton: each reads its large operand once, at the speed of memory.

    project        S = scale · drop(x) Aᵀ                    a program owns rows of x and walks along K
    output_grads   dS = scale · dY B, dB = scale · dYᵀ S     a program owns columns of dY and walks down M
    factor_grad    dA = dSᵀ drop(x)                          likewise for x

The last two reduce over M, so programs leave fp32 partial sums, which `_sum_kernel` adds in a fixed order: the result
does not depend on scheduling, as it would with atomics. Dropout is made again in flight. It scales by a constant, which
is applied to the product rather than to every element of x.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import dropout_threshold, inverse_keep
from .tiles import dot, kept
from .tuning import Config, Shape, cdiv, choose, is_hopper, power_of_two, rank_block

MAX_RANK_BLOCK = 128  # a larger rank is cut, and x read once for each block
MAX_RANK_BLOCK_OUTPUT = 64  # output_grads holds two products at once


@triton.jit
def _project_kernel(
    p_x,
    p_a,
    p_s,
    p_seed,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    scale,
    threshold,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    acc = tl.zeros([BM, BR], tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        in_k = o_k < K
        o_k64 = o_k.to(tl.int64)
        m_x = (o_m < M)[:, None] & in_k[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_xm + o_k64[None, :] * stride_xk, mask=m_x, other=0.0)  # [BM, BK]
        if DROPOUT:
            b_x = tl.where(kept(p_seed, o_m, k, K, threshold, BK), b_x, 0.0)
        m_a = in_k[:, None] & (o_r < R)[None, :]
        b_a = tl.load(p_a + o_k64[:, None] * stride_ak + o_r[None, :] * stride_ar, mask=m_a, other=0.0)  # [BK, BR]
        acc = dot(b_x, b_a, acc)
    m_s = (o_m < M)[:, None] & (o_r < R)[None, :]
    tl.store(p_s + o_m[:, None] * R + o_r[None, :], (acc * scale).to(p_s.dtype.element_ty), mask=m_s)


@triton.jit
def _output_grads_kernel(
    p_dy,
    p_b,
    p_s,
    p_ds,
    p_db,
    M,
    N,
    R,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_sm,
    stride_sr,
    ROWS,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """Partial sums: p_ds [N / BC, M, R], one a strip of columns; p_db [M / ROWS, N, R], one a run of rows."""
    i_n = tl.program_id(0)
    i_run = tl.program_id(1)
    o_n = i_n * BC + tl.arange(0, BC)
    o_r = tl.program_id(2) * BR + tl.arange(0, BR)
    in_n = o_n < N
    in_r = o_r < R
    o_n64 = o_n.to(tl.int64)
    m_b = in_n[:, None] & in_r[None, :]
    b_b = tl.load(p_b + o_n64[:, None] * stride_bn + o_r[None, :] * stride_br, mask=m_b, other=0.0)  # [BC, BR]
    acc = tl.zeros([BR, BC], tl.float32)
    for m in range(0, ROWS, BM):
        o_m = i_run.to(tl.int64) * ROWS + m + tl.arange(0, BM)
        in_m = o_m < M
        m_dy = in_m[:, None] & in_n[None, :]
        b_dy = tl.load(p_dy + o_m[:, None] * stride_dym + o_n64[None, :] * stride_dyn, mask=m_dy, other=0.0)  # [BM, BC]
        m_s = in_r[:, None] & in_m[None, :]
        b_s = tl.load(p_s + o_r[:, None] * stride_sr + o_m[None, :] * stride_sm, mask=m_s, other=0.0)  # [BR, BM]
        b_ds = dot(b_dy, b_b, tl.zeros([BM, BR], tl.float32))
        p_ds_tile = p_ds + (i_n.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
        tl.store(p_ds_tile, b_ds, mask=in_m[:, None] & in_r[None, :])
        acc = dot(b_s, b_dy, acc)
    p_db_tile = p_db + (i_run.to(tl.int64) * N + o_n64[:, None]) * R + o_r[None, :]
    tl.store(p_db_tile, tl.trans(acc), mask=m_b)


@triton.jit
def _factor_grad_kernel(
    p_ds,
    p_x,
    p_da,
    p_seed,
    M,
    K,
    R,
    stride_dsm,
    stride_dsr,
    stride_xm,
    stride_xk,
    threshold,
    ROWS,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """Partial sums p_da [M / ROWS, R, K], one a run of rows."""
    i_run = tl.program_id(1)
    first_k = tl.program_id(0) * BC
    o_k = first_k + tl.arange(0, BC)
    o_r = tl.program_id(2) * BR + tl.arange(0, BR)
    in_k = o_k < K
    in_r = o_r < R
    o_k64 = o_k.to(tl.int64)
    acc = tl.zeros([BR, BC], tl.float32)
    for m in range(0, ROWS, BM):
        o_m = i_run.to(tl.int64) * ROWS + m + tl.arange(0, BM)
        in_m = o_m < M
        m_x = in_m[:, None] & in_k[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_xm + o_k64[None, :] * stride_xk, mask=m_x, other=0.0)  # [BM, BC]
        if DROPOUT:
            b_x = tl.where(kept(p_seed, o_m, first_k, K, threshold, BC), b_x, 0.0)
        m_ds = in_r[:, None] & in_m[None, :]
        b_ds = tl.load(p_ds + o_r[:, None] * stride_dsr + o_m[None, :] * stride_dsm, mask=m_ds, other=0.0)  # [BR, BM]
        acc = dot(b_ds, b_x, acc)
    p_da_tile = p_da + (i_run.to(tl.int64) * R + o_r[:, None]) * K + o_k[None, :]
    tl.store(p_da_tile, acc, mask=in_r[:, None] & in_k[None, :])


@triton.jit
def _sum_kernel(p_parts, p_out, parts, count, scale, BT: tl.constexpr, BC: tl.constexpr):
    """out [count] = scale · the sum of parts [parts, count]; BT parts are in flight at once."""
    o_c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    acc = tl.zeros([BC], tl.float32)
    for first in range(0, parts, BT):
        o_t = first + tl.arange(0, BT).to(tl.int64)
        mask = (o_t < parts)[:, None] & (o_c < count)[None, :]
        acc += tl.sum(tl.load(p_parts + o_t[:, None] * count + o_c[None, :], mask=mask, other=0.0), axis=0)  # [BC]
    tl.store(p_out + o_c, (acc * scale).to(p_out.dtype.element_ty), mask=o_c < count)


SUM_CONFIG: Config = {"BT": 16, "BC": 256, "num_warps": 4}


# Of each list the first is the rule. They were ranked by what the compiled loops ask of a processor for each element
# read: instructions, and bytes of shared memory, which bound a tile whose warps each read all of it. `python -m
# benchmarks run loops` counts them.


def project_configs(shape: Shape) -> list[Config]:
    if shape.dtype == torch.float32:  # multiplied without tensor cores: small tiles keep the unrolled code small
        return [{"BM": 32, "BK": 32, "num_warps": 4, "num_stages": 2}]
    # A is read again for every BM rows of x, from L2: the larger the rank, the taller the tile.
    if shape.rank > 64:
        return [{"BM": 64, "BK": 64, "num_warps": 8, "num_stages": 3}]
    if shape.rank > 32:
        tall: list[Config] = [
            {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
            {"BM": 64, "BK": 64, "num_warps": 8, "num_stages": 2},
        ]
        middle: Config = {"BM": 32, "BK": 128, "num_warps": 4, "num_stages": 3}
        return [middle, *tall] if shape.m <= 2048 else [*tall, middle]
    tiles: list[Config] = [
        {"BM": 32, "BK": 128, "num_warps": 4, "num_stages": 4},
        {"BM": 32, "BK": 128, "num_warps": 4, "num_stages": 3},
        {"BM": 64, "BK": 64, "num_warps": 8, "num_stages": 2},
    ]
    if shape.dropout:
        tiles.append({"BM": 32, "BK": 256, "num_warps": 8, "num_stages": 2})
    else:
        tiles.append({"BM": 64, "BK": 128, "num_warps": 4, "num_stages": 2})
    short: Config = {"BM": 16, "BK": 128, "num_warps": 4, "num_stages": 6}
    return [short, *tiles] if shape.m <= 2048 else [*tiles, short]


def output_grads_configs(shape: Shape, hopper: bool) -> list[Config]:
    """Each strip of BC columns leaves a partial dS: the wider, the less is written. Hopper's tensor cores read tiles
    of 64 rows where they lie, once; on other GPUs every warp loads them."""
    if shape.dtype == torch.float32:
        return [FP32_STRIP]
    wide: Config = {"BM": 32, "BC": 256, "num_warps": 8, "num_stages": 3}
    narrow: Config = {"BM": 64, "BC": 128, "num_warps": 8, "num_stages": 3}
    if not hopper:
        return _with_rows(shape, [narrow, wide] if shape.rank > 32 else [wide, narrow])
    if shape.rank > 32:
        return _with_rows(shape, [wide, {"BM": 64, "BC": 256, "num_warps": 8, "num_stages": 2}, narrow])
    tall: Config = {"BM": 64, "BC": 256, "num_warps": 8, "num_stages": 3}
    low: Config = {"BM": 32, "BC": 256, "num_warps": 4, "num_stages": 3}
    tiles = [narrow, tall, low] if shape.m <= 2048 else [tall, low, narrow]
    if shape.rank <= 16:
        tiles.append({"BM": 64, "BC": 512, "num_warps": 8, "num_stages": 3})
    return _with_rows(shape, tiles)


def factor_grad_configs(shape: Shape) -> list[Config]:
    if shape.dtype == torch.float32:
        return [FP32_STRIP]
    tiles: list[Config] = [
        {"BM": 64, "BC": 128, "num_warps": 8, "num_stages": 2 if shape.dropout else 3},
        {"BM": 32, "BC": 128, "num_warps": 4, "num_stages": 3},
    ]
    if shape.rank <= 32:
        tiles.insert(0, {"BM": 32, "BC": 256, "num_warps": 8, "num_stages": 3})
        tiles.append({"BM": 16, "BC": 256, "num_warps": 4, "num_stages": 3})
    return _with_rows(shape, tiles)


FP32_STRIP: Config = {"BM": 16, "BC": 32, "ROWS": 256, "num_warps": 4, "num_stages": 3}


def _with_rows(shape: Shape, tiles: list[Config]) -> list[Config]:
    """Runs of ROWS rows: long ones leave less to add up, short ones keep every processor busy. Twice as long, too."""

    def rows(tile: Config) -> int:
        strips = cdiv(shape.columns, tile["BC"])
        fewest = 128 if shape.m <= 2048 else 256
        return min(max(power_of_two(shape.m * strips // 256, fewest), fewest), 1024)

    return [{**tile, "ROWS": rows(tile) * times} for times in (1, 2) for tile in tiles]


def launch_project(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    shape = Shape.of(x, rank_block(a.shape[0], x.dtype, MAX_RANK_BLOCK), seed)
    config = choose("project", project_configs, shape)
    return run_project(config, x, a, scale, dropout, seed)


def run_project(config: Config, x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    (m, k), r = x.shape, a.shape[0]
    s = x.new_empty(m, r)
    if m == 0:
        return s
    br = rank_block(r, x.dtype, MAX_RANK_BLOCK)
    _project_kernel[(cdiv(m, config["BM"]), cdiv(r, br))](
        x,
        a,
        s,
        seed,
        m,
        k,
        r,
        *x.stride(),
        *a.stride(),
        scale * inverse_keep(dropout),
        dropout_threshold(dropout),
        DROPOUT=seed is not None,
        BR=br,
        **config,
    )
    return s


def launch_output_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = Shape.of(dy, rank_block(b.shape[1], dy.dtype, MAX_RANK_BLOCK_OUTPUT), None)
    config = choose("output_grads", functools.partial(output_grads_configs, hopper=is_hopper(dy.device)), shape)
    return run_output_grads(config, dy, b, s, scale, dtype)


def run_output_grads(
    config: Config, dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (m, n), r = dy.shape, b.shape[1]
    ds, db = dy.new_empty(m, r), dy.new_empty(n, r, dtype=dtype)
    if m == 0:
        return ds, db.zero_()
    br = rank_block(r, dy.dtype, MAX_RANK_BLOCK_OUTPUT)
    strips, runs = cdiv(n, config["BC"]), cdiv(m, config["ROWS"])
    ds_parts = dy.new_empty(strips, m, r, dtype=torch.float32)
    db_parts = dy.new_empty(runs, n, r, dtype=torch.float32)
    _output_grads_kernel[(strips, runs, cdiv(r, br))](
        dy,
        b,
        s,
        ds_parts,
        db_parts,
        m,
        n,
        r,
        *dy.stride(),
        *b.stride(),
        *s.stride(),
        BR=br,
        **config,
    )
    return add_parts(ds_parts, scale, ds), add_parts(db_parts, scale, db)


def launch_factor_grad(ds: Tensor, x: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    shape = Shape.of(x, rank_block(ds.shape[1], x.dtype, MAX_RANK_BLOCK), seed)
    config = choose("factor_grad", factor_grad_configs, shape)
    return run_factor_grad(config, ds, x, dropout, seed, dtype)


def run_factor_grad(
    config: Config, ds: Tensor, x: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    (m, k), r = x.shape, ds.shape[1]
    da = x.new_empty(r, k, dtype=dtype)
    if m == 0:
        return da.zero_()
    br = rank_block(r, x.dtype, MAX_RANK_BLOCK)
    strips, runs = cdiv(k, config["BC"]), cdiv(m, config["ROWS"])
    parts = x.new_empty(runs, r, k, dtype=torch.float32)
    _factor_grad_kernel[(strips, runs, cdiv(r, br))](
        ds,
        x,
        parts,
        seed,
        m,
        k,
        r,
        *ds.stride(),
        *x.stride(),
        dropout_threshold(dropout),
        DROPOUT=seed is not None,
        BR=br,
        **config,
    )
    return add_parts(parts, inverse_keep(dropout), da)


def add_parts(parts: Tensor, scale: float, out: Tensor) -> Tensor:
    """out = scale · the sum of parts [parts, ...] over its first dimension, in a fixed order."""
    count = out.numel()
    _sum_kernel[(cdiv(count, SUM_CONFIG["BC"]),)](parts, out, parts.shape[0], count, scale, **SUM_CONFIG)
    return out

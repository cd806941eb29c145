"""The large products of the LoRA linear in Triton: C = X W + undrop(scale · U V) + bias, for Y and for dX.

    Y  = X Wᵀ + scale · S Bᵀ + bias      U = S [M, R],  V = Bᵀ [R, N]
    dX = dY W + undrop(dS A)             U = dS [M, R], V = A [R, K]

Two ways, and a tuned table says which:
    addmm     one kernel writes C0 = undrop(scale · U V), then cuBLAS adds X W to it in place: reading C0 hides behind
              a product that is bound by arithmetic. A bias comes last: in C0 it would round U V to its own spacing. The
              rule where no table says otherwise.
    gemm      one Triton kernel whose accumulator starts as C0, which is never written: persistent, its operands
              fetched by the tensor memory accelerator (TMA) on GPUs that have one, by pointers on older ones.

Letters: C [M, P], X [M, L], W [L, P]; so L is K for Y and N for dX.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import dropout_threshold, inverse_keep
from .tiles import dot, kept, natural_order, thread_order
from .tuning import Config, Shape, bucket, cdiv, choose, is_hopper, rank_block

MAX_RANK_BLOCK = 32  # of U V; a larger rank takes several


@triton.jit
def _product(
    p_u,
    p_v,
    o_m,
    o_p,
    M,
    P,
    R,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vp,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
):
    """One tile of U V, in fp32."""
    acc = tl.zeros([BM, BP], tl.float32)
    for r in tl.range(0, R, BR, num_stages=1):  # seldom two rounds: not worth a pipeline's registers
        o_r = r + tl.arange(0, BR)
        m_u = (o_m < M)[:, None] & (o_r < R)[None, :]
        b_u = tl.load(p_u + o_m[:, None] * stride_um + o_r[None, :] * stride_ur, mask=m_u, other=0.0)  # [BM, BR]
        m_v = (o_r < R)[:, None] & (o_p < P)[None, :]
        p_v_tile = p_v + o_r[:, None] * stride_vr + o_p.to(tl.int64)[None, :] * stride_vp
        b_v = tl.load(p_v_tile, mask=m_v, other=0.0)  # [BR, BP]
        acc = dot(b_u, b_v, acc)
    return acc


@triton.jit
def _seed_kernel(
    p_u,
    p_v,
    p_seed,
    p_c,
    M,
    P,
    R,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vp,
    scale,
    threshold,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
):
    tiles_p = tl.cdiv(P, BP)
    first_p = tl.program_id(0) % tiles_p * BP
    o_m = (tl.program_id(0) // tiles_p).to(tl.int64) * BM + tl.arange(0, BM)
    o_p = first_p + tl.arange(0, BP)
    o_v = o_p  # the columns of V
    if DROPOUT:
        o_v = tl.max_contiguous(tl.multiple_of(first_p + thread_order(BP), 2), 2)
    acc = _product(p_u, p_v, o_m, o_v, M, P, R, stride_um, stride_ur, stride_vr, stride_vp, BM, BP, BR) * scale
    b_c = acc.to(p_c.dtype.element_ty)
    if DROPOUT:
        b_c = tl.where(kept(p_seed, o_m, first_p, P, threshold, BP), natural_order(b_c), 0.0)
    m_c = (o_m < M)[:, None] & (o_p < P)[None, :]
    tl.store(p_c + o_m[:, None] * P + o_p[None, :], b_c, mask=m_c)


@triton.jit
def _gemm_kernel(
    x,
    w,
    p_u,
    p_v,
    p_bias,
    p_c,
    M,
    P,
    L,
    R,
    stride_xm,
    stride_xl,
    stride_wl,
    stride_wp,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vp,
    scale,
    TMA: tl.constexpr,
    W_ROWS_ARE_P: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x and w are descriptors with TMA, else pointers; with W_ROWS_ARE_P the weight lies in memory as [P, L]."""
    tiles_m = tl.cdiv(M, BM)
    tiles_p = tl.cdiv(P, BP)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_p, tl.num_programs(0)):
        # Tiles go down GROUP rows before the next column, so that those in flight share operands in L2.
        band = tile // (GROUP * tiles_p)
        band_rows = min(tiles_m - band * GROUP, GROUP)
        in_band = tile % (GROUP * tiles_p)
        first_m = (band * GROUP + in_band % band_rows) * BM
        first_p = in_band // band_rows * BP
        o_m = first_m.to(tl.int64) + tl.arange(0, BM)
        o_p = first_p + tl.arange(0, BP)
        acc = _product(p_u, p_v, o_m, o_p, M, P, R, stride_um, stride_ur, stride_vr, stride_vp, BM, BP, BR) * scale
        if BIAS:
            acc += tl.load(p_bias + o_p, mask=o_p < P, other=0.0).to(tl.float32)[None, :]
        for first_l in range(0, L, BL):
            if TMA:
                b_x = x.load([first_m, first_l])  # [BM, BL]
                b_w = w.load([first_p, first_l]).T if W_ROWS_ARE_P else w.load([first_l, first_p])  # [BL, BP]
            else:
                o_l = first_l + tl.arange(0, BL).to(tl.int64)
                m_x = (o_m < M)[:, None] & (o_l < L)[None, :]
                b_x = tl.load(x + o_m[:, None] * stride_xm + o_l[None, :] * stride_xl, mask=m_x, other=0.0)
                p_w_tile = w + o_l[:, None] * stride_wl + o_p.to(tl.int64)[None, :] * stride_wp
                b_w = tl.load(p_w_tile, mask=(o_l < L)[:, None] & (o_p < P)[None, :], other=0.0)
            acc = dot(b_x, b_w, acc)
        m_c = (o_m < M)[:, None] & (o_p < P)[None, :]
        tl.store(p_c + o_m[:, None] * P + o_p[None, :], acc.to(p_c.dtype.element_ty), mask=m_c)


def seed_configs(shape: Shape, hopper: bool) -> list[Config]:
    if shape.dtype == torch.float32:
        return [{"BM": 16, "BP": 32, "num_warps": 4, "num_stages": 1}]
    large: list[Config] = [
        {"BM": 128, "BP": 128, "num_warps": 8, "num_stages": 2},
        {"BM": 64, "BP": 256, "num_warps": 8, "num_stages": 2},
    ]
    if not shape.dropout:
        return [{"BM": 64, "BP": 128, "num_warps": 4, "num_stages": 2}, *large]
    small: list[Config] = [
        {"BM": 64, "BP": 128, "num_warps": 8, "num_stages": 2},
        {"BM": 64, "BP": 64, "num_warps": 4, "num_stages": 2},
    ]
    return [*large, *small] if hopper else small  # on older GPUs the large ones spill


def gemm_configs(shape: Shape, hopper: bool) -> list[Config | None]:
    """None is the addmm way: the only one with dropout, since masking the accumulator runs out of registers."""
    if shape.dtype == torch.float32 or shape.dropout:
        return [None]
    if not hopper:  # no TMA
        return [
            None,
            {"BM": 128, "BP": 128, "BL": 32, "GROUP": 8, "num_warps": 8, "num_stages": 4},
            {"BM": 64, "BP": 128, "BL": 32, "GROUP": 8, "num_warps": 4, "num_stages": 4},
        ]
    return [
        None,
        {"BM": 128, "BP": 256, "BL": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BM": 128, "BP": 128, "BL": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4},
        {"BM": 128, "BP": 128, "BL": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        {"BM": 64, "BP": 128, "BL": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3},
    ]


def launch_seeded_matmul(
    x: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    (m, _), p = x.shape, w.shape[1]
    if m == 0:
        return x.new_empty(m, p)
    shape = Shape(x.device, x.dtype, bucket(m), p, rank_block(u.shape[1], u.dtype, MAX_RANK_BLOCK), seed is not None)
    tma = is_hopper(x.device)
    config = choose(gemm_name(w), functools.partial(gemm_configs, hopper=tma), shape)
    if config is not None and (not tma or (_describable(x) and _describable(_as_stored(w)))):
        return run_gemm(config, x, w, u, v, scale, bias)
    c = launch_seed(u, v, scale, dropout, seed).addmm_(x, w)
    return c if bias is None else c.add_(bias)


def gemm_name(w: Tensor) -> str:
    """As tables know the product: also by how W [L, P] lies in memory, rows of P (N) or of L (T)."""
    return f"gemm/{'T' if w.stride(0) == 1 else 'N'}/L{w.shape[0]}"


def launch_seed(u: Tensor, v: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """C0 [M, P]."""
    rank = rank_block(u.shape[1], u.dtype, MAX_RANK_BLOCK)
    shape = Shape(u.device, u.dtype, bucket(u.shape[0]), v.shape[1], rank, seed is not None)
    config = choose("seed", functools.partial(seed_configs, hopper=is_hopper(u.device)), shape)
    return run_seed(config, u, v, scale, dropout, seed)


def run_seed(config: Config, u: Tensor, v: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    (m, r), p = u.shape, v.shape[1]
    c = u.new_empty(m, p)
    _seed_kernel[(cdiv(m, config["BM"]) * cdiv(p, config["BP"]),)](
        u,
        v,
        seed,
        c,
        m,
        p,
        r,
        *u.stride(),
        *v.stride(),
        scale * inverse_keep(dropout),
        dropout_threshold(dropout),
        DROPOUT=seed is not None,
        BR=rank_block(r, u.dtype, MAX_RANK_BLOCK),
        **config,
    )
    return c


def run_gemm(config: Config, x: Tensor, w: Tensor, u: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    (m, length), p, r = x.shape, w.shape[1], u.shape[1]
    c = x.new_empty(m, p)
    bm, bp, bl = config["BM"], config["BP"], config["BL"]
    w_rows_are_p = w.stride(0) == 1
    tma = is_hopper(x.device)
    operands: tuple[Any, Any] = (x, w)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor  # Triton 3.4; older ones have the addmm way

        # Descriptors made here travel as launch parameters; made in the kernel they would need a global allocator.
        block = [bp, bl] if w_rows_are_p else [bl, bp]
        operands = (TensorDescriptor.from_tensor(x, [bm, bl]), TensorDescriptor.from_tensor(_as_stored(w), block))
    tiles = cdiv(m, bm) * cdiv(p, bp)
    _gemm_kernel[(min(tiles, _processors(x.device)),)](
        *operands,
        u,
        v,
        bias,
        c,
        m,
        p,
        length,
        r,
        *x.stride(),
        *w.stride(),
        *u.stride(),
        *v.stride(),
        scale,
        TMA=tma,
        W_ROWS_ARE_P=w_rows_are_p,
        BIAS=bias is not None,
        BR=rank_block(r, u.dtype, MAX_RANK_BLOCK),
        **config,
    )
    return c


def _as_stored(w: Tensor) -> Tensor:
    """w, or wᵀ if that is what has contiguous rows."""
    return w.t() if w.stride(0) == 1 else w


def _describable(matrix: Tensor) -> bool:
    """What TMA asks of a row-major matrix: contiguous rows, each starting at a multiple of 16 bytes."""
    stride, unit = matrix.stride()
    size = matrix.element_size()
    return unit == 1 and stride * size % 16 == 0 and matrix.data_ptr() % 16 == 0 and stride >= matrix.shape[1]


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

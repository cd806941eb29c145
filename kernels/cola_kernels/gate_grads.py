"""Backward of the output gate c [N] in Triton: dY0 = dY ⊙ c and dc = Σ_m dY ⊙ Y0, from one read of dY and Y0.

A program owns columns and walks down M, as the skinny products that reduce over M do, and likewise leaves partial sums
that are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .skinny import add_parts
from .tuning import Config, cdiv

CONFIG: Config = {"BM": 16, "BC": 128, "num_warps": 4, "num_stages": 2}  # memory-bound: one configuration
ROWS = 512  # of a program; fewer where there are few tokens


@triton.jit
def _gate_grads_kernel(
    p_dy,
    p_y,
    p_c,
    p_dy0,
    p_dc,
    M,
    N,
    stride_dym,
    stride_dyn,
    stride_ym,
    stride_yn,
    ROWS,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Partial sums p_dc [M / ROWS, N], one a run of rows."""
    i_run = tl.program_id(1)
    o_n = tl.program_id(0) * BC + tl.arange(0, BC)
    in_n = o_n < N
    o_n64 = o_n.to(tl.int64)
    b_c = tl.load(p_c + o_n, mask=in_n, other=0.0).to(tl.float32)  # [BC]
    acc = tl.zeros([BC], tl.float32)
    for m in range(0, ROWS, BM):
        o_m = i_run.to(tl.int64) * ROWS + m + tl.arange(0, BM)
        mask = (o_m < M)[:, None] & in_n[None, :]
        b_dy = tl.load(p_dy + o_m[:, None] * stride_dym + o_n64[None, :] * stride_dyn, mask=mask, other=0.0)  # [BM, BC]
        b_y = tl.load(p_y + o_m[:, None] * stride_ym + o_n64[None, :] * stride_yn, mask=mask, other=0.0)  # [BM, BC]
        b_dy = b_dy.to(tl.float32)
        b_dy0 = (b_dy * b_c[None, :]).to(p_dy0.dtype.element_ty)
        tl.store(p_dy0 + o_m[:, None] * N + o_n64[None, :], b_dy0, mask=mask)
        acc += tl.sum(b_dy * b_y.to(tl.float32), axis=0)
    tl.store(p_dc + i_run.to(tl.int64) * N + o_n64, acc, mask=in_n)


def launch_gate_grads(dy: Tensor, y0: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dY and Y0 [M, N], c [N] -> dY ⊙ c [M, N] in dY's dtype, Σ_m dY ⊙ Y0 [N] in c's."""
    m, n = dy.shape
    dy0, dc = dy.new_empty(m, n), c.new_empty(n)
    if m == 0:
        return dy0, dc.zero_()
    rows = ROWS if m > 4 * ROWS else 64
    runs = cdiv(m, rows)
    parts = dy.new_empty(runs, n, dtype=torch.float32)
    _gate_grads_kernel[(cdiv(n, CONFIG["BC"]), runs)](
        dy,
        y0,
        c.contiguous(),
        dy0,
        parts,
        m,
        n,
        *dy.stride(),
        *y0.stride(),
        rows,
        **CONFIG,
    )
    return dy0, add_parts(parts, 1.0, dc)

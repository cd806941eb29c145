"""NF4 to a dense matrix in one Triton kernel: codes, nested scales, offset and table, written once.

`nf4.dequantize` is the specification, to the bit: products and sums are rounded one by one, never fused.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nf4 import LEVELS
from .tuning import Config

# Memory-bound: 4096 elements a program, in whole blocks. `enable_fp_fusion` is off for the sake of the bits.
ELEMENTS = 4096
CONFIG: Config = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def load_scales(p_absmax, p_absmax2, p_table, p_offset, o_block, mask, BS2: tl.constexpr):
    """fp32 scales of blocks `o_block`; BS2 of them share a second-level scale, or 0 if there is no second level."""
    absmax = tl.load(p_absmax + o_block, mask=mask, other=0)
    if BS2:
        value = tl.load(p_table + absmax.to(tl.int32))
        absmax = value * tl.load(p_absmax2 + o_block // BS2, mask=mask, other=0.0) + tl.load(p_offset)
    return absmax.to(tl.float32)


@triton.jit
def _dequantize_kernel(
    p_codes, p_absmax, p_absmax2, p_table, p_offset, p_levels, p_out, blocks, BS: tl.constexpr, BS2: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """BB blocks of BS elements."""
    o_block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    m_block = o_block < blocks
    scale = load_scales(p_absmax, p_absmax2, p_table, p_offset, o_block, m_block, BS2)  # [BB]
    o_byte = o_block[:, None] * (BS // 2) + tl.arange(0, BS // 2)[None, :]
    byte = tl.load(p_codes + o_byte, mask=m_block[:, None], other=0).to(tl.int32)  # [BB, BS / 2]
    high = tl.load(p_levels + (byte >> 4)) * scale[:, None]
    low = tl.load(p_levels + (byte & 15)) * scale[:, None]
    value = tl.reshape(tl.join(high, low), [BB, BS])
    o_value = o_block[:, None] * BS + tl.arange(0, BS)[None, :]
    tl.store(p_out + o_value, value.to(p_out.dtype.element_ty), mask=m_block[:, None])


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels, and the 15 mid-points between them: fp32 [31]."""
    table = torch.tensor(LEVELS, dtype=torch.float32)
    return torch.cat((table, (table[1:] + table[:-1]) / 2)).to(device)


def launch_dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    table: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    blocksize2: int,
    out: Tensor,
) -> None:
    blocks, at_once = absmax.numel(), max(1, ELEMENTS // blocksize)
    _dequantize_kernel[(triton.cdiv(blocks, at_once),)](
        codes, absmax, absmax2, table, offset, levels(codes.device), out, blocks,
        BS=blocksize, BS2=blocksize2, BB=at_once, **CONFIG,
    )  # fmt: skip

"""Pieces shared by the kernels: the dot product, and the draws of `philox.draws` for one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .backend import INTERPRET
from .philox import DRAWS_PER_BLOCK, ROUNDS

_INTERPRET = tl.constexpr(INTERPRET)
_ROUNDS = tl.constexpr(ROUNDS)
_DRAWS_PER_BLOCK = tl.constexpr(DRAWS_PER_BLOCK)


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32. fp32 operands are multiplied as fp32, never as tf32."""
    if _INTERPRET:  # Triton 3.9 interprets bf16 operands as raw integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def draws(p_seed, rows, first_column, columns, BC: tl.constexpr):
    """The 16-bit draws of elements (rows, first_column + [0, BC)); first_column and BC are multiples of 8.

    One Philox block serves eight neighbours in a row: as many as one thread loads at once in a 16-bit dtype.
    """
    per_row = tl.cdiv(columns, _DRAWS_PER_BLOCK)
    column = first_column // _DRAWS_PER_BLOCK + tl.arange(0, BC // _DRAWS_PER_BLOCK)
    block = rows.to(tl.int64)[:, None] * per_row + column[None, :]  # [BT, BC / 8]
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), low, high, zero, zero, _ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BT, BC / 8, 2, 2]: the last two axes count w0 .. w3
    halves = tl.join(words & 0xFFFF, words >> 16)  # [BT, BC / 8, 2, 2, 2]
    return tl.reshape(halves, [rows.shape[0], BC]).to(tl.int32)

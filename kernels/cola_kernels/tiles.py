"""Pieces shared by the kernels: the dot product, and the draws of `philox.draws` for one tile.

Making a mask competes with memory for a GPU's time: an H200 has about 14 instructions for each element of x it reads.
What is odd below is there for their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backend import INTERPRET
from .philox import DRAWS_PER_BLOCK, MULTIPLIER_0, MULTIPLIER_2, ROUNDS, WEYL_0, WEYL_1

_INTERPRET = tl.constexpr(INTERPRET)
_BF16X6 = not INTERPRET and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)  # older ones lack it
_FP32_PRECISION = tl.constexpr("bf16x6" if _BF16X6 else "ieee")
_ROUNDS = tl.constexpr(ROUNDS)
_DRAWS_PER_BLOCK = tl.constexpr(DRAWS_PER_BLOCK)
_MULTIPLIER_0, _MULTIPLIER_2 = tl.constexpr(MULTIPLIER_0), tl.constexpr(MULTIPLIER_2)
_WEYL_0, _WEYL_1 = tl.constexpr(WEYL_0), tl.constexpr(WEYL_1)


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32. fp32 operands are multiplied as fp32, never as tf32."""
    if _INTERPRET:  # Triton 3.9 interprets bf16 operands as raw integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def fp32_dot(a, b, acc):
    """acc + a b for fp32, on the tensor cores: of three bf16 each, the six products that count. As exact as fp32."""
    return tl.dot(a, b, acc, input_precision=_FP32_PRECISION)


@triton.jit
def thread_order(BC: tl.constexpr):
    """Columns [0, BC) in an order for the right operand of a dot; `natural_order` puts the product's back.

    A thread of the tensor cores holds two neighbours of every eight columns of a product. It would need a quarter of
    many Philox blocks, and other threads the rest of them; in this order it holds eight neighbours, whole blocks.
    """
    o_c = tl.arange(0, BC)
    return o_c // 32 * 32 + o_c % 2 + o_c // 8 % 4 * 2 + o_c // 2 % 4 * 8


@triton.jit
def natural_order(tile):
    """A product [rows, BC] whose columns are in `thread_order`, in theirs. No value changes its thread."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.reshape(tile, [rows, columns // 32, 4, 4, 2]).permute(0, 1, 3, 2, 4).reshape(rows, columns)


@triton.jit
def _philox(p_seed, block):
    """The words of Philox blocks, as `philox.philox4x32`, by 64-bit products: one instruction for both halves."""
    seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _MULTIPLIER_0
        p2 = c2.to(tl.uint64) * _MULTIPLIER_2
        c0 = (p2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p2.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, _WEYL_0, sanitize_overflow=False)
        k1 = tl.add(k1, _WEYL_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _words(p_seed, rows, first_column, columns, BC: tl.constexpr):
    """uint32 [rows, BC] for elements (rows, first_column + [0, BC)), both multiples of 8: the draw is the upper half.

    One Philox block serves eight neighbours in a row: as many as one thread loads at once in a 16-bit dtype. Which of
    its words an element takes is then known to the compiler. Joining the words would make it load the operands of a
    dot four at a time, at twice the instructions.
    """
    blocks: tl.constexpr = BC // _DRAWS_PER_BLOCK
    per_row = tl.cdiv(columns, _DRAWS_PER_BLOCK)
    column = first_column // _DRAWS_PER_BLOCK + tl.arange(0, blocks)
    w0, w1, w2, w3 = _philox(p_seed, rows.to(tl.int64)[:, None] * per_row + column[None, :])  # [BT, BC / 8]
    j = tl.arange(0, _DRAWS_PER_BLOCK)[None, None, :]
    low = tl.where(j < 2, w0[:, :, None], w1[:, :, None])
    high = tl.where(j < 6, w2[:, :, None], w3[:, :, None])
    word = tl.where(j < 4, low, high)  # [BT, BC / 8, 8]
    return tl.reshape(tl.where(j % 2 == 0, word << 16, word), [rows.shape[0], BC])


@triton.jit
def draws(p_seed, rows, first_column, columns, BC: tl.constexpr):
    """The 16-bit draws of elements (rows, first_column + [0, BC)), both multiples of 8: int32."""
    return (_words(p_seed, rows, first_column, columns, BC) >> 16).to(tl.int32)


@triton.jit
def kept(p_seed, rows, first_column, columns, threshold, BC: tl.constexpr):
    """Whether dropout keeps the elements: draws(...) >= threshold, which does not need the draws apart."""
    return _words(p_seed, rows, first_column, columns, BC) >= tl.cast(threshold, tl.uint32) << 16

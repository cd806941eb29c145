"""Counter-based random bits in plain PyTorch: the specification of every random choice the kernels make.

Philox4x32 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 64-bit key and a
128-bit counter to 128 random bits. It has no state, so a mask is regenerated from its seed instead of being stored. We
run 7 rounds, the fewest that pass BigCrush in that paper, and cut each 128-bit block into eight 16-bit draws:

    element (row, col) of a matrix with `columns` columns
        block   = row * ceil(columns / 8) + col // 8                     (64 bits: counter words 0 and 1)
        word    = block's output word (col % 8) // 2
        draw    = (word >> 16 * (col % 2)) & 0xffff

The key is the seed: low 32 bits, high 32 bits. An element's draw depends on its position only, never on a tile's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
DRAWS_PER_BLOCK = 8
DRAW_RANGE = 1 << 16

_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """One Philox4x32 block per element. Words are int64 tensors holding values in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit product wraps in int64, but its bits are right: the mask after the shift drops the sign.
        p0, p2 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_2
        c0, c1, c2, c3 = ((p2 >> 32) & _LOW) ^ c1 ^ k0, p2 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def draws(seed: Tensor, rows: int, columns: int, *, first_row: int = 0) -> Tensor:
    """16-bit draws for a matrix, or for `rows` of its rows from `first_row` on.

    seed: int64 scalar tensor. Returns int64 `[rows, columns]` with values in [0, 65536).
    """
    device = seed.device
    blocks_per_row = (columns + DRAWS_PER_BLOCK - 1) // DRAWS_PER_BLOCK
    row = torch.arange(first_row, first_row + rows, device=device, dtype=torch.int64)
    block = row[:, None] * blocks_per_row + torch.arange(blocks_per_row, device=device, dtype=torch.int64)
    zero = torch.zeros_like(block)
    words = philox4x32((block & _LOW, block >> 32, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).reshape(rows, blocks_per_row * DRAWS_PER_BLOCK)[:, :columns]


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 scalar on `device`; None draws one from torch's generator, so checkpointing and resume replay it."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64)
    return torch.full((), seed, dtype=torch.int64, device=device)  # a fill, not a copy from the host: no wait


def dropout_threshold(dropout: float) -> int:
    """An element is kept if its draw is at least this: the probability, rounded to a multiple of 2**-16."""
    return min(round(dropout * DRAW_RANGE), DRAW_RANGE - 1)


def inverse_keep(dropout: float) -> float:
    """One over the probability of being kept, as rounded: the mean is preserved exactly."""
    return DRAW_RANGE / (DRAW_RANGE - dropout_threshold(dropout))

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

MULTIPLIER_0, MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_SIGN_OF_BOTH_HALVES = 0x80008000 - (1 << 32)
_TILE_BLOCKS = 1 << 15  # for each thread: 256 KiB an int64 temporary, and five are alive


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """One Philox4x32 block per element. Words are the low 32 bits of int64 tensors, which broadcast.

    Only what is multiplied is cut to 32 bits. Each step overwrites what is not read again, which keeps a tile in a
    CPU's cache: two to three times faster.
    """
    c0, c1, c2, c3 = counter
    c0, c2 = c0 & _LOW, c2 & _LOW
    turn = torch.arange(ROUNDS, device=key[0].device)
    keys = (((word & _LOW) + turn * weyl).unbind() for word, weyl in zip(key, (WEYL_0, WEYL_1), strict=True))
    for k0, k1 in zip(*keys, strict=True):
        (high0, p0), (high2, p2) = _times(c0, MULTIPLIER_0), _times(c2, MULTIPLIER_2)
        c0, c1, c2, c3 = _mix(high2, c1, k0), p2, _mix(high0, c3, k1), p0
    return c0, c1, c2, c3


def _times(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high word of a product of 64 bits, and what has its low word; both may have other bits above 32."""
    if torch.compiler.is_compiling():  # into C++, where int64 must not overflow: 2^32 less changes the high word only
        less = word * (multiplier - (1 << 32))
        return (less >> 32) + word, less
    wrapped = word.mul_(multiplier)  # in place is twice as fast
    return wrapped >> 32, wrapped


def _mix(high: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The low 32 bits of high ^ word ^ key, in high's memory unless it is a scalar and word is not."""
    high.bitwise_xor_(key)
    mixed = high ^ word if word.dim() > high.dim() else high.bitwise_xor_(word)
    return mixed.bitwise_and_(_LOW)


def draws(seed: Tensor, rows: int, columns: int, *, first_row: int = 0) -> Tensor:
    """16-bit draws for a matrix, or for `rows` of its rows from `first_row` on.

    seed: int64 scalar tensor. Returns int16 `[rows, columns]`: the draw less 2**15, so that order is kept.
    """
    blocks = (columns + DRAWS_PER_BLOCK - 1) // DRAWS_PER_BLOCK  # in a row
    words = torch.empty(rows, blocks, 4, dtype=torch.int32, device=seed.device)
    tile = max(1, _TILE_BLOCKS * torch.get_num_threads() // max(blocks, 1)) if _in_tiles(seed) else max(1, rows)
    for first in range(0, rows, tile):
        part = words[first : first + tile]
        for i, word in enumerate(_words(seed, (first_row + first) * blocks, part.shape[0] * blocks)):
            part[..., i].copy_(word.view(part.shape[:2]))
    draw = words.bitwise_xor_(_SIGN_OF_BOTH_HALVES).view(torch.int16).view(rows, blocks * DRAWS_PER_BLOCK)
    return draw[:, :columns]


def _words(seed: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
    """The four words of the blocks [first, first + count), in the low halves of int64 `[count]`."""
    block = torch.arange(first, first + count, device=seed.device, dtype=torch.int64)
    zero = torch.zeros((), device=seed.device, dtype=torch.int64)
    high = zero if first + count <= _LOW else block >> 32  # a scalar saves most of the first two rounds
    return philox4x32((block, high, zero, zero), (seed, seed >> 32))


def _in_tiles(seed: Tensor) -> bool:
    """Temporaries that stay in a CPU's cache make it faster by half. A GPU and a compiler want all at once."""
    return seed.device.type == "cpu" and not torch.compiler.is_compiling()


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

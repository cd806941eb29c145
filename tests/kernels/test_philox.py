"""The random bits: Random123's known answers, and the draws of the kernels against the specification's."""

from __future__ import annotations

import shutil

import pytest
import torch

from cola_kernels import philox, reference

from .conftest import DEVICE

PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ZEROS, ONES = ((0,) * 4, (0,) * 2), ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
# kat_vectors of Random123: rounds, (counter, key), output
KNOWN = [
    (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "given", "expected"), KNOWN)
@pytest.mark.parametrize("compiling", [False, True])
def test_known_answers(monkeypatch, rounds, given, expected, compiling):
    monkeypatch.setattr(philox, "ROUNDS", rounds)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    counter, key = (tuple(torch.tensor(word) for word in words) for words in given)
    assert tuple(int(word) & 0xFFFFFFFF for word in philox.philox4x32(counter, key)) == expected


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("seed", [7, -5, 2**63 - 1])
def test_inductor_draws_the_same(monkeypatch, seed):
    """In C++ an int64 that overflows may be anything, and with a constant seed a part of the chain did. Five rounds
    show it with every seed; the compiler's time grows by half with each."""
    monkeypatch.setattr(philox, "ROUNDS", 5)

    def draws(x):
        return philox.draws(philox.as_seed(seed, x.device), 64, 128)

    x = torch.zeros(1, device=DEVICE)
    assert torch.equal(torch.compile(draws)(x), draws(x))


def test_draws_are_uniform():
    """Chi-square over 256 bins: mean 255, standard deviation sqrt(2 · 255) = 22.6; five of them is a fair limit."""
    draws = philox.draws(torch.tensor(7), 512, 1024).int() + philox.DRAW_RANGE // 2
    assert int(draws.min()) >= 0
    assert int(draws.max()) < philox.DRAW_RANGE
    counts = torch.bincount((draws >> 8).flatten(), minlength=256).double()
    expected = draws.numel() / 256
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * 22.6


def test_a_draw_depends_on_its_position_only():
    whole = philox.draws(torch.tensor(3), 20, 37)
    assert torch.equal(philox.draws(torch.tensor(3), 6, 37, first_row=9), whole[9:15])


def test_draws_are_the_same_in_one_tile_and_in_many(monkeypatch):
    whole = philox.draws(torch.tensor(11), 50, 100)
    monkeypatch.setattr(philox, "_TILE_BLOCKS", 40)
    assert torch.equal(philox.draws(torch.tensor(11), 50, 100), whole)


@pytest.mark.parametrize("first_row", [2**32 - 2, 2**40])
def test_draws_beyond_32_bits_of_counter(first_row):
    """Blocks past 2**32 use the second counter word: equal to Philox by Python's integers."""
    seed = 77
    found = philox.draws(torch.tensor(seed), 4, 8, first_row=first_row).view(torch.int32)[:, 0]
    for row in range(4):
        block = first_row + row
        counter = tuple(torch.tensor(word) for word in (block & 0xFFFFFFFF, block >> 32, 0, 0))
        word = int(philox.philox4x32(counter, (torch.tensor(seed), torch.tensor(0)))[0]) & 0xFFFFFFFF
        assert int(found[row]) & 0xFFFFFFFF == word ^ 0x80008000


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_mask_keeps_the_right_share_and_changes_with_the_seed(dropout):
    first, second = (reference.dropout_mask(torch.tensor(s), 400, 500, dropout) for s in (1, 2))
    deviation = (dropout * (1 - dropout) / first.numel()) ** 0.5
    assert abs(float(first.double().mean()) - (1 - dropout)) < 5 * deviation + 2**-16
    # Independent masks agree where both keep or both drop.
    agree = dropout**2 + (1 - dropout) ** 2
    assert abs(float((first == second).double().mean()) - agree) < 5 * (agree * (1 - agree) / first.numel()) ** 0.5


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3, -1, -(2**62)])
@pytest.mark.parametrize(("m", "k"), [(1, 8), (5, 13), (33, 130)])
def test_every_kernel_draws_the_mask_of_the_specification(m, k, seed):
    pytest.importorskip("triton")
    from cola_kernels import matmul, skinny

    dropout = 0.3
    seed = torch.tensor(seed, device=DEVICE)
    expected = reference.dropout_mask(seed, m, k, dropout)
    ones, rows, columns = torch.ones(m, k, device=DEVICE), torch.eye(m, device=DEVICE), torch.eye(k, device=DEVICE)
    # With an identity for the other factor, each kernel returns drop(ones).
    assert torch.equal(skinny.launch_project(ones, columns, 1.0, dropout, seed) != 0, expected)
    assert torch.equal(skinny.launch_factor_grad(rows, ones, dropout, seed, torch.float32) != 0, expected)
    assert torch.equal(matmul.launch_seed(rows, ones, 1.0, dropout, seed) != 0, expected)

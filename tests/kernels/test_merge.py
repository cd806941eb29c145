"""merge_: rounding, reports, memory; the reference, and Triton against it bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

import cola_kernels
from cola_kernels import reference

from .conftest import DEVICE, TRITON_DTYPES, dtype_id, peak_memory

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ROUNDINGS = ["nearest", "stochastic"]
# The interpreter truncates to bf16, which is right where stochastic rounding has already cut the bits off.
ON_TRITON = [*itertools.product(TRITON_DTYPES, ROUNDINGS), (torch.bfloat16, "stochastic")]


def make(n: int, k: int, r: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """A weight and factors whose products are exact in fp32, so that any order of summation gives one result."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    weight = torch.randn(n, k, generator=generator)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])  # the neighbours of zero and of powers of two
    a, b = (torch.randint(-8, 9, shape, generator=generator) / 64.0 for shape in ((r, k), (n, r)))
    return weight.to(device, dtype), a.to(device), b.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("report", [False, True], ids=["", "report"])
def test_adds_the_update_in_place(rounding, dtype, report):
    weight, a, b = make(50, 70, 5, dtype)
    pointer, before = weight.data_ptr(), weight.double().clone()
    result = cola_kernels.merge_(weight, a, b, 0.25, rounding=rounding, seed=3, report=report)
    assert weight.data_ptr() == pointer
    exact = before + 0.25 * (b.double() @ a.double())
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)
    assert bool(((weight.double() - exact).abs() <= spacing * (0.5 + 1e-3 if rounding == "nearest" else 1)).all())
    if not report:
        assert result is None
        return
    delta, change = exact - before, weight.double() - before
    assert result.retained == pytest.approx(float((change * delta).sum() / delta.square().sum()), abs=1e-5)
    assert result.error == pytest.approx(float((change - delta).norm() / delta.norm()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("library", [cola_kernels, cola_kernels.reference], ids=["public", "reference"])
def test_autocast_does_not_touch_the_weight(library):
    weight, a, b = make(50, 70, 5, torch.float32)
    expected, c = weight.clone(), torch.linspace(0.5, 2, 50)
    library.merge_(expected, a, b, 0.25, c=c)
    with torch.autocast("cpu", torch.bfloat16):
        library.merge_(weight, a, b, 0.25, c=c)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_are_scaled_after_the_update_and_rounded_once(dtype):
    weight, a, b = make(50, 70, 5, dtype)
    before, c = weight.double().clone(), torch.linspace(-1.5, 2, 50)
    result = cola_kernels.merge_(weight, a, b, 0.25, report=True, c=c)
    exact = c.double()[:, None] * (before + 0.25 * (b.double() @ a.double()))
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)
    halves = 0.5 + 1e-3 if dtype.itemsize == 2 else 1.5  # the sum is rounded, too, to fp32 or fp64
    assert bool(((weight.double() - exact).abs() <= spacing * halves).all())
    delta, change = exact - before, weight.double() - before
    assert result.retained == pytest.approx(float((change * delta).sum() / delta.square().sum()), abs=1e-5)
    assert result.error == pytest.approx(float((change - delta).norm() / delta.norm()), rel=1e-2, abs=1e-6)


def test_nothing_to_add_is_reported_as_kept():
    weight, a, b = make(20, 24, 2, torch.bfloat16)
    expected = weight.clone()
    for rounding in ROUNDINGS:
        assert cola_kernels.merge_(weight, a, b * 0, 1.0, rounding=rounding, report=True) == (1.0, 0.0)
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_stochastic_rounding_is_unbiased(dtype):
    """An update of a tenth of a spacing, which nearest loses whole, arrives in the mean over many roundings.

    The error of one element, in spacings, has mean zero (up to 2^-16, the grain of a draw) and a deviation of at most
    one half: the mean of n lies within 5 · 0.5 / sqrt(n) but for one time in a million.
    """
    n, runs = 64, 32
    spacing = torch.finfo(dtype).eps
    a, b = torch.full((1, n), 0.1 * spacing), torch.ones(n, 1)
    mean, seen = 0.0, set()
    for seed in range(runs):
        weight = torch.ones(n, n, dtype=dtype)
        reference.merge_(weight, a, b, 1.0, rounding="stochastic", seed=seed)
        steps = (weight.double() - 1) / spacing
        assert set(steps.unique().tolist()) <= {0.0, 1.0}
        mean += float(steps.mean()) / runs
        seen.add(tuple(steps[0].tolist()))
    assert abs(mean - 0.1) < 5 * 0.5 / (n * n * runs) ** 0.5 + 2**-16
    assert len(seen) == runs, "two seeds gave the same rounding"
    nearest = torch.ones(n, n, dtype=dtype)
    reference.merge_(nearest, a, b, 1.0)
    assert bool((nearest == 1).all())


def test_a_seed_repeats_itself_whatever_the_tile(monkeypatch):
    weight, a, b = make(40, 56, 3, torch.bfloat16)
    results = []
    for tile_elements in (1 << 17, 100):
        monkeypatch.setattr(reference, "TILE_ELEMENTS", tile_elements)
        results.append(weight.clone())
        reference.merge_(results[-1], a, b, 0.5, rounding="stochastic", seed=9)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_of_a_weight_are_rounded_as_in_the_whole(dtype):
    whole, a, b = make(40, 56, 3, dtype)
    parts = [rows.clone() for rows in whole.split(11)]
    reference.merge_(whole, a, b, 0.5, rounding="stochastic", seed=9)
    for i, rows in enumerate(parts):
        reference.merge_(rows, a, b[11 * i :][: len(rows)], 0.5, rounding="stochastic", seed=9, first_row=11 * i)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("rounding", "report"), [("nearest", False), ("stochastic", True)], ids=["least", "most"])
def test_needs_little_memory_beside_the_weight(rounding, report):
    """The most that is live at once while a 4096 x 4096 weight is merged, as torch's profiler saw it allocated."""
    weight, a, b = make(4096, 4096, 16, torch.bfloat16)
    peak = peak_memory(lambda: reference.merge_(weight, a, b, 0.25, rounding=rounding, report=report))
    assert peak > 0
    assert peak < 0.05 * weight.nbytes, f"{peak / weight.nbytes:.1%}"


@pytest.mark.parametrize(("dtype", "rounding"), ON_TRITON, ids=str)
@pytest.mark.parametrize("shape", [(1, 9, 1), (40, 130, 8), (65, 72, 24)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.usefixtures("on_triton", "poisoned")
def test_triton_writes_what_the_reference_writes(shape, rounding, dtype, gated):
    expected, a, b = make(*shape, dtype, DEVICE)
    got = expected.clone()
    c = torch.linspace(-1.5, 2, len(expected), device=DEVICE) if gated else None
    options = {"rounding": rounding, "seed": -7, "first_row": 5, "report": True, "c": c}
    first = reference.merge_(expected, a, b, 0.25, **options)
    second = cola_kernels.merge_(got, a, b, 0.25, **options)
    assert torch.equal(got, expected)
    assert second == pytest.approx(first, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("on_triton")
def test_triton_takes_any_strides_and_mixed_dtypes():
    expected, a, b = make(40, 72, 8, torch.float16, DEVICE)
    base = torch.zeros(144, 40, dtype=torch.float16, device=DEVICE)
    view = base.t()[:, ::2]
    view.copy_(expected)
    reference.merge_(expected, a, b, 0.25)
    cola_kernels.merge_(view, a.half().t().contiguous().t(), b, 0.25)
    assert torch.equal(view, expected)
    assert not base[1::2].any(), "wrote between the columns of the view"


@pytest.mark.usefixtures("on_triton")
def test_triton_keeps_what_overflows_and_what_is_not_a_number():
    values = [65504.0, -65504.0, float("inf"), float("nan"), 6e-8, -6e-8, 65504.0, 0.0]
    expected = torch.tensor([values], dtype=torch.float16, device=DEVICE)
    a = torch.tensor([[40.0, -40.0, 1.0, 1.0, -3e-8, 1e-8, 8.0, 2e-8]], device=DEVICE)
    for seed in range(20):
        pair = [expected.clone(), expected.clone()]
        reference.merge_(pair[0], a, torch.ones(1, 1, device=DEVICE), 1.0, rounding="stochastic", seed=seed)
        cola_kernels.merge_(pair[1], a, torch.ones(1, 1, device=DEVICE), 1.0, rounding="stochastic", seed=seed)
        numbers = [t[:, [0, 1, 2, 4, 5, 6, 7]].view(torch.int16) for t in pair]
        assert torch.equal(*numbers)
        assert all(bool(t[0, 3].isnan()) for t in pair)


@pytest.mark.parametrize(
    ("weight", "a", "rounding", "message"),
    [
        (torch.zeros(4, 6, dtype=torch.int8), torch.zeros(2, 6), "nearest", "int8"),
        (torch.zeros(4, 6), torch.zeros(2, 5), "nearest", "do not fit"),
        (torch.zeros(4, 6), torch.zeros(2, 6), "up", "rounding is 'up'"),
    ],
    ids=["dtype", "shape", "rounding"],
)
def test_refuses_what_does_not_fit(weight, a, rounding, message):
    with pytest.raises(ValueError, match=message):
        cola_kernels.merge_(weight, a, torch.zeros(4, 2), 1.0, rounding=rounding)


def test_refuses_a_gate_of_another_length():
    with pytest.raises(ValueError, match=r"c has shape \[3\], but weight has 4 rows"):
        cola_kernels.merge_(torch.zeros(4, 6), torch.zeros(2, 6), torch.zeros(4, 2), 1.0, c=torch.ones(3))

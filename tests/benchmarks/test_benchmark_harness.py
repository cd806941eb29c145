"""Paired timing and its statistics, and the parity rule."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.harness import ParityError, Spread, device_slug, interleave, require_close, require_parity, summarise


def test_sides_alternate_and_the_warm_up_is_dropped() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = interleave({name: lambda name=name: side(name) for name in "ABC"}, rounds=2, warmup=1)
    assert "".join(calls) == "ABCCBAABC"
    assert samples == {"A": [6.0, 7.0], "B": [5.0, 8.0], "C": [4.0, 9.0]}


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, q1=2.0, q3=4.0, low=1.0, high=5.0, n=5)
    assert Spread.of([1.0, 2.0]) == Spread(median=1.5, q1=1.25, q3=1.75, low=1.0, high=2.0, n=2)
    assert Spread.of([7.0]) == Spread(median=7.0, q1=7.0, q3=7.0, low=7.0, high=7.0, n=1)


def test_a_drifting_machine_does_not_reach_the_ratio() -> None:
    speed = [1.0, 1.0, 1.0, 3.0, 3.0, 9.0, 9.0]  # the machine slows down ninefold
    ratio = Spread.of_ratio([0.8 * s for s in speed], speed)
    assert ratio.median == pytest.approx(0.8)
    assert ratio.high - ratio.low == pytest.approx(0.0)


def test_ratios_are_of_pairs_not_of_medians() -> None:
    ours, theirs = [1.0, 2.0, 9.0], [2.0, 8.0, 3.0]
    assert Spread.of_ratio(ours, theirs).median == 0.5  # of 0.5, 0.25, 3; the medians' would be 2 / 3


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratio([1.0], [1.0, 2.0])


def test_summary_compares_one_side_with_every_other() -> None:
    summary = summarise({"floor": [1.0], "ours": [2.0], "peer": [4.0]}, "ours")
    assert {name: ratio["median"] for name, ratio in summary["ratio"].items()} == {"floor": 2.0, "peer": 0.5}
    assert summary["samples"]["peer"] == [4.0]


def test_parity_allows_twice_the_error_of_plain_pytorch() -> None:
    truth = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    eager = {"y": torch.tensor([1.0, -2.01])}
    shares = require_parity("op", {"y": torch.tensor([1.0, -2.015])}, eager, truth)
    assert shares["y"] == pytest.approx(0.75, rel=1e-3)
    with pytest.raises(ParityError, match="op: y is off"):
        require_parity("op", {"y": torch.tensor([1.0, -2.03])}, eager, truth)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parity_refuses_what_is_not_finite(value: float) -> None:
    truth = {"y": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(ParityError):
        require_parity("op", {"y": torch.tensor([1.0, value])}, {"y": torch.ones(2)}, truth)


def test_parity_refuses_a_missing_gradient() -> None:
    one = torch.ones(1)
    with pytest.raises(ParityError, match="should return y, dA"):
        require_parity("op", {"y": one}, {"y": one, "dA": one}, {"y": one.double(), "dA": one.double()})


def test_losses_have_to_agree_step_by_step() -> None:
    assert require_close("losses", [2.0, 1.01], [2.0, 1.0], tolerance=0.02) == pytest.approx(0.01)
    for wrong in (1.05, math.nan):
        with pytest.raises(ParityError, match="losses"):
            require_close("losses", [2.0, wrong], [2.0, 1.0], tolerance=0.02)


def test_device_slug_tells_machines_apart() -> None:
    assert device_slug({"device": "Intel(R) Xeon(R) Processor", "threads": 2}) == "intel-xeon-processor-2-threads"

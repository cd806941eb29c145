"""Intervals on made scores whose answer is known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bootstrap import interval, means, share, spread


def _made(seed: int, seeds: int, items: int, *, by_seed: float, by_item: float, noise: float) -> torch.Tensor:
    """[seeds, items] around 0, of the given standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    a, b, e = (torch.randn(*s, generator=generator) for s in ((seeds, 1), (1, items), (seeds, items)))
    return by_seed * a + by_item * b + noise * e


@pytest.mark.parametrize(("seeds", "items"), [(1, 400), (8, 400)], ids=["one seed", "eight that agree"])
def test_what_varies_by_item_is_not_averaged_away_by_seeds(seeds: int, items: int) -> None:
    scores = _made(0, 1, items, by_seed=0, by_item=1, noise=0).expand(seeds, items)
    found = interval(scores)
    width = 2 * 1.96 * float(scores[0].std(correction=0)) / items**0.5
    assert found.high - found.low == pytest.approx(width, rel=0.04)
    assert found.mean == pytest.approx(float(scores.mean()))


def test_what_varies_by_seed_is_not_averaged_away_by_items() -> None:
    scores = _made(0, 40, 1, by_seed=1, by_item=0, noise=0).expand(40, 300)
    found = interval(scores)
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(scores[:, 0].std(correction=0)) / 40**0.5, rel=0.05)


def test_the_truth_is_inside_about_as_often_as_promised() -> None:
    """All three sources; 12 seeds, since few make the interval too narrow, by a known share."""
    inside = 0
    for trial in range(100):
        found = interval(_made(trial, 12, 50, by_seed=0.3, by_item=1.0, noise=0.5))
        inside += not found.excludes(0)
    assert 89 <= inside <= 99


def test_pairs_cancel_what_both_arms_share() -> None:
    shared = _made(0, 5, 200, by_seed=1, by_item=3, noise=0)
    found = interval((shared + 0.25) - shared)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)
    assert interval(shared + 0.25).low < 0 < interval(shared + 0.25).high, "which unpaired would hide it"


def test_the_same_scores_give_the_same_interval() -> None:
    scores = _made(0, 3, 20, by_seed=1, by_item=1, noise=1)
    assert interval(scores) == interval(scores.clone())


def test_a_share_is_drawn_together() -> None:
    whole = 1 + _made(0, 5, 200, by_seed=0.1, by_item=1, noise=1)
    found = share(whole / 2, whole)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_draws_without_a_whole_do_not_spoil_a_share() -> None:
    whole = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])  # nothing but zeros once in 64 draws
    assert (means(whole) == 0).any()
    found = share(whole / 2, whole)
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_there_is_no_share_of_a_gap_that_may_not_exist() -> None:
    noise = _made(0, 5, 200, by_seed=0.1, by_item=1, noise=1)
    assert share(noise, noise - noise.mean()) is None


def test_the_spread_of_one_seed_is_nothing() -> None:
    assert spread([0.5]) == 0
    assert spread([1.0, 3.0]) == pytest.approx(2**0.5)

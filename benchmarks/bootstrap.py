"""Intervals for the difference of two arms that were trained with the same seeds and scored on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


def interval(scores: Tensor) -> Interval:
    """Of the mean of `scores` [seeds, items]: for a paired difference, hand in the differences.

    Seeds are drawn with replacement, then items, the same ones for every seed, as the scores are of S seeds crossed
    with I items (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007). What varies from score to
    score counts too much, what varies with the seed too little, by 1 / S. The ends are percentiles, the draws always
    the same.
    """
    low, high = torch.quantile(means(scores), torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return Interval(float(scores.double().mean()), float(low), float(high))


def means(scores: Tensor) -> Tensor:
    """The mean of every draw [DRAWS]. For two tensors of one shape, draw by draw of the same seeds and items."""
    seeds, items = scores.shape
    by_seed, by_item = _draws(seeds, items)
    return ((by_seed @ scores.double()) * by_item).sum(1) / (seeds * items)


def share(part: Tensor, whole: Tensor) -> Interval | None:
    """Of mean(part) / mean(whole), drawn together; None unless the whole's own interval lies above zero.

    The few draws in which the whole is not positive are left out: a share of nothing means nothing.
    """
    if interval(whole).low <= 0:
        return None
    parts, wholes = means(part), means(whole)
    ratios = parts[wholes > 0] / wholes[wholes > 0]
    low, high = torch.quantile(ratios, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return Interval(float(part.double().mean() / whole.double().mean()), float(low), float(high))


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0


@lru_cache(maxsize=4)
def _draws(seeds: int, items: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return _counts(seeds, generator), _counts(items, generator)


def _counts(n: int, generator: torch.Generator) -> Tensor:
    """How often each of n is drawn in n draws with replacement [DRAWS, n]."""
    drawn = torch.randint(n, (DRAWS, n), generator=generator)
    return torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(DRAWS, n, dtype=torch.float64))

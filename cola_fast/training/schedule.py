"""When links begin and end, and the learning rate at every step. Plain arithmetic: no torch, no state.

A chain of K links has one planned span a link. With `plateau` a link may end before its span does; the next one then
starts at once, and `total` becomes an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from ..config import ScheduleConfig
from ..errors import UserError


@dataclass(frozen=True)
class Span:
    index: int
    steps: int
    rank: int


@dataclass(frozen=True)
class Schedule:
    spans: tuple[Span, ...]
    config: ScheduleConfig

    @property
    def total(self) -> int:
        return sum(span.steps for span in self.spans)

    def lr(self, step: int, link: int, link_start: int) -> float:
        """Learning rate of the optimizer step with number `step` (from 0); link `link` began at step `link_start`."""
        done, rewarm = step - link_start, self.config.rewarm
        jag = (done + 1) / (rewarm + 1) if link > 0 and done < rewarm else 1.0
        return jag * self._curve(step, link, link_start)

    def _curve(self, step: int, link: int, link_start: int) -> float:
        c = self.config
        length, done = (self.total, step) if c.lr_span == "global" else (self.spans[link].steps, step - link_start)
        warmup = c.warmup * length if c.warmup < 1 else c.warmup
        if done < warmup:
            return c.lr * (done + 1) / (warmup + 1)
        progress = min(1.0, (done - warmup) / max(1.0, length - warmup))
        shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[c.lr_shape]
        return c.lr * (shape if c.lr_shape == "constant" else c.lr_end + (1 - c.lr_end) * shape)


def plan(config: ScheduleConfig, *, rank: int, steps_per_epoch: float) -> Schedule:
    """Divide the chain's length among its links, by `shares`; rounding never loses a step.

    Raises UserError if a link would get no step.
    """
    # batches run on across the ends of epochs: the last step alone may reach into one that was not asked for
    total = config.steps if config.steps is not None else math.ceil(round((config.epochs or 0) * steps_per_epoch, 6))
    shares = config.shares or (1.0,) * config.links
    if total < config.links:
        raise UserError(
            f"The schedule has {total} steps for {config.links} links, but every link needs at least one: raise "
            "schedule.steps or schedule.epochs, lower schedule.links, or use a smaller batch."
        )
    # A link's end is at its cumulative share, but leaves a step for itself and for each link behind it.
    ends, previous = [], 0
    for index, share in enumerate(accumulate(shares)):
        latest = total - (config.links - 1 - index)
        previous = min(max(round(total * share / sum(shares)), previous + 1), latest)
        ends.append(previous)
    starts = [0, *ends[:-1]]
    ranks = config.ranks or (rank,) * config.links
    return Schedule(
        tuple(Span(i, e - s, r) for i, (s, e, r) in enumerate(zip(starts, ends, ranks, strict=True))), config
    )

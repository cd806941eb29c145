"""A low-rank update of one weight: its factors, its scale and its gates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One module's low-rank update `(alpha / R) · b diag(e) a`: a [R, K], b [N, R]."""

    a: Tensor
    b: Tensor
    alpha: float
    e: Tensor | None = None  # [R], of an open link alone, see `folded`
    magnitude: Tensor | None = None  # [N], what rows of the weight are scaled to once the update is added (DoRA)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def scaled(self) -> Tensor:
        """b with the scale in it, in fp32 at least: a trainer may have trained the factors in 16 bits."""
        return self.b.to(torch.promote_types(self.b.dtype, torch.float32)) * self.scale

    def folded(self, *, drop: bool = False) -> Factors:
        """The same update without e, which goes into b.

        drop: directions whose e is 0 are left out, but for one if all are.
        """
        if self.e is None:
            return self
        a, b, scale = self.a, self.b * self.e, self.scale
        if drop:
            alive = self.e != 0
            alive[0] |= not bool(alive.any())
            a, b = a[alive], b[:, alive]
        return Factors(a, b, scale * len(a), magnitude=self.magnitude)

    def rows(self, first: int, count: int) -> Factors:
        """The update of `count` rows of the weight, from `first` on."""
        magnitude = None if self.magnitude is None else self.magnitude[first : first + count]
        return self._replace(b=self.b[first : first + count], magnitude=magnitude)

    def negated(self) -> Factors:
        return self._replace(b=-self.b)

    def minus(self, start: Factors) -> Factors:
        """This update less another of the same rank and alpha, as one of twice the rank. `halves` undoes it exactly."""
        a, b = torch.cat([self.a, start.a]), torch.cat([self.b, -start.b], dim=1)
        return Factors(a, b, 2 * self.alpha, magnitude=self.magnitude)

    def halves(self) -> tuple[Factors, Factors]:
        """Of a difference made by `minus`: the update, and the start with B negated, both to be added."""
        r = self.rank // 2
        a, b = self.a.split(r), self.b.split(r, dim=1)
        trained, taken = (Factors(x.clone(), y.contiguous(), self.alpha / 2) for x, y in zip(a, b, strict=True))
        return trained._replace(magnitude=self.magnitude), taken

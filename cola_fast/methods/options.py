"""The options of a chain, each written once, with its default, its check and what it means. `attach` takes them as
arguments, a configuration as keys of `chain`, and chain.json keeps those that every link shares.

Needs no torch, as the configuration reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError, near, shown
from .registry import GATE, INIT, SCALING, wanted_by

LARGEST = 1e30  # of what is a number in 32 bits, with room for products


@dataclass(frozen=True)
class LinkOptions:
    """What every link of a chain shares."""

    r: int = 8
    alpha: float = 16.0
    scaling: str = "lora"  # lora: scale = alpha / R; rslora: alpha / sqrt(R); constant: alpha / r
    dropout: float = 0.0  # on the low-rank branch, in training mode
    rank_pattern: dict[str, int] | None = None  # module name or pattern -> rank, over r
    init: str = "kaiming"  # how a link starts: kaiming, pissa, olora, carry, eva, lora-ga or loftq
    carry: float = 0.0  # init: carry: the share of a link that the next one starts from
    frozen: Literal["a", "b"] | None = None  # the factor that is not trained
    share: float = 1.0  # of the blocks, drawn anew for each link, that it covers
    gate: str | None = None  # what a link trains beside A and B: adalora, sora (on the rank) or dora (on the output)

    def check(self, section: str = "") -> None:
        """Raises UserError for a value that no link can have. section: where the options stand, `chain.` in a
        configuration."""
        for slot, name in ((INIT, self.init), (SCALING, self.scaling), (GATE, self.gate)):
            if name is not None:
                slot.choose(name, f"{section}{slot.key.rpartition('.')[2]}")
        for sentence in self._faults():
            raise UserError(f"{section}{sentence}")

    def _faults(self) -> Iterator[str]:
        for key in ("alpha", "dropout", "share", "carry"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
                yield f"{key} is {shown(value)}, but it must be a finite number, in 32 bits."
        for name, rank in self.rank_pattern.items() if isinstance(self.rank_pattern, Mapping) else ():
            if isinstance(rank, int) and rank < 1:
                yield f"rank_pattern gives {shown(name)} rank {rank}, but a rank is at least 1."
        if isinstance(self.r, int) and self.r < 1:
            yield f"r is {shown(self.r)}, but a rank is at least 1."
        if not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout}, but it must be at least 0 and less than 1."
        if self.alpha <= 0:
            yield f"alpha is {self.alpha}, but it must be positive."
        if self.frozen not in (None, "a", "b"):
            yield f"frozen is {shown(self.frozen)}, but must be 'a', 'b' or None."
        if self.frozen in wanted_by(self.init).trained:
            yield f"frozen is {self.frozen!r}, but init {self.init} needs that factor trained: set it to None."
        if not 0 < self.share <= 1:
            yield f"share is {self.share}, but it is a share of the blocks, above 0 and at most 1."
        if not 0 <= self.carry <= 1:
            yield f"carry is {self.carry}, but it is a share of a link, between 0 and 1."


@dataclass(frozen=True)
class ChainOptions(LinkOptions):
    """And what is decided once, when the chain is attached."""

    targets: str | tuple[str, ...] = ("q_proj", "v_proj")  # module names, "all-linear", or a regular expression
    train_also: str | tuple[str, ...] = ()  # modules trained whole beside the links: heads, embeddings, norms
    train_tokens: tuple[int, ...] = ()  # tokens whose rows of the embeddings, and of the head, are trained beside them
    base: Literal["auto", "dense", "nf4", "ledger"] = "auto"  # where tied links live: in the weights, or beside them
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"  # how a tie rounds into 16-bit or 4-bit weights


def from_arguments(given: Mapping[str, Any]) -> ChainOptions:
    """Raises UserError for a name that is no option."""
    known = [field.name for field in dataclasses.fields(ChainOptions)]
    for name in given:
        if name not in known:
            raise UserError(f"attach has no option {name}.{near(name, known) or ' It has: ' + ', '.join(known) + '.'}")
    return ChainOptions(**given)

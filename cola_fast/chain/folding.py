"""Folding: a sealed link becomes part of the base, and a start leaves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..layers.factors import Factors
from ..seeds import derive_seed
from .chain_json import folder_name
from .sealed_link import SealedLink, summarise

if TYPE_CHECKING:
    from .chain import Chain


def fold(chain: Chain, link: SealedLink, *, live: bool = False) -> None:
    """From the sealed bytes, at a tie as in a replay, so that both give the same weights. Idempotent by link index.
    What it kept is measured once, at the tie, of the last step. live: the link's start has left the weights before.
    """
    reports, steps = {}, link.steps()
    for name, layer in chain.layers.items():
        if layer.folded != link.index:
            continue
        if name in steps:
            taken, trained = steps[name]
            if taken is not None and not live:
                take_out(chain, link.index, name, taken)
            seed = derive_seed(chain.settings.seed, "fold", link.index, name)
            report = chain.base.fold(layer, trained, seed, report=not link.fold)
            if report is not None:
                reports[name] = report
        layer.folded += 1
    if chain.beside and not live:
        chain.beside.set(link.also(), str(link.folder or folder_name(link.index)))
    if reports:
        link.fold = summarise(reports)


def take_out(chain: Chain, index: int, name: str, factors: Factors) -> None:
    seed = derive_seed(chain.settings.seed, "start", index, name)
    chain.base.fold(chain.layers[name], factors, seed, report=False)

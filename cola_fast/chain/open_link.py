"""Opening a link: what all links of a chain share, which modules the next one covers, and the values it starts from.

A start with B A ≠ 0 (PiSSA, OLoRA, LoRA-GA, PeriodicLoRA) must not change the model, so the chain takes `s·B0·A0` out
of the weight when it opens the link. What the link then adds to the sealed chain is `s·(B A - B0 A0)`, which is one
link of rank 2R, `[B | -B0]` and `[A; A0]`, and sealed as such. A replay folds it as the live run did, the start first:
same bits. One kind of start stays in: LoftQ's, whose purpose is to change a quantised model back towards the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, listed, shown
from ..layers.factors import Factors
from ..layers.layer import LoRALinear, factor_dtype
from ..layers.targets import assign_ranks, block_of
from ..methods import GATE, INIT, SCALING, Gates, Site, wanted_by
from ..methods.options import LinkOptions
from ..seeds import derive_seed
from .sealed_link import spread


@dataclass(frozen=True)
class Settings(LinkOptions):
    """What every link of a chain shares, as recorded in chain.json."""

    seed: int = 0  # of the links' initial values and of stochastic rounding
    capped: bool = False  # where a weight is too small for a link's rank, it gets the highest it can have

    def check(self, section: str = "") -> None:
        super().check(section)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"seed is {shown(self.seed)}, but must be a whole number.")

    def with_pattern(self, pattern: Any) -> Settings:
        """The same with another `rank_pattern`, as it was given: `ranks` checks it."""
        return replace(self, rank_pattern=pattern)

    def ranks(self, shapes: Mapping[str, tuple[int, int]], r: int | None = None) -> dict[str, int]:
        """Module -> the rank of a link of rank `r` (the chain's own when None).

        shapes: module -> (N, K). Raises UserError for a rank that a module cannot have, or not with this init.
        """
        directions = wanted_by(self.init).directions
        highest = {name: min(shape) // directions for name, shape in shapes.items()} if self.capped else None
        ranks = assign_ranks(shapes, self.r if r is None else r, self.rank_pattern, highest)
        for name, rank in ranks.items():
            if directions * rank > min(shapes[name]):
                n, k = shapes[name]
                raise UserError(
                    f"init {self.init} takes {directions}R directions of each weight, but that of {name}, {n} x {k}, "
                    f"has no {directions * rank}: lower its rank with rank_pattern, or r."
                )
        return ranks

    def lowered(self, shapes: Mapping[str, tuple[int, int]], r: int | None = None) -> str | None:
        """A sentence on the modules that get less than rank `r`, or no link, because their weights are small."""
        ranks, asked = self.ranks(shapes, r), self.r if r is None else r
        lower = {name: ranks.get(name, 0) for name in shapes if ranks.get(name, 0) < asked}
        if not (self.capped and lower) or self.rank_pattern:
            return None
        given = listed((f"{name} {rank or 'none'}" for name, rank in lower.items()), 3)
        return (
            f"{len(lower)} of {len(shapes)} modules cannot have rank {asked} and get the highest that their weights "
            f"allow: {given}."
        )

    def alpha_for(self, rank: int) -> float:
        """Alpha of a module of this rank: its scale is that over the rank."""
        return SCALING.choose(self.scaling)(self.alpha, rank, self.r)


@dataclass(frozen=True, repr=False)
class OpenLink:
    index: int
    ranks: dict[str, int]
    alphas: dict[str, float]
    starts: dict[str, Factors]  # what it took out of the weights; empty, or of every module it covers

    def __repr__(self) -> str:
        return f"OpenLink({self.index}: {len(self.ranks)} modules, rank {spread(self.ranks)})"


def first_factors(
    settings: Settings,
    index: int,
    layers: Mapping[str, LoRALinear],
    ranks: Mapping[str, int],
    before: Callable[[], Mapping[str, Factors]],
    seen: Mapping[str, Any],
    originals: Mapping[str, Tensor],
) -> dict[str, Factors]:
    """What link `index` starts with at each of the layers, on the CPU.

    before: what the link before ended with. seen, originals: what the init wants, see `methods.registry.Wants`. All
    by module.
    """

    def first(name: str, layer: LoRALinear) -> Factors:
        rank = ranks[name]
        alpha = settings.alpha_for(rank)
        site = Site(
            shape=(layer.out_features, layer.in_features),
            read=layer.dense_weight,
            rank=rank,
            scale=alpha / rank,
            frozen=settings.frozen,
            carry=settings.carry,
            dtype=factor_dtype(layer.weight),
            generator=torch.Generator().manual_seed(derive_seed(settings.seed, "init", index, name)),
            previous=lambda: before().get(name),
            index=index,
            seen=seen.get(name),
            original=originals.get(name),
        )
        a, b = INIT.choose(settings.init)(site)
        gates = Gates() if settings.gate is None else GATE.choose(settings.gate)(site)
        return Factors(a.cpu().contiguous(), b.cpu().contiguous(), alpha, *gates)

    with torch.device("cpu"):  # where the generators are, whatever set_default_device says
        return {name: first(name, layer) for name, layer in layers.items()}


def originals_of(
    init: str, index: int, layers: Mapping[str, LoRALinear], original: nn.Module | None
) -> dict[str, Tensor]:
    """Module -> its weight before it was quantised, if the init wants that, which it does for the first link.
    original: the 16-bit model.

    Raises UserError if no layer is quantised, if the model is missing, or if it is not what they were quantised from.
    """
    if original is not None and not isinstance(original, nn.Module):
        raise UserError(f"original is {shown(original)}, but must be the 16-bit model, a torch.nn.Module.")
    if index > 0 or not wanted_by(init).corrects:
        return {}
    quantised = {name: layer for name, layer in layers.items() if layer.kind.quantised}
    if not quantised:
        raise UserError(
            f"init {init} corrects what quantising lost, but no targeted weight is quantised: load the model in 4 "
            "bits, or choose another init."
        )
    if original is None:
        raise UserError(
            f"init {init} needs the weights before they were quantised: give attach the 16-bit model as `original`."
        )
    modules = dict(original.named_modules())
    found = {}
    for name, layer in quantised.items():
        weight = getattr(modules.get(name), "weight", None)
        expected = (layer.out_features, layer.in_features)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != expected:
            shape = "missing" if weight is None else tuple(weight.shape)
            raise UserError(f"{name} is {shape} in the original model, but {expected} in this one: give its own.")
        found[name] = weight.detach()
    return found


def covered(names: Sequence[str], settings: Settings, index: int) -> list[str]:
    """The modules of link `index`: those of a random `share` of the blocks, another for every link."""
    blocks = list(dict.fromkeys(map(block_of, names)))
    count = math.ceil(settings.share * len(blocks))
    if count == len(blocks):
        return list(names)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "blocks", index))
    chosen = {blocks[i] for i in torch.randperm(len(blocks), generator=generator, device="cpu")[:count].tolist()}
    return [name for name in names if block_of(name) in chosen]


def starts_of(settings: Settings, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """What the link takes out of the weights: all of the factors if any has B A ≠ 0, so that a link is of one kind
    throughout; else nothing. Nothing either where the init changes the function on purpose."""
    if wanted_by(settings.init).corrects:
        return {}
    starts = {name: f.folded()._replace(magnitude=None) for name, f in factors.items()}
    return starts if any(map(moves, starts.values())) else {}


def moves(factors: Factors) -> bool:
    """Whether A and B change the weight's rows by anything but a factor."""
    return bool(factors.a.any()) and bool(factors.folded().b.any())

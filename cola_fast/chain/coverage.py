"""What share of a model's weights a chain covers, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import listed
from ..layers import weights
from ..layers.layer import PARTS
from ..layers.trained_modules import ROWS
from .sealed_link import spread

if TYPE_CHECKING:
    from .chain import Chain

LARGE = 0.1  # share of the weights from which experts that get no link are worth a note


@dataclass(frozen=True)
class Coverage:
    covered: int  # numbers in the weights that links are on
    total: int  # in all of the model's parameters
    left_out: dict[str, int]  # kind of parameter, such as `experts.gate_up_proj` -> numbers, largest first
    experts: int  # of those, in tensors that hold a mixture's experts together

    @property
    def share(self) -> float:
        return self.covered / max(1, self.total)

    def __str__(self) -> str:
        large = {kind: count / self.total for kind, count in self.left_out.items() if count >= self.total / 100}
        named = listed((f"{kind} {share:.1%}" for kind, share in large.items()), 4)
        return f"{self.share:.1%} of the model's weights" + (f"; left out: {named}" if named else "")

    def note(self) -> str | None:
        """For `all-linear`, which does not cover all there is where experts are one tensor."""
        if self.experts < LARGE * self.total:
            return None
        return (
            f"targets: all-linear covers {self}. A mixture's experts that are one tensor, "
            f"{self.experts / self.total:.1%} of the weights, are no linears and get no link."
        )


def coverage(model: nn.Module, names: Iterable[str], beside: Iterable[nn.Parameter] = ()) -> Coverage:
    """names: of the modules that links are on. A link's own parameters do not count. beside: trained whole."""
    whole = set(beside)
    covered = experts = total = 0
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    linked, left_out = {f"{name}.weight" for name in names}, dict[str, int]()
    for name, found in weights.in_model(model):
        if name.rpartition(".")[2] in (*PARTS, ROWS):
            continue
        parameter, count = found.tensor, found.count
        total += count
        if name in linked or parameter in whole:
            covered += count if name in linked else 0
            continue
        kind = _kind(name)
        left_out[kind] = left_out.get(kind, 0) + count
        together = parameter.dim() == 3 and parameter.shape[0] > 1 and id(parameter) not in convolutions
        experts += count if together else 0
    return Coverage(covered, total, dict(sorted(left_out.items(), key=lambda item: -item[1])), experts)


def _kind(name: str) -> str:
    """`experts.gate_up_proj` of `model.layers.3.mlp.experts.gate_up_proj`; `embed_tokens` of its weight."""
    parts = [part for part in re.sub(r"\.(weight|bias)$", "", name).split(".") if not part.isdigit()]
    parts = parts or [name]  # of a Sequential
    return ".".join(parts[-2:]) if "expert" in name else parts[-1]


def describe(chain: Chain) -> str:
    """Short, for a notebook's cell that ends in a chain."""
    kept = [f"{len(chain.links)} sealed"]
    if chain.open_link is not None:
        trained = sum(parameter.numel() for parameter in chain.parameters())
        kept.append(f"link {chain.open_link.index} open: rank {spread(chain.open_link.ranks)}, {trained:,} trained")
    place = f", in {chain.folder}" if chain.folder is not None else ""
    return (
        f"Chain on {chain.identity['name']}, {chain.base.kind}{place}\n"
        f"  links    {', '.join(kept)}\n"
        f"  modules  {len(chain.layers)}, {coverage(chain.model, chain.layers, chain.beside.parameters())}"
        + (f"\n  beside   {chain.beside}" if chain.beside else "")
    )

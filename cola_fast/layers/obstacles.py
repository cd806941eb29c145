"""Linears that can take no link, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import listed
from . import weights


def obstacles(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Linear -> why it can take no link, the end of a sentence that begins with its name."""
    modules = dict(model.named_modules())
    owners = _owners(model)
    found: dict[str, str] = {}
    for name in names:
        module = cast(nn.Linear, modules[name])
        parent = modules.get(name.rpartition(".")[0], model)
        weight = module._parameters.get("weight")
        sharing = [] if weight is None else [other for other in owners.get(_memory(weight), ()) if other != name]
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            found[name] = (
                f"belongs to a {type(parent).__name__}, which in eval mode reads its weights past the link: call "
                "torch.backends.mha.set_fastpath_enabled(False) first, or choose other targets."
            )
        elif sharing:
            found[name] = (
                f"shares its weight with {listed(sharing, 3)}, so folding a link would change both: choose other "
                "targets, or untie the weights first."
            )
        elif (own := obstacle(module)) is not None:
            found[name] = own
    return found


def obstacle(linear: nn.Linear) -> str | None:
    """Why it can take no link, as the end of a sentence that begins with its name; None if it can: it holds a weight
    of one of the kinds of `layers.weights`, and that takes one."""
    kind = getattr(linear, "plain", type(linear))  # of a LoRALinear, what it was
    if "forward" in vars(linear):
        return (
            "has had its forward replaced by another library (accelerate's device_map does this), which would bypass "
            "the link: load the model without it."
        )
    weight = linear._parameters.get("weight")
    if weight is None:
        return (
            "computes its weight anew at each call, as pruning and weight norm do, so that nothing can be folded into "
            "it: make that permanent first, or choose other targets."
        )
    found = weights.held_by(kind)
    if found is None:
        linears = " or ".join(kind.linear for kind in reversed(weights.KINDS) if kind.linear)
        return (
            f"is a {kind.__module__}.{kind.__name__}, but a link can only be attached to {linears}: choose other "
            "targets, or load the model in 16 bits."
        )
    return found(linear, weight).obstacle()


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Where a matrix lies -> the modules that have it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 2:
                owners.setdefault(_memory(parameter), []).append(name)
    return owners


def _memory(parameter: Tensor) -> int:
    """Where it lies; of one that lies nowhere or in several places, which object it is."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return parameter.data_ptr() if plain else id(parameter)

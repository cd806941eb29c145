"""What a frozen weight is. One file a kind; the rest of the library asks `of` for a weight and never for its kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .dense import Dense
from .int8 import Int8
from .nf4 import NF4
from .sharded import Sharded
from .weight import EXACT
from .weight import Weight as Weight

# The first that recognises a tensor is its kind. Dense is what no other is.
KINDS: tuple[type[Weight], ...] = (NF4, Int8, Sharded, Dense)


def of(module: nn.Module, tensor: Tensor | None = None) -> Weight:
    """A parameter of a module, of a linear its weight, as what it is now: FSDP exchanges a parameter at each call."""
    found: Any = module.weight if tensor is None else tensor
    for kind in KINDS[:-1]:  # a loop, which torch.compile traces
        if kind.recognises(found):
            return kind(module, found)
    return Dense(module, found)


def in_model(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Every parameter, as `named_parameters` names them."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{key}" if path else key, of(module, parameter)


def held_by(linear: type[nn.Module]) -> type[Weight] | None:
    """The kind that linears of this class hold; None for those that take no link."""
    return next((kind for kind in KINDS if kind.held_by(linear)), None)


def stored_as(settings: Mapping[str, Any]) -> type[Weight] | None:
    """The kind that a checkpoint with this quantization_config holds; None for one that is not known."""
    return next((kind for kind in KINDS if kind.stored(settings)), None)


def loaded_as(options: Any) -> list[type[Weight]]:
    """The kinds that the options of `model:` ask to quantise to while loading: none, or one."""
    return [kind for kind in KINDS if kind.option and getattr(options, kind.option, False)]


def quantised_kinds() -> list[type[Weight]]:
    return [kind for kind in KINDS if kind.quantised]


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Inside, the model multiplies by its weights as they are read here, whatever rounding of x their library adds."""
    linears = [module for module in model.modules() if (kind := held_by(type(module))) is not None and kind.multiplies]
    linears = [module for module in linears if "forward" not in vars(module)]
    token = EXACT.set(True)
    for module in linears:
        module.forward = partial(_product, module)
    try:
        yield
    finally:
        EXACT.reset(token)
        for module in linears:
            del module.forward


def _product(module: Any, x: Tensor) -> Tensor:
    return of(module).product(x, module.bias)


def hold(model: nn.Module) -> list[tuple[type[Weight], nn.Module]]:
    """Make a model's weights fit to train on, until `release`. Raises UserError if they cannot be."""
    return [(kind, module) for kind in KINDS for module in kind.hold(model)]


def release(held: Iterable[tuple[type[Weight], nn.Module]]) -> None:
    for kind, module in held:
        kind.release(module)

"""PyTorch's modes, set aside: what a link is must not depend on which of them its maker is in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def plainly(function: F) -> F:
    """Call it outside autocast, which would round what a link starts from, and outside inference_mode, whose tensors
    can never be trained."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                modes.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return cast(F, wrapped)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode it was in, also those that were in another than the model."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

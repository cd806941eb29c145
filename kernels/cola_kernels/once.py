"""First derivatives only, said out loud.

PyTorch's own `once_differentiable` speaks up for `loss.backward()` alone: `torch.autograd.grad` with respect to an
input goes around it, and finds zero, or whatever other paths contribute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

Backward = TypeVar("Backward", bound=Callable[..., Any])


class _Refusal(Function):
    """The identity of a gradient, which raises when it is differentiated with respect to what it was made of."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "A LoRA linear has first derivatives only: where second ones are needed, use torch's linears."
        )


def once_differentiable(backward: Backward) -> Backward:
    """For a Function's `backward(ctx, saved, *dys)`: a second derivative through it raises RuntimeError, and is never
    silently left out. saved: ctx.saved_tensors, which activation checkpointing lets nobody read twice."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *dys: Tensor | None) -> Any:
        with torch.no_grad():
            saved = ctx.saved_tensors
            gradients = backward(ctx, saved, *dys)
        if not torch.is_grad_enabled():  # no create_graph
            return gradients
        sources = [t for t in (*dys, *saved) if t is not None and t.requires_grad]
        if not sources:
            return gradients
        several = gradients if isinstance(gradients, tuple) else (gradients,)
        return tuple(None if gradient is None else _Refusal.apply(gradient, *sources) for gradient in several)

    return cast(Backward, wrapped)

"""The public ops: `lora_linear`, `lora_linear_group` and `merge_`, with the backend chosen for each call.

The launches of a LoRA linear are torch.library ops, opaque to autograd and to torch.compile; autograd.py's Function
lies above them. They allocate their results, never wait for the GPU, and read the dropout seed from device memory, so
that they can be recomputed under activation checkpointing and captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, backend, reference, small
from .reference import FoldReport

_LIBRARY = torch.library.Library("cola_kernels", "FRAGMENT")


def _op(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op. Without the wrapper of torch.library.custom_op, whose checks cost more than a small launch."""
    name = schema[: schema.index("(")]

    def on_its_device(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):  # Triton launches on the current GPU, wherever the tensors are
            return launch(x, *args, **kwargs)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cola_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.cola_kernels, name).default


def _fake_project(x: Tensor, a: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


def _fake_seeded_matmul(
    x: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _fake_output_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], b.shape[1]), b.new_empty(b.shape, dtype=dtype)


def _fake_factor_grad(ds: Tensor, x: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(ds.shape[1], x.shape[1], dtype=dtype)


def _triton_function() -> type[torch.autograd.Function] | None:
    if not backend.HAS_TRITON:
        return None
    from . import matmul, skinny

    return autograd.make_function(
        autograd.Primitives(
            lambda seed, rows, columns, dropout: seed,  # the kernels make the mask in flight
            _op(
                "project(Tensor x, Tensor a, float scale, float dropout, Tensor? seed) -> Tensor",
                skinny.launch_project,
                _fake_project,
            ),
            _op(
                "seeded_matmul(Tensor x, Tensor w, Tensor u, Tensor v, float scale, Tensor? bias, float dropout, "
                "Tensor? seed) -> Tensor",
                matmul.launch_seeded_matmul,
                _fake_seeded_matmul,
            ),
            _op(
                "output_grads(Tensor dy, Tensor b, Tensor s, float scale, ScalarType dtype) -> (Tensor, Tensor)",
                skinny.launch_output_grads,
                _fake_output_grads,
            ),
            _op(
                "factor_grad(Tensor ds, Tensor x, float dropout, Tensor? seed, ScalarType dtype) -> Tensor",
                skinny.launch_factor_grad,
                _fake_factor_grad,
            ),
        )
    )


_TRITON = _triton_function()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ + bias`, differentiable in x, lora_a, lora_b and bias.

    `reference.lora_linear` says what the arguments are. On a GPU this runs Triton kernels, elsewhere the reference;
    both draw the same dropout mask from the same seed.
    """
    (y,) = lora_linear_group(x, [weight], [lora_a], [lora_b], [scale], [bias], dropout=dropout, seed=seed)
    return y


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of several members that read the same x: one pass over x for every S, one accumulated dX.

    `reference.lora_linear_group` says what the arguments are; the backend is chosen as for `lora_linear`.
    """
    if _TRITON is None or not backend.use_triton(x):
        return reference.lora_linear_group(x, weights, lora_as, lora_bs, scales, biases, dropout=dropout, seed=seed)
    if dropout == 0 and small.is_small(x, lora_bs):
        return small.lora_linear_group(x, weights, lora_as, lora_bs, scales, biases)
    return autograd.apply(_TRITON, x, weights, lora_as, lora_bs, scales, biases, dropout, seed)


def merge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    report: bool = False,
) -> FoldReport | None:
    """`weight += scale · B A` in place, without a temporary of weight's size, rounded once from fp32.

    `reference.merge_` says what the arguments are; the backend is chosen as for `lora_linear`.
    """
    if backend.use_triton(weight):
        from .merge import merge_ as triton_merge_

        with torch.cuda.device_of(weight):
            return triton_merge_(weight, lora_a, lora_b, scale, rounding=rounding, seed=seed, report=report)
    return reference.merge_(weight, lora_a, lora_b, scale, rounding=rounding, seed=seed, report=report)

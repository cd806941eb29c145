"""The public ops: `lora_linear`, `lora_linear_group` and `merge_`, with the backend chosen for each call.

The launches of a LoRA linear are torch.library ops, opaque to autograd and to torch.compile; autograd.py's Function
lies above them. They allocate their results, never wait for the GPU, and read the dropout seed from device memory, so
that they can be recomputed under activation checkpointing and captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import autograd, backend, gates, nf4, nf4_cpu, nf4_fold, reference, small
from .nf4 import NF4
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


def _fake_dequantize(*args: Any) -> None:
    return None


def _triton_function() -> type[torch.autograd.Function] | None:
    if not backend.HAS_TRITON:
        return None
    from . import dequantize, matmul, skinny

    into = _op(
        "nf4_dequantize_(Tensor codes, Tensor absmax, Tensor? absmax2, Tensor? table, Tensor? offset, int blocksize, "
        "int blocksize2, Tensor(a!) out) -> ()",
        dequantize.launch_dequantize,
        _fake_dequantize,
    )

    def dequantize_into(weight: NF4, out: Tensor) -> Tensor:
        into(*weight[:5], *weight.layout, out)
        return out

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
            dequantize_into,
        )
    )


def _fake_gate_grads(dy: Tensor, y0: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), c.new_empty(c.shape)


def _triton_gate() -> type[torch.autograd.Function] | None:
    if not backend.HAS_TRITON:
        return None
    from .gate_grads import launch_gate_grads

    schema = "gate_grads(Tensor dy, Tensor y0, Tensor c) -> (Tensor, Tensor)"
    return gates.make_gate(_op(schema, launch_gate_grads, _fake_gate_grads))


_TRITON = _triton_function()
_TRITON_GATE = _triton_gate()


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
    e: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    """`c ⊙ (x Wᵀ + scale · ((drop(x) Aᵀ) ⊙ e) Bᵀ) + bias`, differentiable in all but weight and scale.

    `reference.lora_linear` says what the arguments are. On a GPU this runs Triton kernels, elsewhere the reference;
    both draw the same dropout mask from the same seed.
    """
    es, cs = (None if gate is None else [gate] for gate in (e, c))
    (y,) = lora_linear_group(x, [weight], [lora_a], [lora_b], [scale], [bias], dropout=dropout, seed=seed, es=es, cs=cs)
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
    es: Sequence[Tensor | None] | None = None,
    cs: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` of several members that read the same x: one pass over x for every S, one accumulated dX.

    `reference.lora_linear_group` says what the arguments are; the backend is chosen as for `lora_linear`.
    """
    if _TRITON is None or _TRITON_GATE is None or not backend.use_triton(x):
        return reference.lora_linear_group(
            x, weights, lora_as, lora_bs, scales, biases, dropout=dropout, seed=seed, es=es, cs=cs
        )
    ungated: Callable[..., tuple[Tensor, ...]] = small.lora_linear_group
    if dropout != 0 or not small.is_small(x, weights):
        ungated = partial(autograd.apply, _TRITON, dropout=dropout, seed=seed)
    if es is None and cs is None:
        return ungated(x, weights, lora_as, lora_bs, scales, biases)
    return gates.apply(ungated, _TRITON_GATE, x, weights, lora_as, lora_bs, scales, biases, es, cs)


def merge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    first_row: int = 0,
    report: bool = False,
    c: Tensor | None = None,
) -> FoldReport | None:
    """`weight = c ⊙ (weight + scale · B A)` in place, without a temporary of its size, rounded once from fp32.

    `reference.merge_` says what the arguments are; the backend is chosen as for `lora_linear`.
    """
    options: dict[str, Any] = {"rounding": rounding, "seed": seed, "first_row": first_row, "report": report, "c": c}
    if backend.use_triton(weight):
        from .merge import merge_ as triton_merge_

        with torch.cuda.device_of(weight):
            return triton_merge_(weight, lora_a, lora_b, scale, **options)
    return reference.merge_(weight, lora_a, lora_b, scale, **options)


def nf4_dequantize(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of an NF4 weight of bitsandbytes: a new `[N, K]` in `dtype`, rounded once from fp32.

    Raises:
        ValueError: a weight that is not NF4, or was repacked for the CPU (`unpack_nf4_`).
    """
    view = nf4.read(weight)
    out = torch.empty(view.shape, dtype=dtype, device=weight.device)
    if backend.use_triton(out):
        from .dequantize import launch_dequantize

        with torch.cuda.device_of(out):
            launch_dequantize(*view[:5], *view.layout, out)
        return out
    return nf4_cpu.dequantize(view, out)


def nf4_merge_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    rounding: str = "stochastic",
    second_moment: Tensor | None = None,
    tokens: int | None = None,
    damping: float = 0.01,
    held_out: Tensor | None = None,
    seed: int = 0,
) -> FoldReport:
    """`weight += scale · B A` in the codes of an NF4 weight; its scales, and its storage, stay as they are.

    nearest and stochastic work tile by tile; with held_out they need a copy of the codes. activation needs a copy of
    this one weight in fp32 and its codes, and a few K x K matrices in fp64.

    Args:
        weight: `[N, K]`, a `Params4bit` of bitsandbytes or any tensor with such a `quant_state`.
        lora_a: `[R, K]`.
        lora_b: `[N, R]`.
        rounding: "stochastic", "nearest" or "activation"; nf4_fold.py says what each is good for.
        second_moment: of the inputs, the mean of x xᵀ over tokens, `[K, K]`; activation needs it.
        tokens: how many tokens second_moment is the mean of, to check that they are enough.
        damping: added to the diagonal of second_moment, as a share of its mean.
        held_out: a second moment of other inputs, `[K, K]`, in whose metric the fold is reported: an inner product of
            changes E and D is tr(E H Dᵀ), so that error is that of the layer's output. None: the Frobenius product.
        seed: of stochastic rounding; the same seed gives the same codes again.

    Raises:
        ValueError: a weight that is not NF4, or whose rows are not whole blocks; factors that do not fit or are not
            finite; a second moment that is missing, does not fit, is not finite or not definite; too few tokens for
            the damping. The weight is then as it was.
    """
    options = {"rounding": rounding, "second_moment": second_moment, "tokens": tokens, "damping": damping}
    report, _ = _nf4_fold(weight, lora_a, lora_b, scale, **options, held_out=held_out, seed=seed)
    return report


def nf4_merge_with_carry_(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    second_moment: Tensor,
    rank: int,
    rounding: str = "stochastic",
    tokens: int | None = None,
    damping: float = 0.01,
    held_out: Tensor | None = None,
    seed: int = 0,
) -> tuple[FoldReport, Tensor, Tensor]:
    """`nf4_merge_`, and factors of what it left over: A `[rank, K]`, B `[N, rank]`, fp32, where the next link starts.

    weight + scale · B A is then as close to what it should be, for inputs of this second moment, as that rank allows.
    The report is of the weight alone. It needs a copy of the codes, and a few K x K matrices in fp64.

    Args, Raises: as `nf4_merge_`.
    """
    options = {"rounding": rounding, "second_moment": second_moment, "tokens": tokens, "damping": damping}
    if rank < 1 or scale == 0:
        raise ValueError(f"rank is {rank} and scale {scale}, but a carry takes a rank of at least 1 and a scale not 0.")
    report, rest = _nf4_fold(weight, lora_a, lora_b, scale, **options, held_out=held_out, seed=seed, carry_rank=rank)
    assert rest is not None
    return report, *rest


def _nf4_fold(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, **options: Any
) -> tuple[FoldReport, tuple[Tensor, Tensor] | None]:
    kernels = nf4_fold.REFERENCE
    if backend.use_triton(lora_a):
        from .nf4_merge import TRITON as kernels
    with torch.cuda.device_of(lora_a):
        return nf4_fold.fold(kernels, weight, lora_a, lora_b, scale, **options)

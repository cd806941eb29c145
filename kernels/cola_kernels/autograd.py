"""The LoRA linear as an autograd Function, written once over four primitives that each backend supplies.

    S  = project(x, A)                    drop(X) Aᵀ
    Y  = seeded_matmul(x, Wᵀ, S, Bᵀ)      X Wᵀ + scale · S Bᵀ + bias
    dS, dB = output_grads(dY, B, S)       scale · dY B,  scale · dYᵀ S
    dX = seeded_matmul(dY, W, dS, A)      dY W + undrop(dS A)
    dA = factor_grad(dS, x)               dSᵀ drop(X)

It takes a group of members that read the same x (q, k and v; gate and up): their A are stacked, so that x is read once
for every S and once for every dA, and their dX is accumulated in one buffer. A single layer is a group of one.

Backward keeps x and S, nothing else: dropout is made again from its seed. With every A frozen x is not kept, and with
every B frozen S is not. An NF4 weight is dequantised in forward and again in backward, into a buffer that all share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import nf4
from .checks import check_group, check_lora_linear
from .nf4 import NF4, Layout, Weight
from .once import once_differentiable
from .philox import as_seed

Backward = TypeVar("Backward", bound=Callable[..., Any])


class MakeMask(Protocol):
    def __call__(self, seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
        """What the other primitives take as `mask` for drop(x), x [rows, columns]: the mask, or the seed if they make
        it in flight. Called once in forward and once in backward."""


class Project(Protocol):
    def __call__(self, x: Tensor, a: Tensor, scale: float, dropout: float, mask: Tensor | None) -> Tensor:
        """`scale · drop(x) aᵀ`: x [M, K], a [R, K] -> [M, R] in x's dtype."""


class SeededMatmul(Protocol):
    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        u: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None,
        dropout: float,
        mask: Tensor | None,
    ) -> Tensor:
        """`x w + undrop(scale · u v) + bias`: x [M, L], w [L, P], u [M, R], v [R, P] -> [M, P] in x's dtype."""


class OutputGrads(Protocol):
    def __call__(self, dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`scale · dy b` [M, R], and `scale · dyᵀ s` [N, R] in `dtype`: dy [M, N], b [N, R], s [M, R]."""


class FactorGrad(Protocol):
    def __call__(self, ds: Tensor, x: Tensor, dropout: float, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`dsᵀ drop(x)`: ds [M, R], x [M, K] -> [R, K] in `dtype`."""


class Dequantize(Protocol):
    def __call__(self, weight: NF4, out: Tensor) -> Tensor:
        """Write an NF4 weight into out [N, K], and return out."""


class Primitives(NamedTuple):
    """What a backend implements. The operands of one call share a dtype."""

    make_mask: MakeMask
    project: Project
    seeded_matmul: SeededMatmul
    output_grads: OutputGrads
    factor_grad: FactorGrad
    dequantize: Dequantize


def make_function(ops: Primitives) -> type[Function]:
    """The Function over `ops`. Its inputs: x, seed, scales, dropout and layouts; then all weights (or their codes),
    lora_as, lora_bs, biases, and what else NF4 weights consist of."""

    def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.to(dtype)
        return ops.dequantize(weight, nf4.scratch(weight, dtype))

    class LoRALinear(Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            seed: Tensor | None,
            scales: tuple[float, ...],
            dropout: float,
            layouts: tuple[Layout | None, ...],
            *members: Any,
        ) -> tuple[Tensor, ...]:
            count, dtype = len(scales), x.dtype
            mains, lora_as, lora_bs, biases = (members[i * count : (i + 1) * count] for i in range(4))
            others = members[4 * count :]
            weights = nf4.join(mains, others, layouts)
            rows = x.reshape(-1, x.shape[-1])  # [M, K]
            mask = None if seed is None else ops.make_mask(seed, rows.shape[0], rows.shape[1], dropout)
            s = ops.project(rows, stack(lora_as).to(dtype), 1.0, dropout, mask)  # [M, sum of R]
            ys = []
            for w, b, bias, scale, s_i in zip(weights, lora_bs, biases, scales, _split(s, lora_as), strict=True):
                bias = None if bias is None else bias.to(dtype)
                y = ops.seeded_matmul(rows, dense(w, dtype).t(), s_i, b.to(dtype).t(), scale, bias, 0.0, None)  # [M, N]
                # no view in autograd's eyes: whoever gets it may change it in place, as nn.Linear's output
                ys.append(torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1])))
            needs = ctx.needs_input_grad[5:]
            needs_a, needs_b = any(needs[count : 2 * count]), any(needs[2 * count : 3 * count])
            kept = (x if needs_a else None, s if needs_b else None, seed)
            ctx.save_for_backward(*kept, *mains, *lora_as, *lora_bs, *others)
            ctx.scales, ctx.dropout, ctx.layouts, ctx.x_shape = scales, dropout, layouts, x.shape
            if count > 1:
                ctx.set_materialize_grads(False)  # to tell a member whose output was not used: it gets no gradient
            ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
            return tuple(ys)

        @staticmethod
        @once_differentiable
        @_without_autocast
        def backward(ctx: Any, saved: Sequence[Any], *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            scales, dropout, count = ctx.scales, ctx.dropout, len(ctx.scales)
            x, s, seed, *members = saved
            mains, lora_as, lora_bs = (members[i * count : (i + 1) * count] for i in range(3))
            others = members[3 * count :]
            weights = nf4.join(mains, others, ctx.layouts)
            needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
            needs_a, needs_b, needs_bias = (
                [need and dy is not None for need, dy in zip(needs[i * count : (i + 1) * count], dys, strict=True)]
                for i in (1, 2, 3)
            )
            rows = _rows(dys, lora_bs)  # each [M, N]
            if not rows:
                return (None,) * (5 + 4 * count + len(others))
            dtype = rows[0].dtype
            dx: Tensor | None = None
            das: Sequence[Tensor | None] = [None] * count
            dbs: list[Tensor | None] = [None] * count
            dss: list[Tensor] = []  # each [M, R]
            if any(needs_b):
                for i, s_i in enumerate(_split(s, lora_as)):
                    ds, dbs[i] = ops.output_grads(rows[i], lora_bs[i].to(dtype), s_i, scales[i], lora_bs[i].dtype)
                    dss.append(ds)
            elif needs_x or any(needs_a):
                for dy, b, scale in zip(rows, lora_bs, scales, strict=True):
                    dss.append(ops.project(dy, b.to(dtype).t(), scale, 0.0, None))
            if needs_x or any(needs_a):
                stacked = stack(dss, dim=1)  # [M, sum of R]
                mask = None if seed is None else ops.make_mask(seed, len(stacked), lora_as[0].shape[1], dropout)
            if needs_x:
                a = stack(lora_as).to(dtype)
                w = dense(weights[0], dtype)
                dx = ops.seeded_matmul(rows[0], w, stacked, a, 1.0, None, dropout, mask)  # [M, K]
                for dy, weight in zip(rows[1:], weights[1:], strict=True):
                    dx.addmm_(dy, dense(weight, dtype))
                dx = dx.reshape(ctx.x_shape)
            if any(needs_a):
                x = x.reshape(-1, x.shape[-1])
                da = ops.factor_grad(stacked, x, dropout, mask, lora_as[0].dtype)  # [sum of R, K]
                das = [d if need else None for d, need in zip(da.split(_ranks(lora_as)), needs_a, strict=True)]
            dbs = [db if need else None for db, need in zip(dbs, needs_b, strict=True)]
            dbiases = [
                dy.sum(0).to(bias_dtype) if need else None
                for dy, bias_dtype, need in zip(rows, ctx.bias_dtypes, needs_bias, strict=True)
            ]
            return dx, None, None, None, None, *([None] * count), *das, *dbs, *dbiases, *([None] * len(others))

    return LoRALinear


def _without_autocast(backward: Backward) -> Backward:
    """Forward has settled the dtypes; people call `loss.backward()` where autocast would change some of them."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, saved: Sequence[Any], *dys: Tensor | None) -> Any:
        device = next((dy.device for dy in dys if dy is not None), None)
        if device is None or autocast_dtype(device) is None:
            return backward(ctx, saved, *dys)
        with torch.autocast(device.type, enabled=False):
            return backward(ctx, saved, *dys)

    return cast(Backward, wrapped)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device; None where it is off, or there is none, as on "meta"."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


def apply(
    function: type[Function],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float,
    seed: int | Tensor | None,
) -> tuple[Tensor, ...]:
    """Checks, autocast and seed; then the Function."""
    x = checked(x, weights, lora_as, lora_bs, scales, biases, dropout)
    mask_seed = as_seed(seed, x.device) if dropout > 0 else None
    mains, others, layouts = nf4.split([nf4.as_weight(weight) for weight in weights])
    members = (*mains, *lora_as, *lora_bs, *biases, *others)
    ys: tuple[Tensor, ...] = function.apply(x, mask_seed, tuple(scales), dropout, layouts, *members)
    return ys


def checked(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float,
) -> Tensor:
    """x in the dtype to compute in. Raises ValueError for what does not fit."""
    check_group(weights, lora_as, lora_bs, scales, biases)
    frozen = [nf4.as_weight(weight) for weight in weights]
    autocast = autocast_dtype(x.device)
    if autocast is not None and x.dtype != torch.float64:
        x = x.to(autocast)
    else:
        for weight in frozen:
            if isinstance(weight, Tensor) and x.dtype != weight.dtype:
                raise ValueError(
                    f"x is {x.dtype} but weight is {weight.dtype}: cast one of them, or use torch.autocast."
                )
    for weight, a, b, bias in zip(frozen, lora_as, lora_bs, biases, strict=True):
        check_lora_linear(x, weight, a, b, bias, dropout)
    return x


def _rows(dys: Sequence[Tensor | None], lora_bs: Sequence[Tensor]) -> list[Tensor]:
    """Each dY as [M, N]: zeros for a member whose output was not used, nothing at all if none was."""
    used = [dy for dy in dys if dy is not None]
    if not used:
        return []
    rows = used[0].numel() // used[0].shape[-1]
    return [
        used[0].new_zeros(rows, len(b)) if dy is None else dy.reshape(-1, dy.shape[-1])
        for dy, b in zip(dys, lora_bs, strict=True)
    ]


def stack(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _ranks(lora_as: Sequence[Tensor]) -> list[int]:
    return [a.shape[0] for a in lora_as]


def _split(s: Tensor, lora_as: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of S [M, sum of R] that belong to each member."""
    parts: tuple[Tensor, ...] = s.split(_ranks(lora_as), dim=1)
    return parts

"""Argument checks shared by every implementation of an op: one sentence each, raised before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .nf4 import NF4, Weight

ROUNDINGS = ("nearest", "stochastic")
NF4_ROUNDINGS = ("activation", "nearest", "stochastic")


def check_lora_linear(
    x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, dropout: float
) -> None:
    check_factors(weight, lora_a, lora_b)
    frozen = weight.codes if isinstance(weight, NF4) else weight
    if not x.device == frozen.device == lora_a.device == lora_b.device:
        devices = ", ".join(str(t.device) for t in (x, frozen, lora_a, lora_b))
        raise ValueError(f"x, weight, lora_a and lora_b are on {devices}: move them to one device.")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, but weight [N, K] = [{n}, {k}] needs x [..., {k}].")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {list(bias.shape)}, but weight has {n} rows: bias must be [{n}].")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, but it must be at least 0 and less than 1.")
    if isinstance(weight, NF4):
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}, but must be floating point.")
    elif weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but lora_linear treats it as frozen: weight.requires_grad_(False)."
        )


def check_group(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
) -> None:
    counts = [len(part) for part in (weights, lora_as, lora_bs, scales, biases)]
    if counts[0] < 1 or len(set(counts)) > 1:
        raise ValueError(f"weights, lora_as, lora_bs, scales and biases have lengths {counts}: give one each a member.")
    dtypes = {a.dtype for a in lora_as}
    if len(dtypes) > 1:
        raise ValueError(f"lora_as have dtypes {sorted(map(str, dtypes))}, but a group stacks them: use one dtype.")


def check_gates(
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    es: Sequence[Tensor | None],
    cs: Sequence[Tensor | None],
) -> None:
    counts = [len(part) for part in (lora_bs, biases, es, cs)]
    if len(set(counts)) > 1:
        raise ValueError(f"lora_bs, biases, es and cs have lengths {counts}: give one each a member, None for no gate.")
    for b, bias, e, c in zip(lora_bs, biases, es, cs, strict=True):
        n, r = b.shape if b.dim() == 2 else (0, 0)
        for name, gate, size in (("e", e, r), ("c", c, n)):
            if gate is not None and (tuple(gate.shape) != (size,) or not gate.is_floating_point()):
                raise ValueError(
                    f"{name} is {gate.dtype} {list(gate.shape)}, but lora_b {list(b.shape)} needs a floating-point "
                    f"gate [{size}]."
                )
        if bias is not None and c is not None and tuple(bias.shape) != (n,):
            raise ValueError(f"bias has shape {list(bias.shape)}, but weight has {n} rows: bias must be [{n}].")


def check_merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, rounding: str, c: Tensor | None) -> None:
    check_factors(weight, lora_a, lora_b)
    if c is not None and tuple(c.shape) != (weight.shape[0],):
        raise ValueError(f"c has shape {list(c.shape)}, but weight has {len(weight)} rows: c must be [{len(weight)}].")
    if not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype}, but merge_ folds into bf16, fp16, fp32 or fp64 weights.")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}, but it must be one of {', '.join(ROUNDINGS)}.")


def check_nf4_merge(
    weight: NF4,
    lora_a: Tensor,
    lora_b: Tensor,
    rounding: str,
    second_moment: Tensor | None,
    held_out: Tensor | None,
    carry_rank: int,
) -> None:
    check_factors(weight, lora_a, lora_b)
    if rounding not in NF4_ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}, but it must be one of {', '.join(NF4_ROUNDINGS)}.")
    if second_moment is None and (rounding == "activation" or carry_rank):
        raise ValueError(
            "second_moment is None, but activation rounding and carries need the mean of x xᵀ over inputs."
        )
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not bool(factor.isfinite().all()):
            raise ValueError(f"{name} is not finite: there is no update to fold.")
    k = weight.shape[1]
    for name, moment in (("second_moment", second_moment), ("held_out", held_out)):
        if moment is not None and tuple(moment.shape) != (k, k):
            raise ValueError(f"{name} has shape {list(moment.shape)}, but weight has {k} columns: expected [{k}, {k}].")
        if moment is not None and not bool(moment.isfinite().all()):
            raise ValueError(f"{name} is not finite: leave out the batch whose activations overflowed.")


def check_factors(weight: Weight, lora_a: Tensor, lora_b: Tensor) -> None:
    if len(weight.shape) != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError(
            f"weight, lora_a and lora_b must be matrices, but have shapes {list(weight.shape)}, "
            f"{list(lora_a.shape)} and {list(lora_b.shape)}."
        )
    n, k = weight.shape
    r = lora_a.shape[0]
    if r < 1 or lora_a.shape[1] != k or tuple(lora_b.shape) != (n, r):
        raise ValueError(
            f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit weight [N, K] = [{n}, {k}]: "
            f"expected lora_a [R, {k}] and lora_b [{n}, R] with R >= 1."
        )

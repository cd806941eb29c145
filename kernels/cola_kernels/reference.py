"""The ops in plain PyTorch: the specification of the Triton kernels, and the path a CPU takes.

    Y  = X Wᵀ + scale · S Bᵀ + bias        S  = drop(X) Aᵀ
    dX = dY W + undrop(dS A)               dS = scale · dY B
    dA = dSᵀ drop(X)                       dB = scale · dYᵀ S

Letters: M tokens, K in_features, N out_features, R rank; x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R].
`autograd.py` puts the four primitives below together and says what is kept for backward.
Any float dtype works, float64 included, which is how the other implementations are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, gates, nf4_cpu
from .checks import check_merge
from .philox import DRAW_RANGE, as_seed, draws, dropout_threshold, inverse_keep

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


class FoldReport(NamedTuple):
    """What a fold did to one weight, against the update `delta` it was asked to add (Frobenius inner product).

    retained: projection of the change on delta; 1.0 is all of it, 0.0 is nothing.
    error: norm of (change - delta) over norm of delta; 0.0 is exact.
    """

    retained: float
    error: float


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

    Args:
        x: `[..., K]`, floating point.
        weight: `[N, K]`, frozen, of x's dtype (or any float dtype under autocast); or an NF4 weight of bitsandbytes,
            a `Params4bit`, dequantised to x's dtype for as long as one product takes.
        lora_a: `[R, K]`, any float dtype; used in x's dtype, its gradient comes back in its own.
        lora_b: `[N, R]`, likewise.
        scale: alpha / R.
        bias: `[N]` or None.
        dropout: probability in [0, 1) that an element of x is left out of the low-rank branch.
        seed: of the dropout mask: an int, an int64 scalar tensor on x's device, or None to draw one from torch's
            generator. Ignored without dropout.
        e: `[R]`, a gate on the inner product, any float dtype; None costs nothing.
        c: `[N]`, a gate on the output but for the bias, any float dtype, used in fp32 at least; None costs nothing.
            Where it needs a gradient, the output without it is kept for backward.

    Returns:
        `[..., N]` in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes or dtypes that do not fit, dropout outside [0, 1), a weight that requires a gradient; of
            quantised weights, what is not NF4, or was repacked for the CPU (`unpack_nf4_`).
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

    The arguments are those of `lora_linear`, one entry a member; N and R may differ between members, K may not. The
    members share one dropout mask: each result is what `lora_linear` gives with the same seed. es and cs are the gates;
    None for none.

    Returns:
        One `[..., N]` a member.

    Raises:
        ValueError: as `lora_linear`; lists of different lengths, or lora_as of different dtypes.
    """
    ungated = partial(autograd.apply, FUNCTION, dropout=dropout, seed=seed)
    if es is None and cs is None:
        return ungated(x, weights, lora_as, lora_bs, scales, biases)
    return gates.apply(ungated, GATE, x, weights, lora_as, lora_bs, scales, biases, es, cs)


def make_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """int16 [rows, columns]: every bit set where an element is kept, none where it is dropped."""
    return draws(seed, rows, columns).ge_(dropout_threshold(dropout) - DRAW_RANGE // 2).neg_()


def project(x: Tensor, a: Tensor, scale: float, dropout: float, mask: Tensor | None) -> Tensor:
    s = F.linear(_zero(x, mask), a)  # [M, R]
    scale *= inverse_keep(dropout)
    return s if scale == 1 else s * scale


def seeded_matmul(
    x: Tensor,
    w: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    mask: Tensor | None,
) -> Tensor:
    """The low-rank term first, to which the large product is added before anything is rounded to 16 bits. The other way
    round most of a young link's term would be lost: it is smaller than half the spacing of a Y that is rounded already.
    So it would be beside a bias, which comes last.

    In place, in memory that no mm returned: whoever caches products, as selective checkpointing, forbids a change.
    """
    y = _product(u, v, scale * inverse_keep(dropout))  # [M, P]
    if mask is not None:
        _bits(y).bitwise_and_(mask)
    y.addmm_(x, w)
    return y if bias is None else y.add_(bias)


def output_grads(dy: Tensor, b: Tensor, s: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    ds = _product(dy, b, scale)  # [M, R]
    db = _product(s.t(), dy, scale).to(dtype)  # [R, N]: on a CPU the wide result is the faster one
    return ds, db.t()


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale · a b`, in one launch."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def factor_grad(ds: Tensor, x: Tensor, dropout: float, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    da = torch.mm(ds.t(), _zero(x, mask)).to(dtype)  # [R, K]
    return da if mask is None else da.mul_(inverse_keep(dropout))


FUNCTION = autograd.make_function(
    autograd.Primitives(make_mask, project, seeded_matmul, output_grads, factor_grad, nf4_cpu.dequantize)
)
GATE = gates.make_gate(gates.gate_grads)


def _zero(x: Tensor, mask: Tensor | None) -> Tensor:
    """Dropout of x `[M, K]` but for its factor, which goes to something smaller."""
    return x if mask is None else (_bits(x) & mask).view(x.dtype)


def _bits(x: Tensor) -> Tensor:
    """x's memory as integers: a CPU masks them several times faster than `masked_fill` does."""
    return x.view(_INTEGERS[x.element_size()])


def dropout_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """True where an element is kept. The probability is rounded to a multiple of 2**-16."""
    return make_mask(seed, rows, columns, dropout) != 0


TILE_ELEMENTS = 1 << 16  # of the fp32 tile merge_ works in, 256 KiB: all temporaries stay small, and in a CPU's cache


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
    """`weight = c ⊙ (weight + scale · B A)` in place, by tiles, rounded once from fp32 (fp64 for an fp64 weight).

    Args:
        weight: `[N, K]` bf16, fp16, fp32 or fp64; any strides; changed in place, its storage stays.
        lora_a: `[R, K]`.
        lora_b: `[N, R]`.
        rounding: "nearest", or "stochastic": up or down with the probability that makes the expectation exact.
        seed: of stochastic rounding; the same seed gives the same weight again.
        first_row: where weight and lora_b are some rows of a larger matrix, the number of the first: they are rounded
            with the draws that they have there.
        report: also measure what the weight's dtype kept of the update.
        c: `[N]`, a factor of each row; None for 1.

    Raises:
        ValueError: shapes that do not fit, a dtype that is not floating point, an unknown rounding.
    """
    check_merge(weight, lora_a, lora_b, rounding, c)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b, key = lora_a.detach().to(wide), lora_b.detach().to(wide), as_seed(seed, weight.device)
    dropped = DROPPED_BITS.get(weight.dtype, 0) if rounding == "stochastic" else 0

    def fold(rows: slice) -> tuple[Tensor, ...]:
        tile = weight.detach()[rows]
        before = tile.to(wide, copy=True)
        target = torch.addmm(before, b[rows], a, alpha=scale)
        if c is not None:
            target *= c.detach()[rows, None].to(wide)
        gated = target - before if report and c is not None else None
        tile.copy_(_round_stochastic_(target, dropped, key, first_row + rows.start) if dropped else target)
        if not report:
            return ()
        delta = torch.mm(b[rows], a).mul_(scale) if gated is None else gated
        change = target.copy_(tile).sub_(before)
        along, delta_sq = _inner(change, delta), _inner(delta, delta)
        return along, delta_sq, _inner(change.sub_(delta), change)

    n, k = weight.shape
    step = max(1, TILE_ELEMENTS // max(k, 1))
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        sums = [fold(slice(first, min(first + step, n))) for first in range(0, n, step)]
    if not report:
        return None
    return fold_report(*(torch.stack(part).sum() for part in zip(*sums, strict=True))) if sums else FoldReport(1.0, 0.0)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """The Frobenius product of two tiles, without a temporary of their size."""
    return torch.dot(left.view(-1), right.view(-1)).double()


def fold_report(along: Tensor, delta_sq: Tensor, error_sq: Tensor) -> FoldReport:
    """From the sums over a weight of change · delta, delta² and (change - delta)²."""
    if float(delta_sq) == 0:
        return FoldReport(retained=1.0, error=0.0)
    return FoldReport(float(along / delta_sq), float((error_sq / delta_sq).sqrt()))


DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of fp32's mantissa


def _round_stochastic_(value: Tensor, dropped: int, seed: Tensor, first_row: int) -> Tensor:
    """Round fp32 `[rows, K]`, in place, to what is left of it without its last `dropped` bits, away from zero with
    probability distance / spacing.

    A draw is added to the bits that there is no room for, and what is left of them is cut off: the carry is the
    rounding. Below fp16's smallest normal number, 6.1e-5, the conversion that follows rounds to nearest.
    """
    draw = draws(seed, value.shape[0], value.shape[1], first_row=first_row)  # less 2**15, which the second sum adds
    bits = value.view(torch.int32).add_(draw >> 16 - dropped if dropped < 16 else draw)
    bits.add_(1 << dropped - 1).bitwise_and_(-(1 << dropped))
    return value

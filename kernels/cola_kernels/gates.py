"""The two diagonal gates of a LoRA linear: `y = c ⊙ (x Wᵀ + scale · ((drop(x) Aᵀ) ⊙ e) Bᵀ) + bias`.

They lie around the ungated op, which stays as it is: a call without gates runs the same code and kernels as ever.

e [R] on the inner product goes into B, since (S diag(e)) Bᵀ = S (B diag(e))ᵀ: N R multiplications, and no pass over
tokens. They are done in fp32 at least, before the one rounding to x's dtype that B takes anyway, so that a gated
product is no less exact than another. PyTorch's autograd finds de from dB.

c [N] on the output is one pass over it, and one in backward, which takes everything from one read of dY and Y0:

    Y   = c ⊙ Y0 + bias          Y0 = x Wᵀ + scale · S Bᵀ
    dY0 = dY ⊙ c                 dc = Σ_m dY ⊙ Y0

Y0 [M, N] is kept for backward, and only if c is trained. To make it again would cost a GEMM, half of the forward and
backward of a frozen layer. To find it from Y = c ⊙ Y0 + bias, which whoever reads Y may be keeping anyway, fails where
c is near 0, cancels where the bias is large, and forbids changing Y in place.

c is used in fp32 whatever x's dtype: next to 1, where it starts in DoRA, bf16 knows only steps of 0.4 % and 0.8 %. But
Y0 has been rounded by then, so that in bf16 a c within 0.2 % of 1 still gives Y0 back. Only a GEMM that applies c to
its fp32 accumulator would show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .checks import check_gates
from .once import once_differentiable

# dY and Y0 [M, N], c [N] -> dY ⊙ c in dY's dtype, and Σ_m dY ⊙ Y0 in c's.
GateGrads = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def make_gate(gate_grads: GateGrads) -> type[Function]:
    """The Function (Y0 [..., N], c, bias or None) -> Y over a backend's `gate_grads`."""

    class OutputGate(Function):
        @staticmethod
        def forward(ctx: Any, y0: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
            ctx.save_for_backward(y0 if ctx.needs_input_grad[1] else None, c)
            ctx.bias_dtype = None if bias is None else bias.dtype
            return _times(y0, c, bias)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Tensor | None, ...]:
            y0, c = saved
            dc = None
            if y0 is None:
                dy0 = _times(dy, c, None) if ctx.needs_input_grad[0] else None
            else:
                n = len(c)
                dy0, dc = gate_grads(dy.reshape(-1, n), y0.reshape(-1, n), c)
                dy0 = dy0.view(y0.shape)
            dbias = dy.reshape(-1, len(c)).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            return dy0, dc, dbias

    return OutputGate


def apply(
    group: Callable[..., tuple[Tensor, ...]],
    gate: type[Function],
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    es: Sequence[Tensor | None] | None,
    cs: Sequence[Tensor | None] | None,
) -> tuple[Tensor, ...]:
    """`group`, a lora_linear_group without gates, with each member's gates around it."""
    absent = [None] * len(lora_bs)
    es, cs = (absent if gates is None else gates for gates in (es, cs))
    check_gates(lora_bs, biases, es, cs)
    bs = [b if e is None else _into(b, e) for b, e in zip(lora_bs, es, strict=True)]
    inner = [bias if c is None else None for bias, c in zip(biases, cs, strict=True)]
    ys = group(x, weights, lora_as, bs, scales, inner)
    return tuple(y if c is None else gate.apply(y, c, bias) for y, c, bias in zip(ys, cs, biases, strict=True))


def gate_grads(dy: Tensor, y0: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """In plain PyTorch; sums in fp32 at least."""
    wide = torch.promote_types(torch.promote_types(dy.dtype, c.dtype), torch.float32)
    return _times(dy, c, None), (dy.to(wide) * y0).sum(0).to(c.dtype)


def _into(b: Tensor, e: Tensor) -> Tensor:
    """B diag(e) [N, R]."""
    wide = torch.promote_types(torch.promote_types(b.dtype, e.dtype), torch.float32)
    return b.to(wide) * e


def _times(y: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """`c ⊙ y + bias` in y's dtype, rounded once: PyTorch computes in the widest dtype of its operands."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    return torch.mul(y, c, out=out) if bias is None else torch.addcmul(bias, y, c, out=out)

"""The LoRA linear where launching is what costs: plain PyTorch under PyTorch's own autograd.

With little work to do, a GPU waits for the host. Then neither the fewest bytes nor the fewest kernels count but the
least Python: an autograd Function with Triton launches takes 0.2 ms of the host for a forward and backward whatever the
size; these few calls, whose backward is PyTorch's in C++, a third of it. Operands stay in the GPU's cache meanwhile.

The products are those of `reference`, in its order, without dropout, whose mask would take dozens of launches. Beside x
and S, S times its scale and the factors as cast to the dtype of x are kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import checked, stack

# Multiply-adds of the forward product: at 700 TFLOP/s, 0.2 ms of forward and backward. Not measured yet on a GPU;
# `python -m benchmarks run kernels` finds where the two ways cross.
LAUNCH_BOUND = 1 << 35


def is_small(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """NF4 weights never are: PyTorch's autograd would keep what they are dequantised to."""
    if not all(weight.is_floating_point() for weight in weights):
        return False
    return x.numel() * sum(weight.shape[0] for weight in weights) < LAUNCH_BOUND


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """As `reference.lora_linear_group` without dropout."""
    x = checked(x, weights, lora_as, lora_bs, scales, biases, 0.0)
    dtype = x.dtype
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    s = F.linear(rows, stack(lora_as).to(dtype))  # [M, sum of R]
    parts = s.split([a.shape[0] for a in lora_as], dim=1) if len(lora_as) > 1 else (s,)
    ys = []
    for s_i, weight, b, scale, bias in zip(parts, weights, lora_bs, scales, biases, strict=True):
        c0 = F.linear(s_i if scale == 1 else s_i * scale, b.to(dtype))
        # [M, N]; not in place: selective checkpointing may have kept C0
        y = torch.addmm(c0, rows, weight.to(dtype).t())
        y = y if bias is None else y + bias.to(dtype)
        ys.append(y.view(*x.shape[:-1], y.shape[-1]))
    return tuple(ys)

"""Seeded noise on a weight while it computes, without touching it: `y += x Eᵀ`, E Gaussian, [N, K].

Adding E to a 16-bit or 4-bit weight and subtracting it again would not give the weight back. As a term of its own it
needs no copy: E is drawn for one layer at a time, used, forgotten, and drawn again from its seed in backward. It costs
a matrix product as large as the weight's own, forward and backward, and drawing N·K numbers, twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Noise(torch.autograd.Function):
    """y [..., N] + x [..., K] @ Eᵀ, row i of E with standard deviation spread[i]. Keeps spread [N] and the seed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, spread: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(spread)
        ctx.seed, ctx.shape, ctx.dtype = seed, (len(spread), x.shape[-1]), x.dtype
        return y + (x @ _draw(seed, ctx.shape, x).t() * spread).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (dy,) = gradients
        (spread,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return dy, None, None, None
        scaled = (dy * spread).to(ctx.dtype)
        return dy, scaled @ _draw(ctx.seed, ctx.shape, scaled), None, None


class WeightNoise:
    """A forward hook. As long as it is registered, the layer computes as if its weight were `W + E`, backward too."""

    def __init__(self, spread: Tensor, seed: int) -> None:
        self.spread, self.seed = spread, seed

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        noisy: Tensor = _Noise.apply(y, inputs[0], self.spread.to(y.dtype), self.seed)
        return noisy


def _draw(seed: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

"""Three layers that read the same x, and a comparison with the same layers alone.

"Alone" is a model with a `Grouping` for each layer, which never groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cola_fast.layers.grouping import Grouping
from cola_fast.layers.layer import LoRALinear


def separate(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.grouping = Grouping()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def chain_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def zero_grad(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


class Three(nn.Module):
    """q, k and v of the same x, in fp64."""

    def __init__(self, width: int = 6, dropout: float = 0.25) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = Grouping()
        for name in "qkv":
            setattr(self, name, LoRALinear.from_linear(nn.Linear(width, width, dtype=torch.float64), name, shared))
        for layer in self.layers():
            layer.requires_grad_(False)
            factors = torch.randn(2, width, width, dtype=torch.float64)
            layer.open(*factors, scale=0.5, dropout=dropout)

    def layers(self) -> list[LoRALinear]:
        return [self.q, self.k, self.v]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]

    def learn(self) -> Three:
        """After this the three run together."""
        for _ in range(2):
            self(torch.ones(1, self.q.in_features, dtype=torch.float64))
        return self

    def alone(self) -> Three:
        return separate(copy.deepcopy(self))


def compare(forward: Callable[[Three, Tensor], list[Tensor]], *, backward: bool = True, allowed: float = 1e-12) -> None:
    """`forward` on a net which has learned its group, and on one which has none: the same outputs and gradients."""
    grouped = Three().learn()
    alone = grouped.alone()
    for _ in range(3):
        results = []
        for net in (grouped, alone):
            zero_grad(net)
            x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
            leaf = x.clone().requires_grad_(backward)
            ys = forward(net, leaf * 1)
            if backward:
                sum((i + 1) * y.double().square().sum() for i, y in enumerate(ys)).backward()
            results.append([*(y.detach() for y in ys), leaf.grad, *gradients(net).values()])
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                assert error(one, other) < allowed

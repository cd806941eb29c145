"""LoRA linears as this library and others compute them, set side by side: what they are given, and the parity gate.

A problem is what one benchmark case computes forward and backward: groups of linears that read the same x. A single
layer is one group of one; a block of a Llama is four groups (q k v, o, gate up, down).

    frozen        the plain products, forward and dX: the floor
    ours          cola_kernels.lora_linear, or lora_linear_group where several members share x; fp32 factors
    reference     the same in plain PyTorch, on the same device; fp32 factors
    peft          PEFT as get_peft_model makes it, under autocast to the dtype of x: fp32 adapters
    peft_half     PEFT with autocast_adapter_dtype=False: adapters in the dtype of x, no autocast
    unsloth, lorafusion    their op for one linear, called for each, where the package is installed; half adapters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cola_kernels
from cola_kernels.philox import DRAW_RANGE, as_seed
from cola_kernels.reference import dropout_mask

from . import harness

ALPHA = 32.0


class Member(NamedTuple):
    weight: Tensor  # [N, K]
    a: Tensor  # [R, K] fp32
    b: Tensor  # [N, R] fp32
    dy: Tensor  # [M, N]


class Group(NamedTuple):
    x: Tensor  # [M, K], wants a gradient
    members: list[Member]


@dataclass(frozen=True)
class Problem:
    groups: list[Group]
    rank: int
    dropout: float

    @classmethod
    def draw(
        cls, groups: Sequence[Sequence[tuple[int, int]]], tokens: int, rank: int, dropout: float, dtype: torch.dtype
    ) -> Problem:
        """`groups`: the (N, K) of the members of each."""
        device = harness.device()

        def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype).mul_(std)

        drawn = []
        for shapes in groups:
            members = [
                Member(
                    normal(n, k, std=k**-0.5),
                    normal(rank, k, std=k**-0.5, dtype=torch.float32),
                    normal(n, rank, std=n**-0.5, dtype=torch.float32),
                    normal(tokens, n),
                )
                for n, k in shapes
            ]
            drawn.append(Group(normal(tokens, shapes[0][1]).requires_grad_(), members))
        return cls(drawn, rank, dropout)

    @property
    def scale(self) -> float:
        return ALPHA / self.rank

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]

    @property
    def bytes(self) -> int:
        return sum(group.x.nbytes for group in self.groups) + sum(t.nbytes for m in self.members for t in m)


@dataclass(frozen=True)
class Side:
    """`forward()` gives every member's y [M, N] in order; `leaves`: each group's x, then a and b of each member.

    `noise()` is what dropout will multiply each member's x by, if torch's generator is as it is now.
    """

    forward: Callable[[], list[Tensor]]
    leaves: list[Tensor]
    noise: Callable[[], list[Tensor]]

    def passes(self, problem: Problem) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """One forward and one backward pass: every y, and the gradient of every leaf."""
        ys = self.forward()
        return ys, torch.autograd.grad(
            ys, self.leaves, [m.dy.view_as(y) for m, y in zip(problem.members, ys, strict=True)]
        )


def frozen(problem: Problem) -> None:
    """Forward and dX of the plain linears."""
    with torch.no_grad():
        for group in problem.groups:
            for weight, _, _, dy in group.members:
                torch.mm(group.x, weight.t())
                torch.mm(dy, weight)


def ours(problem: Problem, library: Any = cola_kernels) -> Side:
    """`library`: cola_kernels, or cola_kernels.reference."""
    factors = [_leaves(problem.members[i:j], torch.float32) for i, j in _spans(problem)]

    def forward() -> list[Tensor]:
        ys: list[Tensor] = []
        for (x, members), pairs in zip(problem.groups, factors, strict=True):
            weights, (a, b) = [m.weight for m in members], zip(*pairs, strict=True)
            if len(members) == 1:
                ys.append(library.lora_linear(x, weights[0], a[0], b[0], problem.scale, dropout=problem.dropout))
            else:
                scales, biases = [problem.scale] * len(members), [None] * len(members)
                ys += library.lora_linear_group(x, weights, a, b, scales, biases, dropout=problem.dropout)
        return ys

    def noise() -> list[Tensor]:
        one_each = [(our_noise(group.x.detach(), dropout=problem.dropout), group) for group in problem.groups]
        return [noise for noise, group in one_each for _ in group.members]

    return Side(forward, _all_leaves(problem, [pair for pairs in factors for pair in pairs]), noise)


def peft(problem: Problem, *, fp32_adapters: bool = True) -> Side:
    linears = [_linear(member.weight) for member in problem.members]
    factors = [(m.a, m.b) for m in problem.members]
    layers = peft_layers(linears, factors, ALPHA, problem.dropout, fp32_adapters=fp32_adapters)
    xs = [group.x for group in problem.groups for _ in group.members]

    def forward() -> list[Tensor]:
        with torch.autocast(xs[0].device.type, xs[0].dtype, enabled=fp32_adapters):
            return [layer.module(x) for layer, x in zip(layers, xs, strict=True)]

    def noise() -> list[Tensor]:
        return [layer.noise(x.detach()) for layer, x in zip(layers, xs, strict=True)]

    return Side(forward, _all_leaves(problem, [(layer.lora_a, layer.lora_b) for layer in layers]), noise)


def unsloth(problem: Problem) -> Side:
    from unsloth.kernels.fast_lora import LoRA_W

    def op(x: Tensor, member: Member, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = LoRA_W.apply(x[None], member.weight, None, a, b, problem.scale)
        return y[0]

    return _by_op(problem, op, "Unsloth's op has no dropout")


def lorafusion(problem: Problem) -> Side:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def op(x: Tensor, member: Member, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = fused_linear_lora(x[None], member.weight, a, b, problem.scale)
        return y[0]

    return _by_op(problem, op, "LoRAFusion's mask cannot be had from outside, so there is no parity to check")


def _by_op(problem: Problem, op: Callable[[Tensor, Member, Tensor, Tensor], Tensor], no_dropout: str) -> Side:
    if problem.dropout:
        raise harness.NotComparable(no_dropout)
    factors = _leaves(problem.members, problem.groups[0].x.dtype)
    xs = [group.x for group in problem.groups for _ in group.members]

    def forward() -> list[Tensor]:
        return [op(x, m, a, b) for x, m, (a, b) in zip(xs, problem.members, factors, strict=True)]

    return Side(forward, _all_leaves(problem, factors), lambda: [torch.ones_like(x) for x in xs])


SIDES: dict[str, Callable[[Problem], Side]] = {
    "ours": ours,
    "reference": partial(ours, library=cola_kernels.reference),
    "peft": peft,
    "peft_half": partial(peft, fp32_adapters=False),
    "unsloth": unsloth,
    "lorafusion": lorafusion,
}


# --- the gate ---------------------------------------------------------------------------------------------------------


def check(what: str, side: Side, problem: Problem) -> float:
    """The parity gate: every output and gradient against fp64, with the very same dropout mask.

    Returns the worst error in units of what the rule allows. Raises ParityError.
    """
    torch.manual_seed(0)
    noises = side.noise()
    torch.manual_seed(0)
    ys, gradients = side.passes(problem)
    worst, xs = 0.0, len(problem.groups)
    for g, (start, stop) in enumerate(_spans(problem)):
        found = {"dX": gradients[g]}
        for i in range(start, stop):
            names = (f"y{i}", f"dA{i}", f"dB{i}")
            found |= zip(names, (ys[i], *gradients[xs + 2 * i : xs + 2 * i + 2]), strict=True)
        plain = [_plain(problem, g, start, noises[start:stop], dtype) for dtype in (found["dX"].dtype, torch.float64)]
        worst = max(worst, *harness.require_parity(what, found, *plain).values())
    return worst


def _plain(problem: Problem, g: int, first: int, noises: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """One group by the formula in plain PyTorch, everything in `dtype`."""
    x, members = problem.groups[g]
    x = x.detach().to(dtype).requires_grad_()
    factors = _leaves(members, dtype)
    ys = [
        F.linear(x, m.weight.to(dtype)) + problem.scale * F.linear(F.linear(x * noise.to(dtype), a), b)
        for m, (a, b), noise in zip(members, factors, noises, strict=True)
    ]
    leaves = [x, *(factor for pair in factors for factor in pair)]
    dx, *gradients = torch.autograd.grad(ys, leaves, [m.dy.to(dtype) for m in members])
    found = {"dX": dx}
    for i, y in enumerate(ys):
        found |= {
            f"y{first + i}": y.detach(),
            f"dA{first + i}": gradients[2 * i],
            f"dB{first + i}": gradients[2 * i + 1],
        }
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(side: Side, problem: Problem) -> int:
    """What one forward pass keeps for backward beside weights and factors: activations, x among them."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = side.forward()
    parameters = [*(m.weight for m in problem.members), *side.leaves[len(problem.groups) :]]
    del ys
    return sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in parameters)


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """The most that one call of `work` holds beyond what was there before; None on a CPU, where nobody counts it."""
    if not torch.cuda.is_available():
        return None
    work()  # workspaces
    harness.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    harness.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- pieces -----------------------------------------------------------------------------------------------------------


class PeftLayer(NamedTuple):
    module: nn.Module
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def noise(self, x: Tensor) -> Tensor:
        """What its dropout will multiply x by, if torch's generator is as it is now. In fp32: a GPU multiplies 16-bit
        elements by 1 / (1 - p) before it rounds them."""
        layer: Any = self.module
        dropout = layer.lora_dropout["default"]
        kept: Tensor = dropout(torch.ones_like(x, dtype=self.lora_a.dtype)).ne(0)
        return kept.float() / (1 - getattr(dropout, "p", 0.0))


def peft_layers(
    linears: Sequence[nn.Linear],
    factors: Sequence[tuple[Tensor, Tensor]],
    alpha: float,
    dropout: float,
    *,
    fp32_adapters: bool,
) -> list[PeftLayer]:
    """PEFT's LoRA on the linears, with copies of the factors."""
    from peft import LoraConfig, get_peft_model

    names = [f"proj{i}" for i in range(len(linears))]
    rank = factors[0][0].shape[0]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    inner: Any = nn.ModuleDict(dict(zip(names, linears, strict=True)))
    model = get_peft_model(inner, config, autocast_adapter_dtype=fp32_adapters)
    layers = []
    for name, (a, b) in zip(names, factors, strict=True):
        module = model.base_model.model[name]
        layer = PeftLayer(module, module.lora_A["default"].weight, module.lora_B["default"].weight)
        layer.lora_a.data.copy_(a)
        layer.lora_b.data.copy_(b)
        layers.append(layer)
    return layers


def our_noise(x: Tensor, dropout: float) -> Tensor:
    """What our dropout will multiply x by, if torch's generator is as it is now."""
    if dropout == 0:
        return torch.ones_like(x)
    kept = dropout_mask(as_seed(None, x.device), x.shape[:-1].numel(), x.shape[-1], dropout).view_as(x)
    return kept / (1 - round(dropout * DRAW_RANGE) / DRAW_RANGE)  # the probability as `dropout_mask` rounds it


def copies(problem_bytes: int) -> int:
    """How many problems to use in turn so that each finds the cache cold."""
    return max(1, math.ceil(3 * harness.cache_bytes() / problem_bytes))


def _linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _leaves(members: Sequence[Member], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [
        (m.a.detach().to(dtype, copy=True).requires_grad_(), m.b.detach().to(dtype, copy=True).requires_grad_())
        for m in members
    ]


def _all_leaves(problem: Problem, factors: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [*(group.x for group in problem.groups), *(factor for pair in factors for factor in pair)]


def _spans(problem: Problem) -> list[tuple[int, int]]:
    """Of each group's members in the list of all."""
    spans, start = [], 0
    for group in problem.groups:
        spans.append((start, start + len(group.members)))
        start += len(group.members)
    return spans

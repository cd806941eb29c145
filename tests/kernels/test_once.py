"""First derivatives under create_graph, and no second one without a word."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cola_kernels
from cola_kernels import reference

from .conftest import DEVICE, make_problem


@pytest.mark.parametrize("library", [reference, cola_kernels], ids=["reference", "public"])
@pytest.mark.parametrize("gated", [False, True])
def test_second_derivatives_are_refused(library, gated):
    """With respect to the input, by torch.autograd.grad, beside a path that has them: what PyTorch itself lets pass."""
    p = make_problem(5, 12, 8, 2, torch.float64)
    x = p.x.clone().requires_grad_()
    cs = [torch.ones(8, dtype=torch.float64, device=DEVICE)] if gated else None
    (y,) = library.lora_linear_group(x, [p.weight], [p.lora_a], [p.lora_b], [p.scale], [None], cs=cs)
    (first,) = torch.autograd.grad(y.tanh().sum() + x.pow(3).sum(), x, create_graph=True)
    plain = p.x.clone().requires_grad_()
    merged = p.weight + p.scale * p.lora_b @ p.lora_a
    (expected,) = torch.autograd.grad((plain @ merged.t()).tanh().sum() + plain.pow(3).sum(), plain)
    torch.testing.assert_close(first, expected)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


def test_create_graph_under_activation_checkpointing():
    """It lets nobody read what is saved twice."""
    p = make_problem(5, 12, 8, 2, torch.float64)
    x = p.x.clone().requires_grad_()

    def run(x):
        return cola_kernels.lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale)

    (plain,) = torch.autograd.grad(run(x).sum(), x)
    (first,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sum(), x, create_graph=True)
    assert torch.equal(first, plain)


def test_the_factors_have_none_either():
    p = make_problem(5, 12, 8, 2, torch.float64)
    b = p.lora_b.clone().requires_grad_()
    y = cola_kernels.lora_linear(p.x, p.weight, p.lora_a, b, p.scale)
    (first,) = torch.autograd.grad(y.pow(3).sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), b)

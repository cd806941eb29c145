"""The way of little work: plain PyTorch, judged like the kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cola_kernels import reference, small

from .conftest import DEVICE, Problem, assert_within_rule, dtype_id, eager, error, leaves, make_problem, ours

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def one(x, weight, a, b, scale, bias=None, *, dropout=0.0, seed=None):
    (y,) = small.lora_linear_group(x, [weight], [a], [b], [scale], [bias])
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(1, 24, 16, 1), ((3, 21), 130, 70, 8), (0, 24, 16, 4)], ids=str)
def test_matches_fp64(shape, bias, dtype):
    problem = make_problem(*shape, dtype, bias=bias)
    assert_within_rule(ours(one, problem), problem)


def test_a_group_equals_its_members():
    first = make_problem((2, 7), 40, 24, 4, torch.float64, bias=True)
    second = make_problem((2, 7), 40, 16, 6, torch.float64)._replace(x=first.x)
    members = [ours(reference.lora_linear, p) for p in (first, second)]
    x = first.x.clone().requires_grad_()
    (_, a1, b1, bias), (_, a2, b2, _) = leaves(first), leaves(second)
    weights, scales = [first.weight, second.weight], [first.scale, second.scale]
    ys = small.lora_linear_group(x, weights, [a1, a2], [b1, b2], scales, [bias, None])
    torch.autograd.backward(ys, (first.dy, second.dy))
    for y, a, b, member in zip(ys, (a1, a2), (b1, b2), members, strict=True):
        for value, name in ((y.detach(), "y"), (a.grad, "da"), (b.grad, "db")):
            assert error(value, member[name]) < 1e-12
    assert error(bias.grad, members[0]["dbias"]) < 1e-12
    assert error(x.grad, members[0]["dx"] + members[1]["dx"]) < 1e-12


@pytest.mark.parametrize("frozen", ["", "a", "b", "ab", "x"])
def test_keeps_x_s_and_the_cast_factors(frozen):
    p = make_problem((4, 16), 96, 64, 8, torch.bfloat16)
    p = p._replace(lora_a=p.lora_a.float(), lora_b=p.lora_b.float())
    x, a, b, _ = leaves(p)
    x.requires_grad_("x" not in frozen), a.requires_grad_("a" not in frozen), b.requires_grad_("b" not in frozen)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        y = one(x, p.weight, a, b, p.scale)
    kept.pop(p.weight.data_ptr(), None)
    assert (x.data_ptr() in kept) == ("a" not in frozen)
    assert sum(t.nbytes for t in kept.values()) <= x.nbytes + 2 * 8 * (64 + 96 + 64)
    y.backward(p.dy)
    for name, leaf in (("x", x), ("a", a), ("b", b)):
        assert (leaf.grad is None) == (name in frozen)
        assert leaf.grad is None or leaf.grad.dtype == leaf.dtype


def test_autocast_computes_in_its_dtype():
    p = make_problem(32, 48, 40, 4, torch.float32, bias=True)
    x, a, b, bias = leaves(p)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = one(x, p.weight, a, b, p.scale, bias)
    assert y.dtype == torch.bfloat16
    y.backward(p.dy.bfloat16())
    exact, same = eager(p, torch.float64), eager(p, torch.bfloat16)
    for name, value in {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad, "dbias": bias.grad}.items():
        assert error(value, exact[name]) <= 2 * error(same[name], exact[name]) + 1e-6, name


def test_compiles_without_a_graph_break():
    p = make_problem((2, 9), 32, 24, 4, torch.float32, bias=True)
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    expected = ours(one, p)
    for name, value in ours(compiled, p).items():
        assert error(value, expected[name]) < 1e-6, name


def test_checkpointing_changes_nothing():
    p = make_problem(40, 32, 24, 4, torch.float32)
    plain = ours(one, p)
    recomputed = ours(lambda *args, **kwargs: checkpoint(one, *args, use_reentrant=False, **kwargs), p)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_refuses_what_does_not_fit():
    p: Problem = make_problem(4, 12, 8, 2, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        one(p.x, p.weight, p.lora_a, p.lora_b[:5], 1.0)


@pytest.mark.parametrize(("tokens", "expected"), [(100, True), (101, False)])
def test_the_limit_counts_multiply_adds(monkeypatch, tokens, expected):
    monkeypatch.setattr(small, "LAUNCH_BOUND", 100 * 8 * (5 + 6) + 1)
    bs = [torch.zeros(5, 2), torch.zeros(6, 2)]
    assert small.is_small(torch.zeros(tokens, 8), bs) == expected

"""The specification itself: accuracy, gradients, what it keeps for backward, and how it behaves under torch's modes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cola_kernels import reference, small

from .conftest import Problem, assert_within_rule, dtype_id, eager, error, leaves, make_problem, ours

SHAPES = [(1, 24, 16, 1), (63, 130, 70, 8), ((3, 21), 64, 48, 16), (1000, 48, 40, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, dropout, dtype):
    problem = make_problem(*shape, dtype, bias=True, dropout=dropout, device="cpu")
    assert_within_rule(ours(reference.lora_linear, problem), problem)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    p = make_problem((2, 5), 12, 9, 3, torch.float64, bias=True, dropout=dropout, device="cpu")

    def function(x, a, b, bias):
        return reference.lora_linear(x, p.weight, a, b, p.scale, bias, dropout=dropout, seed=p.seed)

    assert torch.autograd.gradcheck(function, leaves(p))


@pytest.mark.parametrize("frozen", ["", "a", "b", "ab"])
@pytest.mark.parametrize("needs_x", [True, False], ids=["dx", "no dx"])
def test_keeps_x_and_s_and_nothing_else(frozen, needs_x):
    p = make_problem((4, 16), 96, 64, 8, torch.bfloat16, bias=True, dropout=0.1, device="cpu")
    x, a, b, bias = leaves(p)
    x.requires_grad_(needs_x), a.requires_grad_("a" not in frozen), b.requires_grad_("b" not in frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = reference.lora_linear(x, p.weight, a, b, p.scale, bias, dropout=p.dropout, seed=p.seed)
    operands = {t.data_ptr() for t in (p.weight, a, b)}
    activations = [t for t in kept if t.data_ptr() not in operands and t.dim() > 0]
    expected = ([] if "a" in frozen else [x.nbytes]) + ([] if "b" in frozen else [4 * 16 * 8 * 2])
    assert sorted(t.nbytes for t in activations) == sorted(expected)
    y.backward(p.dy)
    assert [t.grad is not None for t in (x, a, b)] == [needs_x, "a" not in frozen, "b" not in frozen]


def test_gradients_do_not_depend_on_what_is_frozen():
    p = make_problem(30, 40, 24, 4, torch.float64, dropout=0.2, device="cpu")
    full = ours(reference.lora_linear, p)
    x, a, b, _ = leaves(p)
    b.requires_grad_(False)
    reference.lora_linear(x, p.weight, a, b, p.scale, dropout=p.dropout, seed=p.seed).backward(p.dy)
    assert error(x.grad, full["dx"]) < 1e-12
    assert error(a.grad, full["da"]) < 1e-12


def test_backward_under_autocast_keeps_the_dtypes_of_forward():
    """As everybody who writes `loss.backward()` into the autocast block has it."""
    p = make_problem((4, 16), 96, 64, 8, torch.float32, bias=True, device="cpu")
    expected = ours(reference.lora_linear, p)
    x, a, b, bias = leaves(p)
    y = reference.lora_linear(x, p.weight, a, b, p.scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(p.dy)
    assert all(torch.equal(leaf.grad, expected[f"d{name}"]) for name, leaf in (("x", x), ("a", a), ("b", b)))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_leaves():
    p = make_problem(32, 48, 40, 4, torch.float32, bias=True, device="cpu")
    x, a, b, bias = leaves(p)
    with torch.autocast("cpu", torch.bfloat16):
        y = reference.lora_linear(x, p.weight, a, b, p.scale, bias)
    assert y.dtype == torch.bfloat16
    y.backward(p.dy.bfloat16())
    got = {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad, "dbias": bias.grad}
    exact, same = eager(p, torch.float64), eager(p, torch.bfloat16)
    for name, value in got.items():
        assert name == "y" or value.dtype == torch.float32
        assert error(value, exact[name]) <= 2 * error(same[name], exact[name]) + 1e-6, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_graph_break(dropout):
    p = make_problem((2, 9), 32, 24, 4, torch.float32, bias=True, dropout=dropout, device="cpu")
    compiled = torch.compile(reference.lora_linear, backend="aot_eager", fullgraph=True)
    expected = ours(reference.lora_linear, p)
    for name, value in ours(compiled, p).items():
        assert error(value, expected[name]) < 1e-6, name


def test_checkpointing_replays_the_mask():
    p = make_problem(40, 32, 24, 4, torch.float64, dropout=0.4, device="cpu")

    def run(recompute: bool) -> dict[str, torch.Tensor]:
        def function(x, weight, a, b, scale, bias, *, dropout, seed):
            return reference.lora_linear(x, weight, a, b, scale, bias, dropout=dropout)  # a seed of torch's generator

        torch.manual_seed(11)
        if not recompute:
            return ours(function, p)
        return ours(lambda *args, **kwargs: checkpoint(function, *args, use_reentrant=False, **kwargs), p)

    plain, recomputed = run(False), run(True)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    torch.manual_seed(12)
    assert not torch.equal(reference.lora_linear(*p[:4], p.scale, dropout=0.4), plain["y"])


@pytest.mark.parametrize("op", [reference.lora_linear_group, small.lora_linear_group], ids=["reference", "small"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_selective_checkpointing_keeps_products(op, bias, dropout):
    """Results of mm and addmm are cached, and must not change afterwards."""
    p = make_problem(10, 32, 24, 4, torch.float64, bias=bias, dropout=dropout, device="cpu")
    options = {} if op is small.lora_linear_group else {"dropout": dropout, "seed": p.seed}
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])

    def run(x, weight, a, b, scale, bias, **_):
        return op(x, [weight], [a], [b], [scale], [bias], **options)[0]

    def recomputed(*args, **_):
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)

    plain, again = ours(run, p), ours(recomputed, p)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group_equals_its_members(dropout):
    first = make_problem((2, 7), 40, 24, 4, torch.float64, bias=True, dropout=dropout, device="cpu")
    second = make_problem((2, 7), 40, 16, 6, torch.float64, dropout=dropout, device="cpu")._replace(x=first.x)
    members = [ours(reference.lora_linear, p) for p in (first, second)]
    x = first.x.clone().requires_grad_()
    (_, a1, b1, bias), (_, a2, b2, _) = leaves(first), leaves(second)
    ys = reference.lora_linear_group(
        x,
        [first.weight, second.weight],
        [a1, a2],
        [b1, b2],
        [first.scale, second.scale],
        [bias, None],
        dropout=dropout,
        seed=first.seed,
    )
    torch.autograd.backward(ys, (first.dy, second.dy))
    for y, a, b, member in zip(ys, (a1, a2), (b1, b2), members, strict=True):
        for value, name in ((y, "y"), (a.grad, "da"), (b.grad, "db")):
            assert error(value, member[name]) < 1e-12
    assert error(bias.grad, members[0]["dbias"]) < 1e-12
    assert error(x.grad, members[0]["dx"] + members[1]["dx"]) < 1e-12


@pytest.mark.parametrize("unused", [0, 1])
def test_a_member_whose_output_is_not_used_has_no_gradient(unused):
    first, second = (make_problem(7, 12, 8, 2, torch.float64, bias=True, device="cpu") for _ in range(2))
    x = first.x.clone().requires_grad_()
    (_, a1, b1, bias1), (_, a2, b2, bias2) = leaves(first), leaves(second)
    ys = reference.lora_linear_group(
        x, [first.weight, second.weight], [a1, a2], [b1, b2], [0.7, 0.7], [bias1, bias2], dropout=0.3, seed=1234
    )
    ys[1 - unused].backward(first.dy)
    expected = ours(reference.lora_linear, first._replace(dropout=0.3))
    factors = [(a1, b1, bias1), (a2, b2, bias2)]
    assert [t.grad for t in factors[unused]] == [None] * 3
    for value, name in zip((x, *factors[1 - unused]), ("dx", "da", "db", "dbias"), strict=True):
        assert error(value.grad, expected[name]) < 1e-12


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
def test_outputs_may_be_changed_in_place(members, shape):
    """As those of nn.Linear: some models do."""
    p = make_problem(shape, 12, 8, 2, torch.float64, device="cpu")
    gradients = []
    for scale in (torch.Tensor.mul_, torch.Tensor.mul):
        x, a, b, _ = leaves(p)
        parts = ([p.weight] * members, [a] * members, [b] * members, [p.scale] * members, [None] * members)
        ys = [scale(y, 3.0) for y in reference.lora_linear_group(x, *parts)]
        torch.autograd.backward(ys, [p.dy] * members)
        gradients.append((x.grad, a.grad, b.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def _problem() -> Problem:
    return make_problem(4, 12, 8, 2, torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 11)}, "needs x"),
        ({"x": torch.zeros(4, 12, dtype=torch.float64)}, "autocast"),
        ({"lora_b": torch.zeros(8, 3)}, "do not fit"),
        ({"bias": torch.zeros(7)}, "bias must be"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"lora_a": torch.zeros(2, 12, device="meta")}, "on cpu, cpu, meta, cpu: move them to one device"),
        ({"weight": torch.zeros(8, 12, requires_grad=True)}, "frozen"),
    ],
    ids=["K", "dtype", "R", "bias", "dropout", "device", "weight"],
)
def test_refuses_what_does_not_fit(change, message):
    p = _problem()._replace(**change)
    with pytest.raises(ValueError, match=message):
        reference.lora_linear(*p[:4], p.scale, p.bias, dropout=p.dropout, seed=p.seed)

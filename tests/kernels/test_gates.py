"""The gates e and c: the reference and Triton against fp64 by the error rule, and that their absence costs nothing."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cola_kernels
from cola_kernels import reference

from .conftest import DEVICE, TRITON_DTYPES, Problem, dtype_id, error, leaves, make_problem

# Of e there are enough for a norm to be an average: a single number is as exact as chance has it.
SHAPES = [(1, 72, 40, 16), ((3, 11), 130, 70, 8), (130, 96, 136, 24), (200, 24, 16, 8)]
GATES = ["e", "c", "ec"]


class Gated(NamedTuple):
    problem: Problem
    e: Tensor | None
    c: Tensor | None

    def to(self, dtype: torch.dtype) -> Gated:
        e, c = (None if gate is None else gate.to(dtype) for gate in self[1:])
        return Gated(self.problem.to(dtype), e, c)


def make(shape, dtype, gates, *, device=DEVICE, **keys) -> Gated:
    """Gates in fp32 at least, as links are trained; near 1, and with a 0 and a negative."""
    p = make_problem(*shape, dtype, device=device, **keys)
    n, r = p.lora_b.shape
    generator = torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)
    e, c = ((1 + 0.3 * torch.randn(size, generator=generator)).to(device, wide) for size in (r, n))
    e[-1:], c[:2] = -0.5, torch.tensor([0.0, -1.0])
    return Gated(p, e if "e" in gates else None, c if "c" in gates else None)


def ours(function, gated: Gated, **keys) -> dict[str, Tensor]:
    p = gated.problem
    x, a, b, bias = leaves(p)
    e, c = (None if gate is None else gate.detach().clone().requires_grad_() for gate in gated[1:])
    y = function(x, p.weight, a, b, p.scale, bias, dropout=p.dropout, seed=p.seed, e=e, c=c, **keys)
    return collect(y, p.dy, x, a, b, bias, e, c)


def eager(gated: Gated, dtype: torch.dtype) -> dict[str, Tensor]:
    """In plain PyTorch, all of it in `dtype`; only the mask is the package's."""
    (p, e, c) = gated.to(dtype)
    x, a, b, bias = leaves(p)
    e, c = (None if gate is None else gate.detach().clone().requires_grad_() for gate in (e, c))
    dropped = x
    if p.dropout:
        rows = x.numel() // x.shape[-1]
        mask = reference.dropout_mask(torch.tensor(p.seed, device=x.device), rows, x.shape[-1], p.dropout)
        dropped = x * mask.reshape(x.shape) / (1 - round(p.dropout * 65536) / 65536)
    s = F.linear(dropped, a)
    y = F.linear(x, p.weight) + p.scale * F.linear(s if e is None else s * e, b)
    y = y if c is None else c * y
    return collect(y if bias is None else y + bias, p.dy, x, a, b, bias, e, c)


def collect(y, dy, x, a, b, bias, e, c) -> dict[str, Tensor]:
    y.backward(dy)
    named = {"dx": x, "da": a, "db": b, "dbias": bias, "de": e, "dc": c}
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in named.items() if leaf is not None}


def assert_within_rule(got: dict[str, Tensor], gated: Gated) -> None:
    exact, same = eager(gated, torch.float64), eager(gated, gated.problem.x.dtype)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.shape == exact[name].shape, name
        bound = 2 * error(same[name], exact[name]) + 1e-6
        assert error(value, exact[name]) <= bound, f"{name}: {error(value, exact[name]):.2e} > {bound:.2e}"


@pytest.mark.parametrize(("gates", "dropout"), [("e", 0.0), ("c", 0.0), ("ec", 0.3)])
def test_gradcheck(gates, dropout):
    gated = make(((2, 5), 12, 9, 3), torch.float64, gates, bias=True, dropout=dropout, device="cpu")
    p = gated.problem

    def function(x, a, b, bias, *found):
        e, c = found if gates == "ec" else (*found, None) if gates == "e" else (None, *found)
        return reference.lora_linear(x, p.weight, a, b, p.scale, bias, dropout=dropout, seed=p.seed, e=e, c=c)

    assert torch.autograd.gradcheck(function, (*leaves(p), *(g.requires_grad_() for g in gated[1:] if g is not None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_matches_fp64(shape, dropout, dtype):
    gated = make(shape, dtype, "ec", bias=True, dropout=dropout, device="cpu")
    assert_within_rule(ours(reference.lora_linear, gated), gated)


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "dropout"), [(SHAPES[0], 0.3), *((shape, 0.0) for shape in SHAPES)], ids=str)
@pytest.mark.usefixtures("on_triton", "poisoned")
def test_triton_matches_fp64(shape, dropout, dtype):
    gated = make(shape, dtype, "ec", bias=shape != SHAPES[1], dropout=dropout)
    assert_within_rule(ours(cola_kernels.lora_linear, gated), gated)


@pytest.mark.parametrize("gates", GATES)
def test_little_work_in_plain_pytorch(gates, monkeypatch):
    from cola_kernels import backend

    monkeypatch.setattr(backend, "BACKEND", "triton")  # and below small.LAUNCH_BOUND
    gated = make((20, 40, 24, 4), torch.float32, gates, bias=True)
    assert_within_rule(ours(cola_kernels.lora_linear, gated), gated)


@pytest.mark.usefixtures("on_triton", "poisoned")
def test_triton_takes_any_strides():
    """dY as `sum` leaves it, with strides 0."""
    gated = make((70, 24, 140, 4), torch.float32, "c")
    p = gated.problem
    expanded = gated._replace(problem=p._replace(dy=p.dy[:1, :1].expand(70, 140)))
    assert_within_rule(ours(cola_kernels.lora_linear, expanded), expanded)


@pytest.mark.usefixtures("on_triton")
def test_no_tokens():
    got = ours(cola_kernels.lora_linear, make((0, 40, 24, 4), torch.float32, "ec", bias=True, dropout=0.3))
    assert got["y"].shape == (0, 24)
    assert not any(got[name].any() for name in ("da", "db", "de", "dc", "dbias"))


def test_c_is_not_rounded_to_the_dtype_of_x():
    """In bf16, 1 and 1.003 are the same number."""
    p = make_problem(40, 32, 24, 4, torch.bfloat16, device="cpu")
    one, more = (
        reference.lora_linear(*p[:4], 0.7, c=torch.full((24,), c, device=DEVICE)).double() for c in (1.0, 1.003)
    )
    torch.testing.assert_close(more, (one * 1.003).bfloat16().double(), rtol=0, atol=0)
    assert not torch.equal(one, more)


@pytest.mark.parametrize("library", [reference, cola_kernels], ids=["reference", "triton"])
@pytest.mark.usefixtures("on_triton")
def test_without_gates_nothing_is_different(library):
    p = make_problem(20, 40, 24, 4, torch.float32, bias=True)
    x, a, b, bias = leaves(p)
    arguments = [[value] for value in (p.weight, a, b, p.scale, bias)]
    plain = library.lora_linear_group(x, *arguments)[0]
    absent = library.lora_linear_group(x, *arguments, es=[None], cs=[None])[0]
    assert type(plain.grad_fn).__name__ == type(absent.grad_fn).__name__ == "LoRALinearBackward"
    assert torch.equal(plain, absent)


@pytest.mark.parametrize("trained", [True, False])
def test_keeps_y0_only_where_c_is_trained(trained):
    gated = make((64, 96, 48, 8), torch.float32, "ec", device="cpu")
    (p, e, c) = gated
    x, a, b, _ = leaves(p)
    kept = []
    c.requires_grad_(trained)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = reference.lora_linear(x, p.weight, a, b, p.scale, e=e.requires_grad_(), c=c)
    y = y.mul_(2)  # as any other output, it may be changed in place
    shapes = {tuple(t.shape) for t in kept if len(t) == 64}
    assert shapes == {(64, 96), (64, 8)} | ({(64, 48)} if trained else set())
    y.backward(p.dy)
    exact = eager(gated._replace(problem=p._replace(dy=2 * p.dy)), torch.float64)
    for name, leaf in (("dx", x), ("da", a), ("db", b), ("de", e), *([("dc", c)] if trained else [])):
        assert error(leaf.grad, exact[name]) < 1e-5


def test_a_group_mixes_members_with_and_without():
    gates = ["", "e", "c", "ec"]
    parts = [make((17, 40, 24, 4), torch.float64, g, bias=True, device="cpu") for g in gates]
    x = parts[0].problem.x
    parts = [g._replace(problem=g.problem._replace(x=x)) for g in parts]
    expected = [ours(reference.lora_linear, g) for g in parts]
    x = x.clone().requires_grad_()
    found = [leaves(g.problem)[1:] for g in parts]
    e, c = ([None if g[i] is None else g[i].clone().requires_grad_() for g in parts] for i in (1, 2))
    a, b, bias = zip(*found, strict=True)
    ys = reference.lora_linear_group(x, [g.problem.weight for g in parts], a, b, [0.7] * 4, bias, es=e, cs=c, seed=1234)
    torch.autograd.backward(ys, [g.problem.dy for g in parts])
    for i, member in enumerate(expected):
        named = {"y": ys[i], "da": a[i].grad, "db": b[i].grad, "dbias": bias[i].grad}
        named |= {k: v.grad for k, v in (("de", e[i]), ("dc", c[i])) if v is not None}
        assert all(error(value, member[name]) < 1e-12 for name, value in named.items())
    assert error(x.grad, sum(member["dx"] for member in expected)) < 1e-12


@pytest.mark.parametrize("library", [reference, cola_kernels], ids=["reference", "triton"])
@pytest.mark.usefixtures("on_triton")
def test_compiles_without_a_graph_break(library):
    gated = make(((2, 9), 32, 24, 4), torch.float32, "ec", bias=True, dropout=0.3)
    compiled = torch.compile(library.lora_linear, backend="aot_eager", fullgraph=True)
    expected = ours(library.lora_linear, gated)
    for name, value in ours(compiled, gated).items():
        assert error(value, expected[name]) < 1e-6, name


def test_the_op_keeps_its_contract_with_torch():
    pytest.importorskip("triton")
    dy, y0, c = torch.randn(12, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE), torch.rand(16, device=DEVICE)
    op = torch.ops.cola_kernels.gate_grads.default
    torch.library.opcheck(op, (dy, y0, c), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        (
            {"e": torch.ones(3, device=DEVICE)},
            r"e is torch.float32 \[3\], but lora_b \[24, 4\] needs a floating-point gate \[4\]",
        ),
        ({"c": torch.ones(24, 1, device=DEVICE)}, r"c is torch.float32 \[24, 1\]"),
        ({"c": torch.ones(24, dtype=torch.int32, device=DEVICE)}, r"c is torch.int32"),
        ({"c": torch.ones(24, device=DEVICE), "bias": torch.ones(5, device=DEVICE)}, r"bias has shape \[5\]"),
    ],
    ids=["e", "c", "dtype", "bias"],
)
def test_refuses_what_does_not_fit(gates, sentence):
    p = make_problem(5, 40, 24, 4, torch.float32, device="cpu")
    with pytest.raises(ValueError, match=sentence):
        reference.lora_linear(*p[:4], 0.7, **gates)
    with pytest.raises(ValueError, match="give one each a member"):
        reference.lora_linear_group(p.x, [p.weight], [p.lora_a], [p.lora_b], [0.7], [None], es=[])

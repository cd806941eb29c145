"""NF4 weights: read to the bit, multiplied by in forward and backward, and refused where they are something else."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

bnb = pytest.importorskip("bitsandbytes")

import cola_kernels
from cola_kernels import nf4, reference

from .conftest import DEVICE, TRITON_DTYPES, assert_within_rule, dtype_id, make_problem, ours
from .nf4_weights import dequantised, quantise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def read_out(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    view = nf4.read(weight)
    return nf4.dequantize(view, torch.full(view.shape, float("nan"), dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
def test_reads_what_bitsandbytes_reads(blocksize, nested, dtype):
    weight = quantise(37, 8192 if blocksize == 4096 else 384, blocksize=blocksize, nested=nested, dtype=dtype)
    assert torch.equal(read_out(weight, dtype), dequantised(weight))
    assert torch.equal(cola_kernels.nf4_dequantize(weight, dtype), dequantised(weight))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=dtype_id)
def test_any_storage_dtype(storage):
    weight = quantise(16, 128, storage=storage)
    assert weight.dtype == storage
    assert torch.equal(read_out(weight, torch.float32), dequantised(weight))


def nf4_problem(m: Any, k: int, n: int, r: int, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """A problem with a Params4bit, and the same with its values, which any dtype's oracle can upcast."""
    weight = quantise(n, k, dtype=dtype)
    problem = make_problem(m, k, n, r, dtype, **options)
    return problem._replace(weight=weight), problem._replace(weight=dequantised(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_linear_and_its_gradients(dropout, dtype):
    packed, dense = nf4_problem((3, 5), 128, 40, 4, torch.float32, bias=True, dropout=dropout)
    packed, dense = packed._replace(weight=None).to(dtype)._replace(weight=packed.weight), dense
    got = ours(cola_kernels.lora_linear, packed)
    dense = packed._replace(weight=dense.weight.to(dtype))
    assert_within_rule(got, dense)
    for name, value in ours(reference.lora_linear, dense).items():
        assert torch.equal(got[name], value), name


def test_a_group_may_mix_dense_and_nf4_weights_of_one_scratch_buffer():
    weights = [quantise(64, 128), torch.randn(24, 128, device=DEVICE), quantise(192, 128)]
    plain = [w if type(w) is torch.Tensor else dequantised(w) for w in weights]
    x = torch.randn(7, 128, requires_grad=True, device=DEVICE)
    factors = (
        [torch.randn(4, 128, device=DEVICE) for _ in weights],
        [torch.randn(len(w), 4, device=DEVICE) for w in plain],
    )
    results = []
    for members in (weights, plain):
        ys = cola_kernels.lora_linear_group(x, members, *factors, [0.5] * 3, [None] * 3)
        (dx,) = torch.autograd.grad(sum(y.square().sum() for y in ys), x)
        results.append([*ys, dx])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_keeps_no_dense_weight_for_backward():
    packed, _ = nf4_problem(4, 128, 192, 2, torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, a, b = (t.requires_grad_() for t in (packed.x, packed.lora_a, packed.lora_b))
        cola_kernels.lora_linear(x, packed.weight, a, b, 0.5)
    own = sum(t.nbytes for t in (packed.x, a, b)) + 4 * 2 * 4  # and S
    assert sum(t.nbytes for t in kept) < own + 192 * 128 * 0.6


def test_two_layers_share_one_buffer():
    vars(nf4._of_thread).clear()
    first, second = quantise(64, 128), quantise(32, 128)
    x = torch.randn(3, 128, requires_grad=True, device=DEVICE)
    for weight in (first, second, first):
        y = cola_kernels.lora_linear(
            x, weight, torch.randn(2, 128, device=DEVICE), torch.zeros(len(weight) * 2 // 128, 2, device=DEVICE), 1.0
        )
        assert torch.equal(y, F.linear(x, dequantised(weight)))
    assert [t.nbytes for t in vars(nf4._of_thread).values()] == ([64 * 128 * 4] if DEVICE == "cpu" else [])


def test_a_fake_tensor_does_not_stay_in_the_buffer():
    vars(nf4._of_thread).clear()
    weight = nf4.read(quantise(64, 128))
    with FakeTensorMode():
        assert isinstance(nf4.scratch(weight, torch.float32), FakeTensor)
    assert type(nf4.scratch(weight, torch.float32)) is torch.Tensor


def test_defaults_of_torch_change_nothing():
    """Made in a process of its own: some tables are made when the package is imported."""
    lines = """
        import sys, torch
        import bitsandbytes as bnb
        torch.set_default_dtype(getattr(torch, sys.argv[1]))
        import cola_kernels
        generator = torch.Generator().manual_seed(0)
        def normal(*shape): return torch.randn(*shape, dtype=torch.float32, generator=generator)
        torch.set_default_dtype(torch.float32)
        weight = bnb.nn.Params4bit(normal(64, 128), quant_type="nf4").to("cpu")  # whose own tables would change
        torch.set_default_dtype(getattr(torch, sys.argv[1]))
        a, b, h = normal(4, 128), normal(64, 4), torch.eye(128, dtype=torch.float32)
        print([cola_kernels.nf4_merge_(weight, a, b, 1e-2, rounding=r) for r in ("stochastic", "nearest")])
        print(cola_kernels.nf4_merge_(weight, a, b, 1e-2, rounding="activation", second_moment=h))
        with torch.device("meta"):
            print(float(cola_kernels.lora_linear(a, weight, a, b, 1.0).double().sum()))
    """
    found = [
        subprocess.run([sys.executable, "-c", textwrap.dedent(lines), kind], capture_output=True, text=True, check=True)
        for kind in ("float32", "bfloat16", "float64")
    ]
    assert "retained" in found[0].stdout
    assert found[1].stdout == found[2].stdout == found[0].stdout


def test_a_thread_s_buffer_goes_with_it():
    alive = []

    def work() -> None:
        buffer = nf4.scratch(nf4.read(quantise(64, 128)), torch.float32)
        alive.append(weakref.ref(buffer))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert alive[0]() is None


def test_autocast_and_checkpointing():
    packed, dense = nf4_problem(6, 128, 32, 4, torch.float32, dropout=0.1)
    results = []
    for problem in (packed, dense):

        def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, p: Any = problem) -> torch.Tensor:
            with torch.autocast(DEVICE, torch.bfloat16):
                return cola_kernels.lora_linear(x, p.weight, a, b, p.scale, dropout=p.dropout)

        for again in (False, True):
            torch.manual_seed(3)
            leaves = [t.clone().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
            y = checkpoint(run, *leaves, use_reentrant=False) if again else run(*leaves)
            y.float().square().sum().backward()
            results.append([y, *(t.grad for t in leaves)])
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(got, results[0][i]) for result in results for i, got in enumerate(result))


def test_compiles_in_one_graph():
    """Also for a second layer of another size, which is traced with sizes that are symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(reference.lora_linear, backend="aot_eager", fullgraph=True)
    for m, k, n in ((6, 128, 32), (9, 192, 48)):
        packed, _ = nf4_problem(m, k, n, 4, torch.float32, bias=True)
        expected, got = ours(reference.lora_linear, packed), ours(compiled, packed)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_two_layers_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    first, second = (nf4_problem(6, 64, n, 4, torch.float32)[0] for n in (64, 32))

    def both(x):
        for p in (first, second):
            x = reference.lora_linear(x, p.weight, p.lora_a, p.lora_b, p.scale)
        return x

    found = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)(first.x)
    assert torch.equal(found, both(first.x))


def on_this_cpu_bitsandbytes_repacks() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return DEVICE == "cpu" and bool(has_avx512bf16())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=dtype_id)
def test_repacked_codes_come_back_exactly(nested, storage):
    """By bitsandbytes' own repacking, called as its Linear4bit does in eval mode."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = quantise(64, 384, nested=nested, storage=storage)
    before, exact = weight.data.clone(), dequantised(weight).double()
    absmax = nf4.scales(nf4.read(weight), slice(0, 64))
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ValueError, match=r"repacked by bitsandbytes.*unpack_nf4_"):
        cola_kernels.lora_linear(
            torch.randn(2, 384, device=DEVICE),
            weight,
            torch.zeros(1, 384, device=DEVICE),
            torch.zeros(64, 1, device=DEVICE),
            1.0,
        )
    cola_kernels.unpack_nf4_(weight)
    assert weight.dtype == storage
    assert torch.equal(weight.data.view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(nf4.scales(nf4.read(weight), slice(0, 64)), absmax.bfloat16().float())
    after = read_out(weight, torch.float32)
    assert torch.equal(after, dequantised(weight))
    assert float((after - exact).norm() / exact.norm()) < torch.finfo(torch.bfloat16).eps
    cola_kernels.unpack_nf4_(weight)  # nothing left to do
    assert torch.equal(read_out(weight, torch.float32), after)


class OnOurOp(torch.nn.Module):
    """What a chain makes of a Linear4bit: the same frozen weight, and factors to train."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight = linear.weight
        self.lora_a = torch.nn.Parameter(torch.randn(4, 64, device=DEVICE) / 8)
        self.lora_b = torch.nn.Parameter(torch.zeros(64, 4, device=DEVICE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cola_kernels.lora_linear(x, self.weight, self.lora_a, self.lora_b, 2.0)


def trained_gradient(layer: OnOurOp, x: torch.Tensor, evaluate_first: bool) -> torch.Tensor:
    if evaluate_first:
        layer.eval()
        with torch.no_grad():
            layer(x)
        layer.train()
    layer(x).square().sum().backward()
    assert layer.lora_b.grad is not None
    return layer.lora_b.grad


def test_evaluating_before_training_changes_nothing():
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to(DEVICE)
    layer, x = OnOurOp(linear), torch.randn(8, 64, device=DEVICE)
    expected = trained_gradient(copy.deepcopy(layer), x, evaluate_first=False)
    assert torch.equal(trained_gradient(layer, x, evaluate_first=True), expected)


@pytest.mark.skipif(not on_this_cpu_bitsandbytes_repacks(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
def test_the_trap_is_real_and_can_be_left():
    """bitsandbytes' layer, evaluated by itself first: its weight is refused, and trains after unpacking."""
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    layer, x = OnOurOp(linear), torch.randn(8, 64, device=DEVICE)
    expected = trained_gradient(copy.deepcopy(layer), x, evaluate_first=False)
    linear.eval()
    linear(x)
    with pytest.raises(ValueError, match="repacked"):
        layer(x)
    cola_kernels.unpack_nf4_(linear.weight)
    got = trained_gradient(layer, x, evaluate_first=False)
    assert float((got - expected).norm() / expected.norm()) < 2 * torch.finfo(torch.bfloat16).eps


def with_state(weight: Any, **changes: Any) -> Any:
    bad = torch.empty_like(weight.data)
    bad.quant_state = types.SimpleNamespace(**{**vars(weight.quant_state), **changes})
    return bad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantise(8, 64, quant_type="fp4"), "fp4, but only NF4"),
        (lambda: bnb.nn.Params4bit(torch.randn(8, 64), quant_type="nf4"), "without a quant_state"),
        (lambda: quantise(8, 64).data, "uint8, but must be floating point"),
        (lambda: torch.zeros(8, 64, dtype=torch.int8), "LLM.int8"),
        (lambda: quantise(8, 96), "blocks of 64"),
        (lambda: with_state(quantise(8, 64), shape=(8, 128)), r"256 bytes"),
    ],
    ids=["fp4", "not quantised", "lost state", "int8", "partial block", "wrong size"],
)
def test_refuses_in_one_sentence(make, message):
    weight = make()
    k = weight.quant_state.shape[1] if getattr(weight, "quant_state", None) is not None else 64
    with pytest.raises(ValueError, match=message):
        cola_kernels.lora_linear(
            torch.randn(2, k, device=DEVICE),
            weight,
            torch.zeros(1, k, device=DEVICE),
            torch.zeros(8, 1, device=DEVICE),
            1.0,
        )


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(1, 64, 64), (7, 192, 32), (37, 576, 64), (3, 8192, 4096)])
@pytest.mark.usefixtures("on_triton")
def test_triton_reads_the_same_bits(n, k, blocksize, nested, dtype):
    weight = quantise(n, k, blocksize=blocksize, nested=nested)
    out = torch.full((n, k), float("nan"), dtype=dtype, device=DEVICE)
    view = nf4.read(weight)
    torch.ops.cola_kernels.nf4_dequantize_(*view[:5], *view.layout, out)
    assert torch.equal(out, read_out(weight, dtype))


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("on_triton", "poisoned")
def test_triton_lora_linear(dtype):
    packed, dense = nf4_problem(19, 128, 40, 8, dtype, bias=True, dropout=0.25)
    assert_within_rule(ours(cola_kernels.lora_linear, packed), dense)

"""What the kernel tests share: an oracle written apart from the package, and the error rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cola_kernels import backend, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.9's interpreter truncates fp32 to bf16, so bf16 kernels are judged on a GPU only.
TRITON_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """One call of lora_linear, and the gradient that flows into it."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float = 0.7
    dropout: float = 0.0
    seed: int = 1234

    def to(self, dtype: torch.dtype) -> Problem:
        return self._replace(**{k: v.to(dtype) for k, v in self._asdict().items() if isinstance(v, Tensor)})


def make_problem(
    m: int | tuple[int, ...],
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    dropout: float = 0.0,
    device: str = DEVICE,
) -> Problem:
    generator = torch.Generator().manual_seed(hash((m, k, n, r)) % 2**31)
    lead = (m,) if isinstance(m, int) else m

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, dtype)

    return Problem(
        x=normal(*lead, k),
        weight=normal(n, k, std=k**-0.5),
        lora_a=normal(r, k, std=k**-0.5),
        lora_b=normal(n, r),
        bias=normal(n) if bias else None,
        dy=normal(*lead, n),
        dropout=dropout,
    )


def eager(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient by plain PyTorch and its autograd, in `dtype`; only the mask is the package's."""
    p = problem.to(dtype)
    x, a, b, bias = leaves(p)
    dropped = x
    if p.dropout:
        rows = p.x.numel() // p.x.shape[-1]
        mask = reference.dropout_mask(torch.tensor(p.seed, device=x.device), rows, x.shape[-1], p.dropout)
        dropped = x * mask.reshape(x.shape) / (1 - round(p.dropout * 65536) / 65536)
    y = F.linear(x, p.weight, bias) + p.scale * F.linear(F.linear(dropped, a), b)
    return collect(y, p.dy, x, a, b, bias)


def ours(function: Any, problem: Problem) -> dict[str, Tensor]:
    x, a, b, bias = leaves(problem)
    y = function(x, problem.weight, a, b, problem.scale, bias, dropout=problem.dropout, seed=problem.seed)
    return collect(y, problem.dy, x, a, b, bias)


def leaves(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, a, b = (t.detach().clone().requires_grad_() for t in (p.x, p.lora_a, p.lora_b))
    return x, a, b, None if p.bias is None else p.bias.detach().clone().requires_grad_()


def collect(y: Tensor, dy: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    y.backward(dy)
    grads = {"dx": x.grad, "da": a.grad, "db": b.grad}
    return {"y": y.detach(), **grads} | ({} if bias is None else {"dbias": bias.grad})


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN counts as infinite."""
    difference = (value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)
    return float(torch.nan_to_num(difference.detach(), nan=float("inf")))


def assert_within_rule(got: dict[str, Tensor], problem: Problem) -> None:
    """err(ours, fp64) <= 2 · err(eager in the same dtype, fp64) + 1e-6, for the output and every gradient."""
    exact, same = eager(problem, torch.float64), eager(problem, problem.x.dtype)
    for name, value in got.items():
        assert value.shape == exact[name].shape, name
        if value.numel():
            bound = 2 * error(same[name], exact[name]) + 1e-6
            assert error(value, exact[name]) <= bound, f"{name}: {error(value, exact[name]):.2e} > {bound:.2e}"


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public ops run Triton, whatever the environment says and however few the tokens."""
    pytest.importorskip("triton")
    from cola_kernels import small

    monkeypatch.setattr(backend, "BACKEND", "triton")
    monkeypatch.setattr(small, "LAUNCH_BOUND", 0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, so that an element no kernel wrote is seen."""
    fresh = torch.Tensor.new_empty

    def poisoned_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        empty = fresh(self, *args, **kwargs)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes that are live at once while `run` runs, as torch's profiler saw them allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak

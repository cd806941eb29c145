"""Which implementation runs, in fresh processes: the environment is read once, at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch, cola_kernels
from cola_kernels import backend
print("imported")
x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(1, 8), torch.ones(4, 1)
assert float(cola_kernels.lora_linear(x, w, a, b, 0.5)[0, 0]) == 12
print("triton" if backend.use_triton(x) else "torch")
"""
HIDE_TRITON = "import sys; sys.modules['triton'] = None\nimport importlib.machinery\n" + (
    "find = importlib.machinery.PathFinder.find_spec\n"
    "importlib.machinery.PathFinder.find_spec = classmethod(\n"
    "    lambda cls, name, *rest: None if name == 'triton' else find(name, *rest))\n"
    "del sys.modules['triton']\n"
)


def run(program: str = PROGRAM, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COLA_KERNELS", "TRITON_INTERPRET"))}
    inherited |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment, check=False)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({}, "torch"),
        ({"TRITON_INTERPRET": "1"}, "torch"),
        ({"TRITON_INTERPRET": "1", "COLA_KERNELS_BACKEND": "triton"}, "triton"),
        ({"COLA_KERNELS_BACKEND": "torch"}, "torch"),
    ],
    ids=["default", "interpreter", "triton", "torch"],
)
def test_choice_on_a_cpu(environment, chosen):
    result = run(**environment)
    assert result.stdout.split() == ["imported", chosen], result.stderr


def test_works_without_triton():
    result = run(HIDE_TRITON + PROGRAM)
    assert result.stdout.split() == ["imported", "torch"], result.stderr


@pytest.mark.parametrize(
    ("program", "environment", "message"),
    [
        (PROGRAM, {"COLA_KERNELS_BACKEND": "triton"}, "TRITON_INTERPRET is not set"),
        (HIDE_TRITON + PROGRAM, {"COLA_KERNELS_BACKEND": "triton"}, "triton is not installed"),
        (PROGRAM, {"COLA_KERNELS_BACKEND": "cuda"}, "must be one of auto, triton, torch"),
        (
            "import torch; from cola_kernels import backend; backend.use_triton(torch.ones(1, dtype=torch.float64))",
            {"COLA_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
            "not torch.float64",
        ),
    ],
    ids=["no GPU", "no triton", "unknown", "fp64"],
)
def test_what_cannot_be_done_is_an_error(program, environment, message):
    result = run(program, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_the_kernels_need_neither_the_library_nor_transformers():
    result = run("import sys, cola_kernels; print([m for m in ('cola_fast', 'transformers') if m in sys.modules])")
    assert result.stdout.strip() == "[]"


# CUDA graphs exist on a GPU only
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_graph_replays_with_new_inputs():
    import cola_kernels

    x, w, a, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((64, 96), (80, 96), (8, 96), (80, 8)))
    seed = torch.zeros((), dtype=torch.int64, device="cuda")

    def step() -> torch.Tensor:
        return cola_kernels.lora_linear(x, w, a, b, 0.5, dropout=0.5, seed=seed)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, step())

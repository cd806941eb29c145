"""torch.compile of a whole model with our layers, without a graph break."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_outputs import CausalLMOutputWithPast

from cola_fast import attach

from ..conftest import disturb, tiny_llama

# inductor compiles C++ for a CPU; the eager backend checks the graph on every machine
INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")]


def train_one_step(model: nn.Module, function: Callable[..., Any], ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss = function(ids, labels=ids).loss
    loss.backward()
    results = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            results[name], parameter.grad = parameter.grad, None
    return results


class Pair(nn.Module):
    """Two layers that read the same input, and little else: the compiler is paid for by the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q_proj, self.k_proj = nn.Embedding(64, 32), nn.Linear(32, 24), nn.Linear(32, 24)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(ids)
        return CausalLMOutputWithPast(loss=(self.q_proj(x) * self.k_proj(x)).sum())


@pytest.mark.parametrize(
    ("make", "backend", "dropout", "targets"),
    [
        (tiny_llama, "aot_eager", 0.0, "all-linear"),
        (tiny_llama, "aot_eager", 0.2, ["q_proj", "k_proj"]),
        pytest.param(Pair, "inductor", 0.2, ["q_proj", "k_proj"], marks=INDUCTOR),
    ],
    ids=["aot_eager", "aot_eager, dropout", "inductor, dropout"],
)
def test_a_model_compiles_without_a_graph_break(
    ids: Tensor, make: Callable[..., nn.Module], backend: str, dropout: float, targets: Any
) -> None:
    """Also once the layers have been grouped: traced, each runs alone, with its own mask, as in a first step."""
    torch._dynamo.reset()
    model = make(**({"num_hidden_layers": 1, "use_cache": False} if make is tiny_llama else {})).train()
    disturb(attach(model, targets=targets, dropout=dropout))
    eager = copy.deepcopy(model)
    expected = train_one_step(eager, eager, ids)
    for _ in range(2):
        train_one_step(model, model, ids)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch._inductor.config.patch(fallback_random=True):  # draw as eager PyTorch does
        for _ in range(2):
            for name, value in train_one_step(model, compiled, ids).items():
                torch.testing.assert_close(value, expected[name], msg=name, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 1

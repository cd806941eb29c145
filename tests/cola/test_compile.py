"""torch.compile of a whole model with our layers, without a graph break."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from cola_fast import attach
from cola_fast.models import checkpoint_activations

from ..conftest import disturb, tiny_llama

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")],
    ),
]


def train_one_step(model: nn.Module, function: object, ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    loss = function(ids, labels=ids).loss  # type: ignore[operator]
    loss.backward()
    results = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            results[name], parameter.grad = parameter.grad, None
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_llama_compiles_without_a_graph_break(ids: Tensor, backend: str, dropout: float, checkpointing: bool) -> None:
    """Also once the layers have been grouped: traced, each runs alone, with its own mask, as in a first step."""
    torch._dynamo.reset()
    model = tiny_llama().train()
    disturb(attach(model, targets="all-linear", dropout=dropout))
    eager = copy.deepcopy(model)
    if checkpointing:
        checkpoint_activations(model)
    expected = train_one_step(eager, eager, ids)
    for _ in range(2):
        train_one_step(model, model, ids)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        for name, value in train_one_step(model, compiled, ids).items():
            torch.testing.assert_close(value, expected[name], msg=name, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

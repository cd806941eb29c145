"""Training on the Triton kernels and on their reference: the same loss curve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cola_fast import attach
from cola_kernels import backend

from ..conftest import tiny_llama

STEPS, LR = 20, 5e-2  # few and large: an interpreted step takes a third of a second
NUMBERS = 16


def train(seed: int) -> Tensor:
    """The losses of a link that learns to count in threes, from random starts."""
    model = tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2).train()
    chain = attach(model, targets=["q_proj", "v_proj"], r=8, dropout=0.1, seed=seed)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=LR)
    torch.manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(0, NUMBERS, (4, 1))
        ids = (starts + 3 * torch.arange(8)) % NUMBERS
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
def test_the_kernels_train_as_their_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from cola_kernels import small

    monkeypatch.setattr(small, "LAUNCH_BOUND", 0)  # the kernels themselves, however few the tokens
    monkeypatch.setattr(backend, "BACKEND", "torch")
    reference, other = train(seed=1), train(seed=2)
    monkeypatch.setattr(backend, "BACKEND", "triton")
    kernels = train(seed=1)
    assert reference[-5:].mean() < 0.8 * reference[:5].mean()
    spread = (reference - other).abs().mean()
    # far within it: batches and masks are the same, so that only rounding sets the two apart
    assert (kernels - reference).abs().mean() < 0.1 * spread

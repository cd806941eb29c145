"""What the tests of grouped layers share."""

from __future__ import annotations

import pytest
import torch

import cola_kernels.autograd
from cola_fast import grouping


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members of each op that is run, in order."""
    sizes: list[int] = []
    alone, together = grouping.lora_linear, grouping.lora_linear_group
    monkeypatch.setattr(grouping, "lora_linear", lambda *a, **k: sizes.append(1) or alone(*a, **k))
    monkeypatch.setattr(
        grouping, "lora_linear_group", lambda x, w, *a, **k: sizes.append(len(w)) or together(x, w, *a, **k)
    )
    return sizes


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer, alone or not, draws the same mask from the same shape: so that both can be compared."""
    monkeypatch.setattr(cola_kernels.autograd, "as_seed", lambda seed, device: torch.tensor(7, device=device))

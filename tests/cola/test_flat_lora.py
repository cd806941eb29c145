"""Flat-LoRA: noise on the weights that never touches them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import Chain, attach, config
from cola_fast.config import TrainConfig
from cola_fast.methods import PERTURB
from cola_fast.training import trainer

from ..conftest import disturb, tiny_llama
from .test_chain import logits
from .test_trainer import hashes

N, K, R = 40, 30, 3
SIGMA = 0.5


def linear(gate: str | None = None) -> Chain:
    """A trained link, gates included, on a layer with one large row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).double()
    with torch.no_grad():
        model[0].weight[7] *= 20
    chain = attach(model, targets=["0"], r=R, gate=gate)
    disturb(chain, 0.3)
    with torch.no_grad():
        for gates in (gate for layer in chain.layers.values() for gate in (layer.lora_e, layer.lora_magnitude)):
            if gates is not None:
                gates.mul_(torch.linspace(0.5, 1.5, len(gates), dtype=gates.dtype))
    return chain


def noise_of(chain: Chain, done: float = 1.0, seed: int = 1) -> Tensor:
    """E [N, K], read off the layer's response to unit inputs."""
    with torch.no_grad():
        plain = chain.model(torch.eye(K, dtype=torch.float64))
        with PERTURB["flat-lora"](chain.layers, done, seed, TrainConfig(sigma=SIGMA)):
            noisy = chain.model(torch.eye(K, dtype=torch.float64))
    difference: Tensor = (noisy - plain).t()
    return difference


def test_forward_and_backward_are_those_of_the_noisy_weight() -> None:
    chain, x = linear(), torch.randn(2, 5, K, dtype=torch.float64)
    (layer,) = chain.layers.values()
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    inputs, noise = x.clone().requires_grad_(), noise_of(chain)
    with PERTURB["flat-lora"](chain.layers, 1.0, 1, TrainConfig(sigma=SIGMA)):
        y = chain.model(inputs)
        y.square().sum().backward()
    a, b, expected = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    merged = layer.weight.detach() + noise + layer.scale * b @ a
    by_hand = nn.functional.linear(expected, merged, layer.bias)
    by_hand.square().sum().backward()
    torch.testing.assert_close(y, by_hand)
    for ours, theirs in ((inputs, expected), (layer.lora_A, a), (layer.lora_B, b)):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("gate", [None, "sora", "dora"])
def test_its_size_follows_the_merged_rows_and_a_cosine(gate: str | None) -> None:
    chain = linear(gate)
    (layer,) = chain.layers.values()
    with torch.no_grad():
        rows = (chain.model(torch.eye(K, dtype=torch.float64)) - layer.bias).norm(dim=0)
    unit = noise_of(chain) / (SIGMA * rows / K**0.5)[:, None]
    count = unit.numel()  # 1200 standard normal numbers: within five standard errors
    assert abs(float(unit.mean())) < 5 / count**0.5
    assert abs(float(unit.square().mean()) - 1) < 5 * (2 / count) ** 0.5
    torch.testing.assert_close(noise_of(chain, 0.5), noise_of(chain) / 2)
    assert not noise_of(chain, 0.0).any()
    assert torch.equal(noise_of(chain), noise_of(chain))
    assert float((noise_of(chain, seed=2) * noise_of(chain)).mean() / noise_of(chain).square().mean()) < 0.3


def test_nothing_of_it_stays(ids: Tensor) -> None:
    """In bf16, where adding and subtracting would not give the weights back."""
    model = tiny_llama(dtype=torch.bfloat16)
    chain = attach(model, r=R)
    before, weights = logits(model, ids), [p.detach().clone() for p in model.parameters()]
    with PERTURB["flat-lora"](chain.layers, 1.0, 1, TrainConfig(sigma=SIGMA)):
        assert not torch.equal(logits(model, ids), before)
        model(ids, labels=ids).loss.backward()
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_recomputed_forward_has_the_same_noise(config_file: Callable[..., str], tmp_path: Path) -> None:
    found = []
    for checkpointing in (True, False):
        keys: dict[str, Any] = {"schedule__steps": 3, "schedule__links": 1, "train__sigma": SIGMA}
        keys |= {"chain__method": "flat-lora", "train__activation_checkpointing": checkpointing}
        trainer.train(config.load(config_file(out=str(tmp_path / str(checkpointing)), **keys)), quiet=True)
        found.append(hashes(tmp_path / str(checkpointing)))
    assert found[0] == found[1]

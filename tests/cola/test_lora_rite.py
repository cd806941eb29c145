"""LoRA-RITE: the steps of B A do not depend on how it is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach
from cola_fast.config import TrainConfig
from cola_fast.methods import OPTIMIZER, Pair
from cola_fast.training.optimizer import load_state, make_optimizer, set_lr

from .test_methods import chain_of, configured

N, K, R = 9, 13, 3


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train(a: Tensor, b: Tensor, steps: int = 40, name: str = "lora-rite", **keys: Any) -> tuple[list[Tensor], Pair]:
    """B A after each step of a regression on a random [N, K] matrix, on a new batch each step."""
    pair = Pair(nn.Parameter(a.clone()), nn.Parameter(b.clone()), 1.7)
    optimizer = OPTIMIZER[name]([{"params": list(pair[:2])}], TrainConfig(**keys), [pair])
    optimizer.param_groups[0]["lr"] = 0.02
    goal, found = randn(N, K, seed=1), []
    for step in range(steps):
        x = randn(20, K, seed=100 + step)
        (x @ (pair.scale * pair.b @ pair.a - goal).t()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((pair.b @ pair.a).detach())
    return found, pair


@pytest.mark.parametrize("start", [1.0, 0.0], ids=["trained", "fresh"])
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["", "decay"])
def test_equivalent_factors_take_the_same_steps(start: float, decay: float) -> None:
    a, b, q = randn(R, K, seed=2), start * randn(N, R, seed=3), randn(R, R, seed=4)
    plain, _ = train(a, b, weight_decay=decay)
    split, _ = train(torch.linalg.solve(q, a), b @ q, weight_decay=decay)
    for one, other in zip(plain, split, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12 * float(torch.linalg.cond(q)) ** 2)
    assert (plain[-1] - plain[0]).norm() > 0.5
    # what it is measured against: Adam's differ
    adam, _ = train(a, b, name="adamw")
    adam_split, _ = train(torch.linalg.solve(q, a), b @ q, name="adamw")
    assert (adam_split[-1] - adam[-1]).norm() > 0.1


def test_it_reaches_the_best_approximation() -> None:
    """Of rank R, from B = 0, though B does not have a direction yet at A's first step."""
    found, pair = train(randn(R, K, seed=2), torch.zeros(N, R, dtype=torch.float64), steps=400)
    tail = torch.linalg.svdvals(randn(N, K, seed=1))[R:].norm()
    assert (pair.scale * found[-1] - randn(N, K, seed=1)).norm() < 1.05 * tail


def test_the_first_step_by_hand() -> None:
    """From the definitions, with a QR decomposition for the basis: A's step in B's basis, and back."""
    a, b, s = randn(R, K, seed=2), randn(N, R, seed=3), 1.7
    _, pair = train(a, b, steps=1)
    x, goal = randn(20, K, seed=100), randn(N, K, seed=1)
    w = (s * b @ a).requires_grad_()
    (x @ (w - goal).t()).square().mean().backward()
    q, t = torch.linalg.qr(b)
    g = s * w.grad.t() @ q  # [K, R], the unmagnified gradient
    values, vectors = torch.linalg.eigh(g.t() @ g / K)
    step = g @ vectors / (values.sqrt() + 1e-8) @ vectors.t()
    torch.testing.assert_close(pair.a.detach(), a - 0.02 * torch.linalg.solve(t, step.t()))


def test_what_a_change_of_basis_loses_is_kept_as_escaped_mass() -> None:
    """R = 1, B turned by a right angle after the first step: all of A's second moment is lost, and counts from then on
    in every direction, less what beta2 takes off."""
    pair = Pair(nn.Parameter(randn(1, K, seed=2)), nn.Parameter(torch.eye(N, 1, dtype=torch.float64)), 1.0)
    optimizer = OPTIMIZER["lora-rite"]([{"params": list(pair[:2])}], TrainConfig(betas=(0.9, 0.99)), [pair])
    found = []
    for row in (0, 1, 1):
        with torch.no_grad():
            pair.b.copy_(torch.eye(N, dtype=torch.float64)[:, row : row + 1])
        pair.a.grad = randn(1, K, seed=5)
        optimizer.step()
        state = optimizer.state[pair.a]
        found.append((float(state["second_moment"]), float(state["escaped"])))
    mean = float(randn(1, K, seed=5).square().mean()) / 100
    assert [escaped for _, escaped in found] == pytest.approx([0, 0.99 * mean, 0.99**2 * mean])
    assert [second for second, _ in found] == pytest.approx([mean, mean, 1.99 * mean])


def test_a_parameter_without_a_partner_is_refused() -> None:
    pair = Pair(nn.Parameter(randn(R, K, seed=2)), nn.Parameter(randn(N, R, seed=3)), 1.0)
    groups = [{"params": [*pair[:2], nn.Parameter(randn(R, seed=4))]}]
    with pytest.raises(UserError, match="trains the factors A and B alone"):
        OPTIMIZER["lora-rite"](groups, TrainConfig(), [pair])


def test_a_frozen_factor_is_a_basis(model: nn.Module, ids: Tensor) -> None:
    made = configured("rac-lora", "lora-rite")
    chain = chain_of(model, made)
    before = chain.live_factors()
    optimizer = make_optimizer(chain, made.train)
    set_lr(optimizer, 0.01)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, f in chain.live_factors().items():
        assert torch.equal(f.a, before[name].a)
        assert not torch.equal(f.b, before[name].b)


def test_its_state_comes_back_exactly(model: nn.Module, ids: Tensor) -> None:
    made = configured("lora-rite")
    chain = attach(model, r=3)

    def steps(optimizer: torch.optim.Optimizer, count: int) -> None:
        set_lr(optimizer, 0.01)
        for _ in range(count):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    first = make_optimizer(chain, made.train)
    steps(first, 3)
    factors, state = [p.detach().clone() for p in chain.parameters()], first.state_dict()["state"]
    state = {i: {k: v.clone() for k, v in entry.items()} for i, entry in state.items()}
    assert {int(entry["step"]) for entry in state.values()} == {3}
    steps(first, 2)
    expected = [p.detach().clone() for p in chain.parameters()]
    with torch.no_grad():
        for p, value in zip(chain.parameters(), factors, strict=True):
            p.copy_(value)
    second = make_optimizer(chain, made.train)
    load_state(second, state)
    steps(second, 2)
    assert all(torch.equal(p, value) for p, value in zip(chain.parameters(), expected, strict=True))

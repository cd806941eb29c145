"""What single methods do beside what all promise: how links start and scale, optimizers, what a frozen A saves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import Chain, attach, config
from cola_fast.chain.chain_json import load_state as saved_state
from cola_fast.chain.chain_json import read_record
from cola_fast.layers.layer import LoRALinear
from cola_fast.methods import GRADIENT, INIT, STATE, Pair, Site
from cola_fast.training import trainer
from cola_fast.training.optimizer import load_state, make_optimizer, set_lr

from ..conftest import tiny_llama
from .test_methods import chain_of, configured, pretend_to_train

# --- starts and scales ------------------------------------------------------------------------------------------------


def test_a_weight_that_a_start_does_not_need_is_not_read(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have to be dequantised, or gathered from other processes."""
    read: list[LoRALinear] = []
    monkeypatch.setattr(LoRALinear, "dense_weight", lambda self: read.append(self) or self.weight.detach())
    chain = attach(model, r=2)
    assert not read
    chain.detach()
    chain = attach(model, r=2, init="pissa")
    assert read == list(chain.layers.values())


def site(weight: Tensor, rank: int = 3, **keys: Any) -> Site:
    settings = {"frozen": None, "carry": 0.0, "dtype": torch.float64, "previous": lambda: None, **keys}
    settings |= {"shape": tuple(weight.shape), "read": lambda: weight, "generator": torch.Generator().manual_seed(0)}
    return Site(rank=rank, scale=2.0, **settings)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_pissa_takes_the_best_approximation_of_its_rank(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    a, b = INIT["pissa"](site(weight))
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(weight - 2 * b @ a)[:4], sigma[3:7])
    torch.testing.assert_close(a @ a.t(), b.t() @ b)  # evenly shared


def test_olora_starts_orthonormal_and_in_the_weight() -> None:
    weight = torch.randn(11, 7, dtype=torch.float64)
    a, b = INIT["olora"](site(weight))
    torch.testing.assert_close(b.t() @ b, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(b.t() @ (weight - b @ a), torch.zeros(3, 7, dtype=torch.float64))


def test_peft_starts_pissa_at_the_same_place() -> None:
    from peft import LoraConfig, get_peft_model

    keys: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    peft = get_peft_model(tiny_llama(), LoraConfig(**keys, init_lora_weights="pissa"))
    chain = attach(tiny_llama(), r=4, alpha=8, targets=["q_proj"], init="pissa")
    for name, f in chain.live_factors().items():
        theirs = peft.base_model.model.get_submodule(name)
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        torch.testing.assert_close(f.b @ f.a, product, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(chain.layers[name].weight, theirs.base_layer.weight, rtol=1e-4, atol=1e-6)


def test_a_carried_link_goes_on_where_the_last_one_was(model: nn.Module) -> None:
    chain = attach(model, r=3, init="carry", carry=0.25)
    pretend_to_train(chain, 0)
    before, weights = chain.live_factors(), {n: layer.weight.clone() for n, layer in chain.layers.items()}
    chain.tie()
    chain.extend()
    for name, f in chain.live_factors().items():
        torch.testing.assert_close(f.a, before[name].a)
        torch.testing.assert_close(f.b, 0.25 * before[name].b)
        kept = weights[name] + 0.75 * f.scale * before[name].b @ before[name].a  # PeriodicLoRA: W += m·s·BA
        torch.testing.assert_close(chain.layers[name].weight, kept)


def test_restarts_without_a_merge_leave_the_base_alone(model: nn.Module) -> None:
    weights = {n: p.clone() for n, p in model.named_parameters()}
    chain = attach(model, r=3, init="carry", carry=1.0)
    for link in range(3):
        pretend_to_train(chain, link)
        chain.tie()
        chain.extend()
    for name, layer in chain.layers.items():
        torch.testing.assert_close(layer.weight, weights[f"{name}.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("scaling", "scale"), [("lora", 8 / 4), ("rslora", 8 / 2), ("constant", 8 / 16)])
def test_scales(scaling: str, scale: float, model: nn.Module) -> None:
    chain = attach(model, r=16, alpha=8, scaling=scaling, rank_pattern={"v_proj": 4})
    layer = chain.layers["model.layers.0.self_attn.v_proj"]
    assert layer.scale == pytest.approx(scale)


def test_rslora_is_peft_s(ids: Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    keys: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}
    peft = get_peft_model(tiny_llama(), LoraConfig(**keys, use_rslora=True))
    chain = attach(tiny_llama(), r=3, alpha=5, targets=["q_proj"], scaling="rslora")
    (layer, *_) = chain.layers.values()
    (name, *_) = chain.layers
    assert layer.scale == pytest.approx(peft.base_model.model.get_submodule(name).scaling["default"])


def test_a_link_covers_its_share_of_the_blocks() -> None:
    model = tiny_llama(num_hidden_layers=4)
    chain = attach(model, r=1, targets="all-linear", share=0.5)
    seen = []
    for _ in range(6):
        assert chain.open_link is not None
        blocks = {name.split(".")[2] for name in chain.open_link.ranks}
        assert len(blocks) == 2
        assert len(chain.open_link.ranks) == 14
        assert len(chain.parameters()) == 28
        seen.append(frozenset(blocks))
        chain.tie()
        chain.extend()
    assert len(set(seen)) > 1


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_lora_plus_gives_b_its_own_rate(model: nn.Module) -> None:
    made = configured("lora+")
    chain = chain_of(model, made)
    optimizer = make_optimizer(chain, made.train)
    set_lr(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in chain.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-3 * (16 if name.endswith("lora_B") else 1))


def adam_state(model: nn.Module, ids: Tensor) -> tuple[Chain, Any]:
    chain = attach(model, r=4)
    optimizer = make_optimizer(chain, configured("cola").train)
    set_lr(optimizer, 0.01)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return chain, optimizer.state_dict()["state"]


@pytest.mark.parametrize("policy", ["prune-magnitude", "prune-random"])
def test_pruned_state(policy: str, model: nn.Module, ids: Tensor) -> None:
    chain, state = adam_state(model, ids)
    pruned = STATE[policy](state, 0.75, 7)
    assert pruned.keys() == state.keys() == set(range(len(chain.parameters())))
    dropped = total = 0
    for index, entry in pruned.items():
        assert entry["step"] == state[index]["step"] == 3
        for key in ("exp_avg", "exp_avg_sq"):
            old, new = state[index][key], entry[key]
            gone = (new == 0) & (old != 0)
            assert torch.equal(new[~gone], old[~gone])
            dropped, total = dropped + int(gone.sum()), total + old.numel()
            if policy == "prune-magnitude":
                assert int((new == 0).sum()) >= round(0.75 * old.numel())
                assert old[gone].abs().max() <= new[new != 0].abs().min()
    assert dropped / total == pytest.approx(0.75, abs=0.08)
    again = STATE[policy](state, 0.75, 7)
    assert all(torch.equal(again[i]["exp_avg"], pruned[i]["exp_avg"]) for i in pruned)


def test_reset_and_keep(model: nn.Module, ids: Tensor) -> None:
    chain, state = adam_state(model, ids)
    for policy, steps in (("reset", set()), ("keep", {3})):
        optimizer = make_optimizer(chain, configured("cola").train)
        load_state(optimizer, STATE[policy](state, 0.9, 0))
        assert {int(s["step"]) for s in optimizer.state_dict()["state"].values()} == steps
        assert set(optimizer.state) <= set(chain.parameters())


def test_relora_in_a_run(config_file: Callable[..., str], raw_config: dict[str, Any], tmp_path: Path) -> None:
    """The second link starts with nine tenths of its moments at zero, and a learning rate that climbs again."""
    del raw_config["schedule"]["links"]
    keys = {"schedule__rewarm": 2, "chain__method": "relora", "train__save_every": 100}
    trainer.train(config.load(config_file(**keys)), quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [row["lr"] for row in map(json.loads, lines) if row["event"] == "train"]
    curve = [0.02 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)]
    climb = [1, 1, 1] + 3 * [1 / 3, 2 / 3, 1]
    assert rates == pytest.approx([a * b for a, b in zip(curve, climb, strict=True)])
    state = saved_state(tmp_path / "run", read_record(tmp_path / "run"))
    assert state is not None
    for entry in state["extra"]["optimizer"]["state"].values():  # of the last link, pruned at its tie
        assert int((entry["exp_avg"] == 0).sum()) >= round(0.9 * entry["exp_avg"].numel())
        assert int(entry["step"]) == 12


@pytest.mark.parametrize("full", [True, False], ids=["trained", "fresh"])
def test_lora_pro_moves_w_as_near_to_its_gradient_as_a_tangent_can(full: bool) -> None:
    torch.manual_seed(0)
    n, k, r, s = 9, 13, 3, 1.7
    a, b, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((r, k), (n, r), (n, k)))
    if not full:
        b.zero_()
    pair = Pair(nn.Parameter(a), nn.Parameter(b), s)
    pair.a.grad, pair.b.grad = s * b.t() @ g, s * g @ a.t()
    given = pair.a.grad.clone(), pair.b.grad.clone()
    GRADIENT["lora-pro"]([pair], configured("lora-pro").train)
    moved = s * (pair.b.grad @ a + b @ pair.a.grad)
    onto_a, onto_b = (m @ torch.linalg.pinv(m) for m in (a.t(), b))
    torch.testing.assert_close(moved, onto_b @ g + g @ onto_a - onto_b @ g @ onto_a)

    def distance(x: Tensor) -> float:
        da, db = pair.a.grad + x @ a, pair.b.grad - b @ x  # every pair that moves W alike
        return float((da - given[0]).square().sum() + (db - given[1]).square().sum())

    best = distance(torch.zeros(r, r, dtype=torch.float64))
    assert all(best <= distance(1e-3 * torch.randn(r, r, dtype=torch.float64)) for _ in range(20))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_with_a_frozen_no_x_is_kept() -> None:
    """Bytes autograd keeps for one linear, the weights aside: LoRA's x [M, K] and S [M, R]; RAC-LoRA's S alone."""
    m, k, n, r = 64, 48, 32, 4
    kept = {}
    for name in ("lora", "rac-lora"):
        net = nn.Sequential(nn.Linear(k, n))
        chain = attach(net, targets=["0"], r=r, frozen=configured(name).chain.frozen)
        parameters = {p.data_ptr() for p in net.parameters()}
        found: dict[int, int] = {}

        def keep(t: Tensor, found: dict[int, int] = found, parameters: set[int] = parameters) -> Tensor:
            if t.data_ptr() not in parameters:
                found[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(m, k, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = net(x)
        y.sum().backward()
        assert x.grad is not None
        assert chain.parameters()[-1].grad is not None
        kept[name] = sum(found.values())
    assert kept == {"lora": 4 * (m * k + m * r), "rac-lora": 4 * m * r}

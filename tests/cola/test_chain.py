"""The chain's invariants (DESIGN.md), and calls out of order."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach, load_chain
from cola_fast.chain.bases import DenseBase
from cola_fast.layers.layer import LoRALinear

from ..conftest import disturb, snapshot, tiny_llama
from .conftest import third_fold_raises


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


# --- 1, 2: the function of the model ----------------------------------------------------------------------------------


def test_attach_preserves_the_function_exactly(model: nn.Module, ids: Tensor) -> None:
    before = logits(model, ids)
    attach(model, targets="all-linear")
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("links", [1, 4])
def test_a_tie_keeps_fp32_logits(model: nn.Module, ids: Tensor, links: int) -> None:
    base = logits(model, ids)
    chain = attach(model, targets="all-linear", r=3)
    for k in range(links):
        disturb(chain, seed=k)
        before = logits(model, ids)
        chain.tie()
        assert relative(logits(model, ids), before) < 1e-6
        chain.extend()
        assert relative(logits(model, ids), before) < 1e-6
    assert relative(before, base) > 1e-2  # the links did something


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_tie_moves_bf16_weights_by_one_rounding_only(rounding: str) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    chain = attach(model, targets="all-linear", r=3, rounding=rounding)
    disturb(chain)
    exact = {n: m.weight.double() + f.scale * (f.b.double() @ f.a.double())
             for (n, m), f in zip(chain.layers.items(), chain.open_factors().values(), strict=True)}  # fmt: skip
    chain.tie()
    for name, layer in chain.layers.items():
        spacing = torch.finfo(torch.bfloat16).eps * exact[name].abs()  # an upper bound of the distance of neighbours
        allowed = spacing * (0.5 if rounding == "nearest" else 1.0) + 1e-9
        assert ((layer.weight.double() - exact[name]).abs() <= allowed * 1.001).all()


def test_live_model_adapter_and_replay_agree(model: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    chain = attach(model, targets=["q_proj", "down_proj"], r=3, rank_pattern={"layers.1.mlp.down_proj": 5})
    chain.save(tmp_path / "run")
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend(2)
    disturb(chain, seed=9)
    chain.save(tmp_path / "run")
    live = logits(model, ids)

    fresh = tiny_llama()
    again = load_chain(fresh, tmp_path / "run")
    assert torch.equal(logits(fresh, ids), live)
    assert [link.sha256 for link in again.links] == [link.sha256 for link in chain.links]
    assert again.open_link is not None
    assert again.open_link.ranks["model.layers.1.mlp.down_proj"] == 5
    assert again.open_link.ranks["model.layers.0.mlp.down_proj"] == 2


# --- 3 is in test_crash.py; 4: a fresh link ---------------------------------------------------------------------------


def test_a_new_link_starts_at_zero_and_differs_from_the_last(model: nn.Module) -> None:
    chain = attach(model, r=4)
    first = chain.open_factors()
    disturb(chain)
    chain.tie()
    assert chain.open_link is None
    assert chain.parameters() == []
    chain.extend()
    second = chain.open_factors()
    for name, factors in second.items():
        assert not factors.b.any()
        assert not torch.equal(factors.a, first[name].a)


def test_initial_values_have_the_variance_peft_gives_them() -> None:
    linear = nn.Sequential(nn.Linear(4096, 8, bias=False))
    a = attach(linear, targets=["0"], r=8).open_factors()["0"].a
    torch.testing.assert_close(a.var(), torch.tensor(1 / (3 * 4096)), rtol=0.03, atol=0)
    assert a.abs().max() <= 4096**-0.5


def test_ranks_step_down(model: nn.Module) -> None:
    chain = attach(model, r=8, first_rank=6)
    assert set(chain.open_factors()["model.layers.0.self_attn.q_proj"].a.shape) == {6, 32}
    chain.tie()
    chain.extend(2)
    chain.tie()
    chain.extend()
    assert [sorted(set(link.ranks.values())) for link in chain.links] == [[6], [2]]
    assert chain.open_factors()["model.layers.0.self_attn.q_proj"].rank == 8


# --- 5: memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_folding_needs_no_copy_of_the_weight(rounding: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    from cola_fast.layers.factors import Factors

    weight = torch.randn(4096, 4096, dtype=torch.bfloat16)
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    factors = Factors(torch.randn(8, 4096), torch.randn(4096, 8), alpha=16.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        DenseBase(rounding).fold(LoRALinear.from_linear(linear), factors, seed=3, report=True)
    live = peak = 0
    for event in sorted(
        (e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    assert 0 < peak < 0.05 * weight.nbytes, f"{peak / weight.nbytes:.1%} of the weight"
    assert linear.weight.data_ptr() == weight.data_ptr()


# --- 6, targets and ranks, is in test_attach.py; the folder in test_chain_folder.py


# --- 7: what may change -----------------------------------------------------------------------------------------------


def test_only_the_open_link_is_trained(model: nn.Module, ids: Tensor) -> None:
    chain = attach(model, targets="all-linear", dropout=0.2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name])


def test_the_layer_is_still_the_same_object(model: nn.Module, ids: Tensor) -> None:
    """Names, hooks, storage and outside references survive attach, tie and detach."""
    layer = model.model.layers[0].self_attn.q_proj
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    pointer, names = layer.weight.data_ptr(), [n for n, _ in model.named_parameters()]
    chain = attach(model)
    disturb(chain)
    chain.tie()
    logits(model, ids)
    assert seen == [1]
    chain.detach()
    assert type(layer) is nn.Linear
    assert model.model.layers[0].self_attn.q_proj is layer
    assert layer.weight.data_ptr() == pointer
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_bias_is_kept_and_frozen() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(7, 6)
    before = net(x)
    chain = attach(net, targets=["0", "2"], r=2)
    torch.testing.assert_close(net(x), before)
    net(x).sum().backward()
    assert all(layer.bias is not None and layer.bias.grad is None for layer in chain.layers.values())


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_detach_does_not_lose_a_trained_link(model: nn.Module) -> None:
    chain = attach(model)
    disturb(chain)
    with pytest.raises(UserError, match="would be lost"):
        chain.detach()
    chain.detach(discard=True)


def test_order_of_calls(model: nn.Module) -> None:
    chain = attach(model)
    with pytest.raises(UserError, match="still open"):
        chain.extend()
    chain.tie()
    with pytest.raises(UserError, match="no open link"):
        chain.tie()
    chain.detach()
    with pytest.raises(UserError, match="has been detached"):
        chain.extend()


def test_after_an_interrupted_fold_the_chain_says_so(model: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    """The weights are of no use any more, the chain is."""
    chain = attach(model)
    disturb(chain)
    trained = logits(model, ids)
    with third_fold_raises(KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        chain.tie()
    for go_on in (chain.extend, lambda: chain.export_merged(tmp_path / "merged")):
        with pytest.raises(UserError, match=r"Folding link 0 was interrupted.* save it, then load the base anew"):
            go_on()
    chain.save(tmp_path / "run")
    with pytest.raises(UserError, match=rf"load the base anew and {tmp_path}/run with load_chain"):
        chain.extend()
    load_chain(fresh := tiny_llama(), tmp_path / "run")
    assert relative(logits(fresh, ids), trained) < 1e-6


def test_modules_without_a_gradient_are_named(model: nn.Module) -> None:
    chain = attach(model)
    chain.tie()  # nobody has trained
    chain.extend()
    disturb(chain)
    with torch.no_grad():
        chain.layers["model.layers.1.self_attn.q_proj"].lora_B.zero_()
    with pytest.warns(UserWarning, match=r"1 of the 4 modules of link 1 had no gradient, such as model.layers.1.self_"):
        chain.tie()


def test_an_optimizer_made_once_for_all_links_is_told_of(model: nn.Module, ids: Tensor) -> None:
    """As in a loop that makes its optimizer first: the second link's factors are in none."""
    chain = attach(model)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.01)

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.tie()
    chain.extend()
    train()
    with pytest.warns(UserWarning, match=r"Link 1 changes nothing: .* make a new one from chain.parameters\(\) after"):
        chain.tie()


@pytest.mark.parametrize(
    "keys", [{"init": "pissa"}, {"init": "carry", "carry": 0.5}, {"gate": "sora"}, {"gate": "dora"}], ids=str
)
def test_a_link_is_idle_wherever_it_starts(model: nn.Module, keys: dict[str, Any]) -> None:
    chain = attach(model, **keys)
    disturb(chain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.tie()
    chain.extend()
    with pytest.warns(UserWarning, match="Link 1 changes nothing"):
        chain.tie()


def overflowing(chain: Any, name: str = "model.layers.1.self_attn.v_proj") -> None:
    """An update of 70,000, which fp16 cannot hold, of factors that it can."""
    disturb(chain)
    with torch.no_grad():
        chain.layers[name].lora_A[0, 0] = 350.0
        chain.layers[name].lora_B[3, 0] = 100.0


@pytest.mark.parametrize("base", ["dense", "ledger"])
def test_a_link_that_the_weights_cannot_hold_is_not_tied(base: str, tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float16)
    chain = attach(model, base=base)
    chain.save(tmp_path / "run")
    overflowing(chain)
    if base == "ledger":  # factors on their own, with the scale in B
        with torch.no_grad():
            chain.layers["model.layers.1.self_attn.v_proj"].lora_B[3, 0] = 40_000.0
    before, state = snapshot(tmp_path), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"Folding link 0 would leave numbers in .*layers.1.*v_proj that float16 cannot"
    ):
        chain.tie()
    with pytest.raises(UserError, match=r"merged weight of .*layers.1.*v_proj would hold numbers that float"):
        chain.export_merged(tmp_path / "merged")
    assert snapshot(tmp_path) == before
    assert chain.open_link is not None
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    with torch.no_grad():
        chain.layers["model.layers.1.self_attn.v_proj"].lora_B[3, 0] = 1.0
    chain.tie()


def test_a_bound_that_is_too_high_does_not_refuse_what_fits() -> None:
    """Rows whose bound is beyond fp16, but whose numbers are not: opposite signs, and different columns."""
    model = tiny_llama(dtype=torch.float16)
    chain = attach(model, r=2, alpha=2)
    layer = chain.layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_A[0, 0], layer.lora_A[1, 1] = 300.0, 300.0
        layer.lora_B[5] = torch.tensor([150.0, -150.0])
        chain.tie()
    assert bool(layer.weight.isfinite().all())
    assert float(layer.weight.abs().max()) > 40_000


def test_a_link_with_nan_is_never_tied(model: nn.Module, tmp_path: Path) -> None:
    chain = attach(model)
    chain.save(tmp_path / "run")
    weights = [layer.weight.clone() for layer in chain.layers.values()]
    before = snapshot(tmp_path)
    with torch.no_grad():
        chain.parameters()[1][0, 0] = float("nan")
    with pytest.raises(UserError, match=r"The open link \(links/000\) holds NaN .* in model.layers.0.self_attn.q_proj"):
        chain.tie()
    assert snapshot(tmp_path) == before
    assert chain.open_link is not None
    assert all(torch.equal(a, layer.weight) for a, layer in zip(weights, chain.layers.values(), strict=True))

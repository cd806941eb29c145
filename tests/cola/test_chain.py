"""The chain's invariants (DESIGN.md), and what attach refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach, load_chain
from cola_fast.bases import DenseBase
from cola_fast.layer import LoRALinear
from cola_kernels import merge_

from ..conftest import disturb, snapshot, tiny_llama


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

    from cola_fast.peft_format import Factors

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


# --- 6: targets and ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"targets": ["q_pro"]}, r"'q_pro' matches no module.* Did you mean q_proj"),
        ({"targets": "layers.9.q_proj"}, r"matches no module"),
        ({"targets": "(["}, r"neither a module name nor a regular expression"),
        ({"targets": ["embed_tokens"]}, r"embed_tokens is a Embedding, but a link can only be attached"),
        ({"rank_pattern": {"k_proj": 4}}, r"rank_pattern key 'k_proj' matches no module.* q_proj|v_proj"),
        ({"r": 0}, r"rank of .* is 0, but its weight is 32 x 32: choose 1 to 32"),
        ({"r": 33}, r"rank of .* is 33"),
        ({"rank_pattern": {"v_proj": 17}}, r"rank of .*v_proj is 17, but its weight is 16 x 32: choose 1 to 16"),
        ({"dropout": 1.0}, r"dropout is 1.0"),
        ({"alpha": 0}, r"alpha is 0"),
        ({"base": "nf5"}, r"base is 'nf5'"),
        ({"rounding": "up"}, r"rounding is 'up'"),
        ({"r": 8.0}, r"rank of .* is 8.0, but a rank is a whole number"),
        ({"first_rank": 0}, r"rank of .* is 0"),
        ({"rank_pattern": ["v_proj"]}, r"rank_pattern is \['v_proj'\], but must map"),
        ({"targets": []}, r"targets is \[\], but must be"),
        ({"targets": None}, r"targets is None"),
        ({"alpha": float("inf")}, r"alpha is inf, but it must be a finite number"),
        ({"dropout": "0.1"}, r"dropout is '0.1', but it must be a finite number"),
        ({"batches": torch.ones(2, 3, dtype=torch.long)}, r"batches is a Tensor of Tensor, but must be a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_leave_the_model_as_it_was(model: nn.Module, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        attach(model, **keys)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_extend_that_fails_leaves_nothing_behind(model: nn.Module, ids: Tensor) -> None:
    chain = attach(model, init="eva", batches=[{"input_ids": ids}])
    chain.tie()
    with pytest.raises(ValueError, match="input_ids"):
        chain.extend(rank_pattern={"q_proj": 3}, batches=[{"input_idz": ids}])
    assert set(chain.extend().ranks.values()) == {8}  # from the batches it had


@pytest.mark.parametrize("base", ["dense", "ledger"])
def test_links_made_in_inference_mode_are_trained(model: nn.Module, ids: Tensor, base: str) -> None:
    with torch.inference_mode():
        chain = attach(model, base=base)
    for _ in range(2):
        disturb(chain)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in chain.parameters())
        with torch.inference_mode():
            chain.tie()
            chain.extend()


def test_adapters_of_peft_get_no_links(model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match=r"q_proj.* belongs to a LoRA layer of PEFT: merge"):
        attach(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), targets="all-linear")


def test_tied_weights_are_refused() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head shares its weight with model.embed_tokens"):
        attach(model, targets=["lm_head"])


def test_unsupported_modules_are_refused_and_nothing_is_half_done(model: nn.Module) -> None:
    class Special(nn.Linear):
        pass

    model.model.layers[1].self_attn.v_proj = Special(32, 16, bias=False)
    with pytest.raises(UserError, match=r"v_proj is a .*Special, but a link can only be attached to a plain"):
        attach(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_a_replaced_forward_is_refused(model: nn.Module) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    with pytest.raises(UserError, match="has had its forward replaced"):
        attach(model)


def test_all_linear_leaves_the_head_out(model: nn.Module) -> None:
    chain = attach(model, targets="all-linear")
    assert len(chain.layers) == 14
    assert "lm_head" not in chain.layers


def test_a_second_chain_is_refused(model: nn.Module) -> None:
    attach(model)
    with pytest.raises(UserError, match="already belongs to a chain"):
        attach(model)


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


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    chain = attach(tiny_llama(), r=2)
    chain.save(tmp_path / "run")
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend()
    chain.save(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncate", "edit", "remove"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_link_is_named_and_the_model_untouched(saved: Path, damage: str, file: str) -> None:
    path = saved / "links" / "001" / file
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if damage == "truncate" else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=rf"links/001/{file} is (not the file|missing)"):
        load_chain(model, saved)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="this model's weights differ"):
        load_chain(tiny_llama(seed=1), saved)


def test_a_model_with_tied_links_is_refused(saved: Path) -> None:
    """Folding twice is the one mistake that would be silent."""
    model = tiny_llama()
    load_chain(model, saved).detach()
    with pytest.raises(UserError, match="already"):
        load_chain(model, saved)


def test_a_chain_may_be_loaded_in_another_dtype(saved: Path, ids: Tensor) -> None:
    wide, narrow = tiny_llama(), tiny_llama(dtype=torch.bfloat16)
    load_chain(wide, saved)
    load_chain(narrow, saved)
    assert relative(logits(narrow, ids), logits(wide, ids)) < 0.05


def test_an_earlier_point_can_be_looked_at_but_not_written(saved: Path, ids: Tensor) -> None:
    before = snapshot(saved)
    model = tiny_llama()
    chain = load_chain(model, saved, links=1)
    assert (len(chain.links), chain.open_link) == (1, None)
    whole = tiny_llama()
    load_chain(whole, saved)
    chain.replay(1)
    assert torch.equal(logits(model, ids), logits(whole, ids))
    earlier = load_chain(tiny_llama(), saved, links=1)
    earlier.extend()
    with pytest.raises(UserError, match="earlier point"):
        earlier.tie()
    with pytest.raises(UserError, match="earlier point"):
        earlier.save(saved)
    with pytest.raises(UserError, match="links=3"):
        load_chain(tiny_llama(), saved, links=3)
    assert snapshot(saved) == before


def test_a_damaged_state_falls_back_to_the_one_before(saved: Path) -> None:
    newest = sorted((saved / "state").glob("*.pt"))[-1]
    older = newest.with_name("00000000.pt")
    chain = load_chain(tiny_llama(), saved)
    chain.save(saved)  # now two states of link 2
    newest = sorted((saved / "state").glob("*.pt"))[-1]
    assert newest.name != older.name
    newest.write_bytes(newest.read_bytes()[:100])
    assert load_chain(tiny_llama(), saved).open_link is not None


def test_only_two_states_are_kept(model: nn.Module, tmp_path: Path) -> None:
    chain = attach(model)
    for _ in range(5):
        chain.save(tmp_path)
    assert [p.name for p in sorted((tmp_path / "state").iterdir())] == ["00000003.pt", "00000004.pt"]


def test_another_chain_in_the_folder_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="already holds a chain"):
        attach(tiny_llama()).save(saved)


@pytest.mark.parametrize("content", ['{"format": 99}', "[]", "{", None], ids=["newer", "list", "cut", "absent"])
def test_unreadable_chain_files(saved: Path, content: str | None) -> None:
    path = saved / "chain.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"chain.json (has format|is damaged|is missing)"):
        load_chain(tiny_llama(), saved)


def test_a_saved_chain_can_move(saved: Path, tmp_path: Path, ids: Tensor) -> None:
    here = tiny_llama()
    load_chain(here, saved)
    shutil.move(saved, tmp_path / "elsewhere")
    there = tiny_llama()
    load_chain(there, tmp_path / "elsewhere")
    assert torch.equal(logits(here, ids), logits(there, ids))


def test_the_record_says_what_the_fold_kept(saved: Path) -> None:
    record = json.loads((saved / "chain.json").read_text())
    assert [entry["index"] for entry in record["links"]] == [0, 1]
    assert all(entry["fold"]["retained"] == pytest.approx(1, abs=1e-5) for entry in record["links"])


def test_report_measures_what_was_lost() -> None:
    """An update below half a bf16 spacing is lost by nearest rounding; stochastic rounding keeps it in expectation."""
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    a, b = torch.ones(1, 256), torch.full((256, 1), 2**-10)
    kept = {r: merge_(weight.clone(), a, b, 1.0, rounding=r, report=True) for r in ("nearest", "stochastic")}
    assert kept["nearest"] == (0.0, 1.0)
    # 65,536 draws that move by 2**-7 with probability 1/8: standard deviation of the mean sqrt(7) / 256
    assert abs(kept["stochastic"].retained - 1) < 4 * 7**0.5 / 256

"""Chains on 4-bit weights of bitsandbytes, in place and with a ledger; ledgers on dense ones."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach, config, load_chain, store
from cola_fast.chain.best import load_best, save_best
from cola_fast.chain.chain import Chain
from cola_fast.commands.report import dry_run, export_run, score_run
from cola_fast.config import ModelConfig
from cola_fast.training.models import load_model
from cola_fast.training.trainer import train

from ..conftest import disturb, tiny_llama
from .three import separate, zero_grad

bnb = pytest.importorskip("bitsandbytes")
DTYPES = ["fp32", "bf16"]


@pytest.fixture
def load(wide_folder: Path) -> Callable[..., nn.Module]:
    def load(dtype: str = "fp32", *, in_4bit: bool = True) -> nn.Module:
        return load_model(ModelConfig(name=str(wide_folder), dtype=dtype, device="cpu", load_in_4bit=in_4bit))

    return load


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result.double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def codes(chain: Chain) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in chain.layers.values()]


def scales(chain: Chain) -> list[Tensor]:
    return [layer.weight.quant_state.absmax.clone() for layer in chain.layers.values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- the function of the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_attach_preserves_what_bitsandbytes_computes(load: Callable[..., nn.Module], ids: Tensor, dtype: str) -> None:
    model = load(dtype).train()  # in eval mode it would repack its weights
    before = logits(model, ids)
    attach(model, targets="all-linear", r=2)
    assert relative(logits(model, ids), before) < (1e-6 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize("in_4bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tie_into_a_ledger_is_exact(load: Callable[..., nn.Module], ids: Tensor, dtype: str, in_4bit: bool) -> None:
    """Up to the factors' own rounding to the compute dtype, as open links have it too."""
    model = load(dtype, in_4bit=in_4bit)
    base = logits(model.train(), ids)
    chain = attach(model, targets="all-linear", r=2, base="ledger")
    before = codes(chain)
    for k in range(3):
        disturb(chain, seed=k)
        trained = logits(model, ids)
        link = chain.tie()
        assert relative(logits(model, ids), trained) < (1e-6 if dtype == "fp32" else 2e-2)
        chain.extend()
        assert relative(logits(model, ids), trained) < (1e-6 if dtype == "fp32" else 2e-2)
        assert link.fold["retained"] == 1
    assert same(codes(chain), before)
    assert relative(trained, base) > 0.05


def test_a_ledger_is_not_dropped(load: Callable[..., nn.Module], ids: Tensor) -> None:
    """With the open link at B = 0, dropout must not change anything, forward or backward."""
    chain = attach(load(), targets="all-linear", r=2, dropout=0.5)
    disturb(chain)
    chain.tie()
    chain.extend()
    layer = next(iter(chain.layers.values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    grads = []
    for training in (False, True):
        y = layer.train(training)(x)
        grads.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    (y_eval, dx_eval), (y_train, dx_train) = grads
    assert relative(y_train.double(), y_eval.double()) < 1e-6
    assert relative(dx_train.double(), dx_eval.double()) < 1e-6


def test_gradients_beside_a_ledger(load: Callable[..., nn.Module]) -> None:
    """Those of the open link, as plain autograd gives them in fp64 with every sealed link in the weight."""
    chain = attach(load(), targets="all-linear", r=2, alpha=6)
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend()
    disturb(chain, seed=7)
    layer = next(iter(chain.layers.values()))
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    x = torch.randn(5, layer.in_features)
    layer(x).square().sum().backward()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    y = x.double() @ (layer.dense_weight().double() + layer.scale * b @ a).t()
    for found, expected in zip(
        (layer.lora_A.grad, layer.lora_B.grad), torch.autograd.grad(y.square().sum(), (a, b)), strict=True
    ):
        assert found is not None
        assert relative(found.double(), expected) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.usefixtures("one_seed")
def test_layers_with_a_ledger_run_as_groups(
    load: Callable[..., nn.Module], ids: Tensor, launches: list[int], dropout: float
) -> None:
    model = load().train()
    chain = attach(model, targets="all-linear", r=2, dropout=dropout)
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend(3)
    disturb(chain, seed=7)
    found = []
    for each in (model, separate(copy.deepcopy(model))):
        for _ in range(2):
            launches.clear()
            zero_grad(each)
            each(ids, labels=ids).loss.backward()
        found.append((list(launches), [p.grad for p in each.parameters() if p.grad is not None]))
    (together, grads), (alone, exact) = found
    assert together == [3, 1, 2, 1] * 2
    assert alone == [1] * 14
    for one, other in zip(grads, exact, strict=True):
        assert relative(one.double(), other.double()) < 1e-5


def test_a_tie_into_nf4_rewrites_codes_only(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    chain = attach(load(), targets="all-linear", r=2, base="nf4")
    before, before_scales = codes(chain), scales(chain)
    storage = [layer.weight.data_ptr() for layer in chain.layers.values()]
    disturb(chain)
    link = chain.tie()
    assert not same(codes(chain), before)
    assert same(scales(chain), before_scales)
    assert [layer.weight.data_ptr() for layer in chain.layers.values()] == storage
    # Stochastic rounding is unbiased inside the range of the levels, so retained is 1 but for its noise.
    assert 0.8 < link.fold["retained"] < 1.2
    chain.extend()
    chain.save(tmp_path / "run")
    again = load_chain(load(), tmp_path / "run")
    assert same(codes(again), codes(chain))
    record = json.loads((tmp_path / "run" / "chain.json").read_text())
    assert record["base_kind"] == "nf4"
    assert record["base"]["quantisation"] == "nf4, blocks of 64, double"


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_best_link_is_that_of_the_evaluation(
    load: Callable[..., nn.Module], ids: Tensor, tmp_path: Path, init: str
) -> None:
    """What PiSSA starts from has left the 4-bit codes, which rounded."""
    chain = attach(model := load(), r=4, targets="all-linear", base="nf4", init=init)
    chain.save(tmp_path)
    disturb(chain)
    save_best(chain, tmp_path, step=3, loss=1.0)
    best = load_best(load(), tmp_path)
    for name, layer in chain.layers.items():
        assert torch.equal(best.layers[name].weight, layer.weight)
    torch.testing.assert_close(logits(best.model, ids), logits(model, ids))


def repacking(model: nn.Module) -> nn.Module:
    """As whoever loads a model without our help has it."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    return model


@pytest.mark.parametrize("keys", [{"targets": "all-linear"}, {"targets": "down_proj"}, {"init": "eva"}], ids=str)
def test_evaluating_before_training_is_safe(load: Callable[..., nn.Module], ids: Tensor, keys: dict[str, Any]) -> None:
    """bitsandbytes repacks a weight when it first runs in eval mode on a CPU, and then no gradient passes through it:
    that of a layer without a link, too. An init that looks at data evaluates by itself."""

    def gradients(evaluate: bool) -> list[Tensor]:
        model = load("bf16") if not evaluate else repacking(load("bf16"))
        chain = attach(model, r=2, **keys, **({"batches": [{"input_ids": ids}]} if "init" in keys else {}))
        disturb(chain)
        if evaluate:
            logits(chain.model.eval(), ids)
        chain.model.train()
        chain.model(ids).logits.float().square().mean().backward()
        return [p.grad for p in chain.parameters() if p.grad is not None]

    assert same(gradients(True), gradients(False))


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
def test_bitsandbytes_may_repack_before_and_after_a_chain_but_not_during_it(
    load: Callable[..., nn.Module], ids: Tensor
) -> None:
    def repacked(model: nn.Module) -> int:
        states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in model.modules()]
        return sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states)

    model = repacking(load("bf16"))
    chain = attach(model, targets="down_proj", r=2)
    logits(model.eval(), ids)
    assert repacked(model) == 0
    chain.detach()
    logits(model.eval(), ids)
    assert repacked(model) == 14
    with pytest.raises(UserError, match=r"down_proj cannot take a link: weight was repacked .* load the model again"):
        attach(model, targets="down_proj", r=2)


# --- runs and exports -------------------------------------------------------------------------------------------------


@pytest.fixture
def qlora(raw_config: dict[str, Any], wide_folder: Path) -> dict[str, Any]:
    raw_config["model"] |= {"name": str(wide_folder), "load_in_4bit": True}
    raw_config["chain"] |= {"targets": "all-linear"}
    raw_config["train"] |= {"activation_checkpointing": True, "optimizer": "adamw-8bit"}
    return raw_config


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "ledger"])
def test_a_qlora_run(qlora: dict[str, Any], tmp_path: Path, base: str) -> None:
    """Train, score, export both ways; the export is what was scored."""
    qlora["chain"]["base"] = base
    result = train(config.from_dict(qlora), quiet=True)
    rows = {row["model"]: row for row in score_run(result.run)}
    assert rows["after 3 links"]["loss"] < rows["base"]["loss"]
    # fp32 here, so a dequantised export is exact
    assert rows["merged export"]["loss"] == pytest.approx(rows["after 3 links"]["loss"], rel=1e-4)
    assert "dequantised" in export_run(result.run, "merged")
    export_run(result.run, "merged", onto="original", out=str(tmp_path / "original"))
    saved = json.loads((tmp_path / "original" / "config.json").read_text())
    assert "quantization_config" not in saved


@pytest.mark.slow
def test_links_go_onto_the_original_weights(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    chain = attach(load(), targets="all-linear", r=2)
    disturb(chain)
    deltas = {name: f.scale * (f.b.double() @ f.a.double()) for name, f in chain.open_factors().items()}
    chain.tie()
    original = load(in_4bit=False)
    expected = {name: original.get_submodule(name).weight.double() + delta for name, delta in deltas.items()}
    chain.export_merged(tmp_path / "merged", onto=original)
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, weight in expected.items():
        assert relative(written.get_submodule(name).weight.double(), weight) < 1e-6
    with pytest.raises(UserError, match="cannot go onto this model"):
        chain.export_merged(tmp_path / "other", onto=tiny_llama())


@pytest.mark.slow
def test_peft_loads_a_chain_on_its_4_bit_base(load: Callable[..., nn.Module], ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    chain = attach(load(), targets="all-linear", r=2)
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend()
    chain.export_adapter(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert relative(logits(theirs, ids), logits(chain.model, ids)) < 1e-4


def test_the_memory_estimate_counts_4_bits(qlora: dict[str, Any]) -> None:
    weights = {}
    for in_4bit in (True, False):
        qlora["model"]["load_in_4bit"] = in_4bit
        plan = dry_run(config.from_dict(qlora))
        weights[in_4bit] = float(re.search(r"weights ([\d.]+) MiB", plan)[1])  # type: ignore[index]
    # fp32; the linears are 5/6 of this tiny model
    assert 0.2 * weights[False] < weights[True] < 0.5 * weights[False]


def test_a_dry_run_refuses_what_4_bits_cannot_do(qlora: dict[str, Any]) -> None:
    qlora["chain"]["gate"] = "dora"
    with pytest.raises(UserError, match=r"\(DoRA\), which only a dense weight can take"):
        dry_run(config.from_dict(qlora))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_4bit", "keys", "sentence"),
    [
        (True, {"base": "dense"}, "base is dense, but the model's weights are NF4"),
        (False, {"base": "nf4"}, "base is nf4, but no targeted weight is NF4"),
        (True, {"base": "paged"}, "must be auto, dense, nf4 or ledger"),
        (True, {"rounding": "up"}, "must be one of auto, nearest, stochastic"),
    ],
)
def test_bases_that_do_not_fit(load: Callable[..., nn.Module], in_4bit: bool, keys: Any, sentence: str) -> None:
    model = load(in_4bit=in_4bit)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=sentence):
        attach(model, targets="all-linear", r=2, **keys)
    assert [type(m) for m in model.modules()] == kinds


def _fp4() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(64, 64, bias=False, quant_type="fp4").to("cpu")


def _not_yet_quantised() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")


def _partial_block() -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu")


def _lost_state() -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    layer.weight.quant_state = None
    return layer


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_fp4, "quantised to fp4"),
        (_not_yet_quantised, "without a quant_state"),
        (_lost_state, "without a quant_state"),
        (_partial_block, r"shape \[64, 96\] in blocks of 64.*K a multiple of the block"),
    ],
)
def test_other_quantised_layers(make: Callable[[], nn.Module], sentence: str) -> None:
    layer = make()
    before = layer.weight.detach().clone()
    with pytest.raises(UserError, match=sentence):
        attach(nn.Sequential(layer), targets="0", r=2)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda record: record.pop("seed"), "does not say the chain's seed"),
        (lambda record: record.update(seed=None), "does not say the chain's seed"),
        (lambda record: record.update(base_kind="ledger"), "link 0 that was tied into a base of kind nf4.* is ledger"),
        (lambda record: record["links"][0].update(base_kind="ledger"), "base of kind ledger.* is nf4"),
    ],
    ids=["no seed", "null seed", "another base", "another link"],
)
def test_what_a_replay_needs(
    load: Callable[..., nn.Module], tmp_path: Path, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    chain = attach(load(), targets="all-linear", r=2, base="nf4")
    disturb(chain)
    chain.tie()
    chain.save(tmp_path / "run")
    file = tmp_path / "run" / "chain.json"
    record = store.read_sealed(file)[0]
    change(record)
    store.write_sealed(file, record)
    model = load()
    before = [m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(UserError, match=sentence):
        load_chain(model, tmp_path / "run")
    assert same(before, [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)])


def test_another_base_kind_or_another_quantisation(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    chain = attach(load(), targets="all-linear", r=2, base="nf4")
    chain.save(tmp_path / "run")
    with pytest.raises(UserError, match="weights differ"):
        load_chain(load(in_4bit=False), tmp_path / "run")


def test_a_ledger_is_not_lost_by_detaching(load: Callable[..., nn.Module]) -> None:
    chain = attach(load(), targets="all-linear", r=2)
    disturb(chain)
    chain.tie()
    with pytest.raises(UserError, match="detaching would lose them"):
        chain.detach()
    model = chain.detach(discard=True)
    assert {type(m).__name__ for m in model.modules() if "proj" in type(m).__name__.lower() or "4bit" in str(type(m))}


def test_onto_the_original_needs_a_4_bit_chain(raw_config: dict[str, Any]) -> None:
    raw_config["schedule"] |= {"links": 1, "steps": 2}
    result = train(config.from_dict(raw_config), quiet=True)
    with pytest.raises(UserError, match="--onto original"):
        export_run(result.run, "merged", onto="original")

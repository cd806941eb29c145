"""Every method of the registry keeps what a chain promises; and the registry itself. Each one's own rule is tested in
`test_method_rules.py`, or in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import Chain, UserError, attach, config, load_chain
from cola_fast.config import Config, ModelConfig
from cola_fast.layers.layer import LoRALinear
from cola_fast.methods import AFTER_STEP, GRADIENT, METHODS, PERTURB, SLOTS, Step, table
from cola_fast.training import trainer
from cola_fast.training.models import load_model
from cola_fast.training.optimizer import make_optimizer, set_lr

from ..conftest import tiny_llama
from .test_chain import logits, relative

ALL = pytest.mark.parametrize("name", METHODS)
SLOW_LEARNERS = ("adalora", "rac-lora", "ffa-lora", "lora-pro", "xgblora")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # `wide_folder`, from which the 4-bit model is loaded


def configured(*names: str, **chain: Any) -> Config:
    raw = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}, "schedule": {"steps": 100}}
    return config.from_dict({**raw, "chain": {"method": list(names), "targets": "all-linear", **chain}})


def corrects(name: str) -> bool:
    """Whether the method is for 4-bit models only, whose function it changes on purpose."""
    return METHODS[name].defaults.get("chain", {}).get("init") == "loftq"


@pytest.fixture
def fresh(wide_folder: Path) -> Callable[..., nn.Module]:
    """A base model of the kind that the method is for."""

    def load(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        if not corrects(name):
            return tiny_llama(dtype=dtype)
        pytest.importorskip("bitsandbytes")
        key = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        return load_model(ModelConfig(name=str(wide_folder), dtype=key, device="cpu", load_in_4bit=True))

    return load


def looked_at() -> list[dict[str, Tensor]]:
    """Batches for the inits that start from data: the second one padded."""
    ids = torch.randint(2, 64, (2, 3, 12), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids[1])
    mask[:, 8:] = 0
    padded = {"input_ids": ids[1], "labels": ids[1].masked_fill(mask == 0, -100), "attention_mask": mask}
    return [{"input_ids": ids[0], "labels": ids[0]}, padded]


def chain_of(model: nn.Module, made: Config, **keys: Any) -> Chain:
    c = made.chain
    return attach(
        model, r=min(c.r, 3), alpha=4, targets=c.targets, init=c.init, scaling=c.scaling, frozen=c.frozen,
        share=c.share, carry=c.carry, gate=c.gate, batches=looked_at(), original=tiny_llama(**WIDE), **keys,
    )  # fmt: skip


def run_config(name: str, raw: dict[str, Any], wide_folder: Path) -> None:
    """A run of the method on the kind of model that it is for."""
    del raw["schedule"]["links"]
    raw["chain"] = {"method": name, "targets": "all-linear", "alpha": 4, "r": 1 if name == "xgblora" else 4}
    if corrects(name):
        raw["model"] |= {"name": str(wide_folder), "load_in_4bit": True}


def pretend_to_train(chain: Chain, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            size = 1.0 if name.endswith("lora_e") else 0.03  # AdaLoRA's start at 0, with small factors
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


# --- shared by all ----------------------------------------------------------------------------------------------------


@ALL
def test_links_open_and_tie_without_changing_the_function(
    name: str, ids: Tensor, fresh: Callable[..., nn.Module]
) -> None:
    model = fresh(name)
    before = base = logits(model, ids)
    chain = chain_of(model, configured(name))
    if corrects(name):
        goal, before = logits(tiny_llama(**WIDE), ids), logits(model, ids)
        assert relative(before, goal) < relative(base, goal)
    for link in range(3):
        assert relative(logits(model, ids), before) < 1e-5, f"link {link} changed the function when it was opened"
        pretend_to_train(chain, link)
        before = logits(model, ids)
        chain.tie()
        assert relative(logits(model, ids), before) < 1e-5, f"link {link} changed the function when it was tied"
        chain.extend()
    assert relative(before, base) > 1e-2


@ALL
def test_the_exported_adapter_is_the_live_model(
    name: str, ids: Tensor, tmp_path: Path, fresh: Callable[..., nn.Module]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = fresh(name)
    chain = chain_of(model, configured(name), rank_pattern={"v_proj": 2, "down_proj": 1})
    for link in range(2):
        pretend_to_train(chain, link)
        chain.tie()
        chain.extend()
    pretend_to_train(chain, 9)
    live = logits(model, ids)
    if name == "dora":
        with pytest.raises(UserError, match=r"has 3 links that scale whole rows .* Use export_merged"):
            chain.export_adapter(tmp_path / "adapter")
    else:
        chain.export_adapter(tmp_path / "adapter")
        assert relative(logits(PeftModel.from_pretrained(fresh(name), tmp_path / "adapter"), ids), live) < 1e-5
    chain.export_merged(tmp_path / "merged")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), live) < 1e-5


@ALL
def test_a_replay_gives_the_same_bits(name: str, tmp_path: Path, fresh: Callable[..., nn.Module]) -> None:
    """In bf16, whose stochastic rounding would show a fold done in another order. With the link open, and once tied."""

    def weights(chain: Chain) -> list[Tensor]:
        factors = [part for f in chain.live_factors().values() for part in f if isinstance(part, Tensor)]
        return [layer.weight for layer in chain.layers.values()] + factors

    chain = chain_of(fresh(name, torch.bfloat16), configured(name))
    chain.save(tmp_path)
    for link in range(2):
        pretend_to_train(chain, link)
        chain.tie()
        again = load_chain(fresh(name, torch.bfloat16), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(weights(chain), weights(again), strict=True))
        chain.extend()
        pretend_to_train(chain, 5 + link)
        chain.save(tmp_path)
        again = load_chain(fresh(name, torch.bfloat16), tmp_path)
        assert again.settings == chain.settings
        assert all(torch.equal(a, b) for a, b in zip(weights(chain), weights(again), strict=True))
    assert chain.tie().sha256 == again.tie().sha256


@ALL
def test_gradients_are_finite_and_only_the_link_trains(name: str, ids: Tensor, fresh: Callable[..., nn.Module]) -> None:
    made, model = configured(name), fresh(name)
    chain = chain_of(model, made)
    optimizer = make_optimizer(chain, made.train)
    set_lr(optimizer, 0.01)
    trained = {id(p) for p in chain.parameters()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in trained}
    before = [p.clone() for p in chain.parameters()]
    for step in range(3):
        with PERTURB[made.train.perturb](chain.layers, 0.5, step, made.train) if made.train.perturb else nullcontext():
            model(ids, labels=ids).loss.backward()
        if made.train.gradient is not None:
            GRADIENT[made.train.gradient](chain.pairs(), made.train)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in chain.parameters())
        optimizer.step()
        if made.train.after_step is not None:
            AFTER_STEP[made.train.after_step](chain.pairs(), Step(0.01, 0.05, made.train, optimizer.state))
        optimizer.zero_grad()
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == trained
    assert all(p.grad is None and torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not any(torch.equal(a, b) for a, b in zip(before, chain.parameters(), strict=True))
    factors = chain.open_factors()
    assert chain.tie().factors().keys() == factors.keys()


@ALL
def test_detaching_an_untrained_link_gives_the_model_back(
    name: str, ids: Tensor, fresh: Callable[..., nn.Module]
) -> None:
    model = fresh(name)
    before = logits(model, ids)
    chain = chain_of(model, configured(name))
    pretend_to_train(chain, 1)
    with pytest.raises(UserError, match="would be lost"):
        chain.detach()
    chain.detach(discard=True)
    assert relative(logits(model, ids), before) < 1e-5
    chain_of(model, configured(name)).detach(discard=corrects(name))  # LoftQ's is a change before it is trained


@pytest.mark.slow
@ALL
def test_every_method_learns(
    name: str, config_file: Callable[..., str], raw_config: dict[str, Any], wide_folder: Path
) -> None:
    """With its own presets, except that ReLoRA's warm-up has to fit into a link of 30 steps, and that the moments it
    keeps diverge at the others' learning rate."""
    run_config(name, raw_config, wide_folder)
    keys = {
        "train__save_every": 1000,
        "train__log_every": 1000,
        **({"schedule__rewarm": 10} if name == "relora" else {}),
    }
    steps = 240 if name in SLOW_LEARNERS else 120
    path = config_file(schedule__steps=steps, schedule__lr=0.001 if name == "relora" else 0.005, **keys)
    result = trainer.train(config.load(path), quiet=True)
    assert result.score is not None
    assert result.score.accuracy is not None
    assert result.score.accuracy >= 0.9, result.score
    assert result.links == config.load(path).schedule.links


@ALL
def test_a_dry_run_counts_what_will_train(
    name: str, config_file: Callable[..., str], raw_config: dict[str, Any], wide_folder: Path
) -> None:
    from cola_fast.commands.report import dry_run

    run_config(name, raw_config, wide_folder)
    raw_config["chain"]["r"] = 3
    made = config.load(config_file(schedule__links=2))
    chain = chain_of(load_model(made.model), made)
    trained = sum(p.numel() for p in chain.parameters())
    assert f"{len(chain.pairs())} layers, {trained:,} trainable" in dry_run(made)


# --- which method is which --------------------------------------------------------------------------------------------


def test_the_page_of_methods_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert table() in page, "run: python -m benchmarks report"


def test_presets_combine_and_contradictions_are_named() -> None:
    made = configured("cola", "pissa", "rslora", "lora+")
    assert (made.schedule.links, made.chain.init, made.chain.scaling, made.train.lr_ratio) == (3, "pissa", "rslora", 16)
    with pytest.raises(UserError, match=r"methods cola and lora set schedule.links to 3 and 1: write the key yourself"):
        configured("cola", "lora")
    raw = {"model": {"name": "m"}, "data": {"train": "t"}, "chain": {"method": ["cola", "lora"]}}
    assert config.from_dict({**raw, "schedule": {"links": 2, "steps": 9}}).schedule.links == 2


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.key)
def test_an_unknown_name_lists_the_known_ones(slot: Any) -> None:
    section, key = slot.key.split(".")
    raw = {"model": {"name": "m"}, "data": {"train": "t"}, "schedule": {"steps": 9}}
    with pytest.raises(UserError, match=rf"{slot.key} is 'abacus', but must be one of {next(iter(slot))}"):
        config.from_dict(raw, [f"{section}.{key}=abacus"])


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"init": "pisa"}, r"^init is 'pisa', but must be one of .* Did you mean pissa"),
        ({"scaling": "rs"}, r"^scaling is 'rs'"),
        ({"frozen": "c"}, r"frozen is 'c', but must be 'a', 'b' or None"),
        ({"share": 0.0}, r"share is 0.0"),
        ({"carry": 2.0}, r"carry is 2.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_attach_refuses_and_leaves_the_model(model: nn.Module, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        attach(model, **keys)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["chain.method=[rac-lora, lora-pro]"], r"train.gradient is lora-pro, which needs both factors trained"),
        (["chain.method=[xgblora, relora]", "links=4", "optimizer_state=keep"], r"links cover different modules"),
        (["chain.method=relora", "lr_span=restart"], r"schedule.rewarm returns to the global"),
        (["chain.method=gelora", "schedule.ranks=[8]"], r"chain.ranks is gelora, which decides the rank"),
        (["gelora.mean_rank=0.5"], r"chain.gelora.mean_rank is 0.5"),
        (["prune=1.5"], r"schedule.prune is 1.5"),
    ],
)
def test_what_cannot_be_combined(overrides: list[str], sentence: str) -> None:
    raw = {"model": {"name": "m"}, "data": {"train": "t"}, "schedule": {"steps": 9}}
    with pytest.raises(UserError, match=sentence):
        config.from_dict(raw, overrides)

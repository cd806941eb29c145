"""Chains on the 8-bit weights of bitsandbytes (LLM.int8): beside a base that never changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from cola_fast import ChainCallback, UserError, attach, cli, config, load_chain
from cola_fast.chain.coverage import coverage
from cola_fast.commands.report import dry_run, export_run, score_run
from cola_fast.config import ModelConfig
from cola_fast.layers import weights
from cola_fast.layers.weights.int8 import Int8
from cola_fast.training.batch_checks import check_causal, check_packing, check_padding
from cola_fast.training.checkpoint_files import refuse_not_finite
from cola_fast.training.models import load_model

from ..conftest import disturb, snapshot, tiny_llama
from .trainer_runs import token_rows

bnb = pytest.importorskip("bitsandbytes")
Load = Callable[..., Any]


@pytest.fixture
def load(wide_folder: Path) -> Load:
    def load(dtype: str = "fp32", name: Path = wide_folder, **keys: Any) -> Any:
        options = {"load_in_8bit": True, **keys}
        return load_model(ModelConfig(name=str(name), dtype=dtype, device="cpu", **options))  # type: ignore[arg-type]

    return load


@pytest.fixture(scope="module")
def packed(wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is stored so, as transformers writes it."""
    folder = tmp_path_factory.mktemp("packed") / "llama-8bit"
    options = ModelConfig(name=str(wide_folder), dtype="bf16", device="cpu", load_in_8bit=True)
    load_model(options).save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(wide_folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    return folder


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result.double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def of_base(model: nn.Module) -> dict[str, bytes]:
    """The codes and the scales of every 8-bit weight."""
    found = ((name, weight) for name, weight in weights.in_model(model) if isinstance(weight, Int8))
    return {name: b"".join(part.numpy().tobytes() for part in weight.parts()) for name, weight in found}


def two_links(chain: Any) -> Any:
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend()
    disturb(chain, seed=7)
    return chain


# --- the function of the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attaching_changes_nothing(load: Load, ids: Tensor, dtype: str, training: bool) -> None:
    """bitsandbytes multiplies, in either mode, as it did before; and again once the chain is gone."""
    model = load(dtype).train(training)
    before, state = logits(model, ids), dict(model.state_dict())
    chain = attach(model, targets="all-linear", r=2)
    assert (chain.base.kind, chain.identity["quantisation"]) == ("ledger", "int8, a scale a row")
    assert torch.equal(logits(model, ids), before)
    kept = {key: value for key, value in model.state_dict().items() if "lora" not in key}
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[key], value) for key, value in state.items())
    chain.detach(discard=True)
    assert torch.equal(logits(model, ids), before)
    assert type(model.model.layers[0].mlp.up_proj) is bnb.nn.Linear8bitLt


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tie_is_exact_and_leaves_the_base_alone(load: Load, ids: Tensor, dtype: str) -> None:
    model = load(dtype).train()
    base, before = logits(model, ids), of_base(model)
    assert len(before) == 14
    chain = attach(model, targets="all-linear", r=2)
    for k in range(3):
        disturb(chain, seed=k)
        trained = logits(model, ids)
        assert chain.tie().fold["retained"] == 1
        assert relative(logits(model, ids), trained) < (1e-6 if dtype == "fp32" else 2e-2)
        chain.extend()
        assert relative(logits(model, ids), trained) < (1e-6 if dtype == "fp32" else 2e-2)
    assert of_base(model) == before
    assert relative(trained, base) > 0.05
    assert chain.layers["model.layers.0.mlp.up_proj"].ledger_A.dtype == next(model.parameters()).dtype


def test_weights_are_read_as_bitsandbytes_multiplies_by_them(load: Load) -> None:
    """Before the first forward, which moves the scales, and after it."""
    layer = load().train().model.layers[0].mlp.up_proj
    exact = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    found = [weights.of(layer).dense()]
    x = torch.eye(layer.in_features)
    y = layer(x)
    found.append(weights.of(layer).dense())
    assert torch.equal(*found)
    assert torch.equal(y.t(), found[0])
    assert relative(found[0], exact) < 1e-7
    assert weights.of(layer).dense(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("gate", [None, "sora"])
def test_gradients_are_those_of_the_dequantised_weight(load: Load, gate: str | None, dropout: float) -> None:
    """Of the link, its gate and x, in fp64, beside a ledger, which is not dropped."""
    chain = attach(load().train(), targets="up_proj", r=2, alpha=6, gate=gate, dropout=dropout)
    two_links(chain)
    layer = next(iter(chain.layers.values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), dropout).double()
    parts = [layer.lora_A, layer.lora_B, x] + ([] if gate is None else [layer.lora_e])
    a, b, x64, *e = (p.detach().double().requires_grad_() for p in parts)
    scaled = layer.scale * (b * e[0] if e else b)
    y = x64 @ layer.dense_weight().double().t() + (x64 * mask) @ a.t() @ scaled.t()
    for part, exact in zip(parts, torch.autograd.grad(y.square().sum(), (a, b, x64, *e)), strict=True):
        assert part.grad is not None
        assert relative(part.grad, exact) < 1e-5


def test_autocast_checkpointing_and_a_copy(load: Load, ids: Tensor) -> None:
    import copy

    chain = two_links(attach(load().train(), targets="all-linear", r=2))
    model: Any = chain.model
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))

    def grads() -> list[Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in chain.parameters()]

    plain = grads()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(one, other) for one, other in zip(plain, grads(), strict=True))
    assert relative(torch.cat([g.flatten() for g in mixed]), torch.cat([g.flatten() for g in plain])) < 0.05


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_chain_is_loaded_in_a_new_process(load: Load, ids: Tensor, packed: Path, tmp_path: Path) -> None:
    """The base from its 8-bit checkpoint there and here: with the same fingerprint, before and after it has run."""
    model = load(name=packed, load_in_8bit=False).train()
    logits(model, ids)
    chain = two_links(attach(model, targets="all-linear", r=2))
    chain.save(tmp_path / "run")
    code = (
        "import sys, torch\n"
        "from cola_fast import load_chain\n"
        "from cola_fast.config import ModelConfig\n"
        "from cola_fast.training.models import load_model\n"
        "model = load_model(ModelConfig(name=sys.argv[1], dtype='fp32', device='cpu')).train()\n"
        "load_chain(model, sys.argv[2])\n"
        "with torch.no_grad(): torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[3])\n"
    )
    torch.save(ids, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", code, str(packed), str(tmp_path / "run"), str(tmp_path / "x.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "x.pt").double(), logits(model, ids))
    with pytest.raises(UserError, match="weights differ"):
        load_chain(load(load_in_8bit=False), tmp_path / "run")


@pytest.mark.parametrize("ends", [True, False], ids=["codes", "scales"])
def test_another_base_is_told_apart(load: Load, tmp_path: Path, ends: bool) -> None:
    attach(load(), targets="all-linear", r=2).save(tmp_path / "run")
    other = load()
    weight = other.model.layers[1].mlp.up_proj.weight
    (weight.data if ends else weight.SCB)[0] *= -1
    with pytest.raises(UserError, match="weights differ"):
        load_chain(other, tmp_path / "run")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_peft_loads_the_adapter_with_equal_logits(load: Load, ids: Tensor, training: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    chain = two_links(attach(load(), targets="all-linear", r=2))
    exported = chain.export_adapter(tmp_path / "adapter")
    assert exported.exact
    assert any("compared: the live layers" in line for line in exported.compared)
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").train(training)
    assert {type(m).__name__ for m in theirs.modules() if hasattr(m, "lora_A")} == {"Linear8bitLt"}
    chain.model.train(training)
    assert relative(logits(theirs, ids), logits(chain.model, ids)) < (1e-5 if training else 1e-3)


def test_merged_weights_are_dense(load: Load, ids: Tensor, tmp_path: Path) -> None:
    """export_merged and save_pretrained: of every linear, with a link or without, in the model's dtype."""
    chain = two_links(attach(load(), targets=["up_proj"], r=2))
    chain.export_merged(tmp_path / "merged")
    chain.model.save_pretrained(tmp_path / "saved")
    live = logits(chain.model.train(), ids)  # bitsandbytes rounds no activations then
    for folder in (tmp_path / "merged", tmp_path / "saved"):
        assert not any(key.endswith(("SCB", "weight_format")) for key in load_file(folder / "model.safetensors"))
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert not hasattr(merged.config, "quantization_config")
        assert {p.dtype for p in merged.parameters()} == {torch.float32}
        assert relative(logits(merged, ids), live) < 1e-5


def test_a_merged_export_of_a_bf16_model_is_bf16(load: Load, tmp_path: Path) -> None:
    chain = two_links(attach(load("bf16"), targets="all-linear", r=2))
    chain.export_merged(tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(raw_config: dict[str, Any], packed: Path, wide_folder: Path, request: Any) -> dict[str, Any]:
    stored = getattr(request, "param", "stored") == "stored"
    raw_config["model"] |= {"name": str(packed if stored else wide_folder), "load_in_8bit": not stored}
    raw_config["chain"] |= {"targets": "all-linear"}
    raw_config["schedule"] |= {"links": 2, "steps": 4}
    return raw_config


@pytest.mark.slow
@pytest.mark.parametrize("raw", ["stored", "load_in_8bit"], indirect=True)
def test_a_run_on_it(raw: dict[str, Any], config_file: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    """Train, run again, score, export both ways; bitsandbytes' warning at every product is not passed on."""
    run = raw["out"]
    assert [cli.main(["train", config_file()]), cli.main(["train", config_file()])] == [0, 0]
    assert "MatMul8bitLt" not in caplog.text
    rows = {row["model"]: row for row in score_run(run)}
    assert rows["merged export"]["loss"] == pytest.approx(rows["after 2 links"]["loss"], rel=0.02)
    assert "dequantised" in export_run(run, "merged")
    assert cli.main(["export", run, "--to", "adapter"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(Path(run, "export", "merged"))
    assert not hasattr(merged.config, "quantization_config")


def test_a_loops_own_checkpoint(load: Load, ids: Tensor) -> None:
    """`state_dict()` and `load_state_dict`, with the scales."""
    chain, other = (attach(load().train(), targets="all-linear", r=2) for _ in range(2))
    disturb(chain)
    other.layers["model.layers.0.mlp.up_proj"].weight.SCB.mul_(2)
    expected = logits(chain.model, ids)
    for ran in (False, True):
        state = {key: value.clone() for key, value in chain.model.state_dict().items()}
        assert "model.layers.0.mlp.up_proj.SCB" in state
        assert other.model.load_state_dict(state) == ([], []), ran
        assert torch.equal(logits(other.model, ids), expected)


def test_the_trainer_saves_and_resumes_on_it(packed: Path, tmp_path: Path) -> None:
    def trainer() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}, dtype=torch.float32)
        chain = attach(model, r=2)
        args = TrainingArguments(
            str(tmp_path / "out"), max_steps=4, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
        )
        callbacks = [ChainCallback(chain, links=2)]
        return Trainer(model=model, args=args, train_dataset=token_rows(), callbacks=callbacks), chain

    whole, chain = trainer()
    whole.train()
    again, resumed = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert [link.sha256 for link in resumed.links] == [link.sha256 for link in chain.links]


def test_what_is_counted(load: Load, raw: dict[str, Any], wide_folder: Path) -> None:
    chain = attach(load(), r=2)
    dense = attach(tiny_llama(hidden_size=64, intermediate_size=128), r=2)
    assert coverage(chain.model, chain.layers) == coverage(dense.model, dense.layers)
    sizes = []
    wide = {"name": str(wide_folder), "load_in_8bit": False}
    for model in ({}, {**wide, "load_in_8bit": True}, wide):
        plan = dry_run(config.from_dict({**raw, "model": {**raw["model"], **model}}))
        found = re.search(r"weights ([\d.]+) MiB", plan)
        assert found is not None
        sizes.append(float(found[1]))
    stored, quantised, full = sizes
    assert stored == quantised < 0.6 * full


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_nothing_is_folded_into_it(load: Load, base: str) -> None:
    with pytest.raises(UserError, match=f"base is {base}, but the model's weights are LLM.int8: use ledger or auto"):
        attach(load(), targets="all-linear", r=2, base=base)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: bnb.nn.Linear8bitLt(64, 64, bias=False).to("cpu"), r"keeps its weight in 16 bits .*has_fp16_weights"),
        (lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False), "has not been quantised yet"),
    ],
    ids=["fp16 weights", "not quantised"],
)
def test_other_8_bit_layers(make: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^0 {sentence}"):
        attach(nn.Sequential(make()), targets="0", r=2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chain": {"base": "dense"}}, "chain.base is dense, but .* is stored in 8 bits: use ledger or auto"),
        ({"chain": {"base": "nf4"}}, "chain.base is nf4, but .* is stored in 8 bits: use ledger or auto"),
        ({"chain": {"gate": "dora"}}, r"\(DoRA\), which only a dense weight can take"),
        ({"train": {"shard": True}}, "train.shard is for 16- and 32-bit weights, but .* is stored in 8 bits"),
        ({"chain": {"init": "loftq"}}, "init is loftq, which needs the weights from before"),
        ({"model": {"load_in_4bit": True}}, "model.load_in_4bit is set, but .* is stored in 8 bits: leave it out"),
        (
            {"model": {"load_in_4bit": True, "load_in_8bit": True}},
            "load_in_4bit and model.load_in_8bit are both set: leave out one",
        ),
    ],
    ids=["dense", "nf4", "dora", "shard", "loftq", "4 bits", "both"],
)
def test_what_it_rules_out_is_refused(
    raw: dict[str, Any], config_file: Callable[..., str], capsys: Any, changes: dict[str, Any], sentence: str
) -> None:
    path = config_file(
        **{f"{section}__{key}": value for section, keys in changes.items() for key, value in keys.items()}
    )
    before = snapshot(Path(path).parent)
    assert cli.main(["train", path]) == 2
    assert re.search(sentence, capsys.readouterr().err.replace("\n", " "))
    assert snapshot(Path(path).parent) == before


def test_leaks_are_looked_for_without_the_noise_of_8_bits(load: Load, ids: Tensor) -> None:
    """In eval mode all tokens of a batch decide which columns bitsandbytes does not round."""
    model = load()
    for check in (check_causal, check_padding, check_packing):
        check(model)
    assert not any("forward" in vars(module) for module in model.modules())
    noisy = logits(model, ids)
    with weights.exactly(model):
        exact = logits(model, ids)
    assert torch.equal(logits(model, ids), noisy)
    assert torch.equal(logits(model.train(), ids), exact)
    assert relative(noisy, exact) > 1e-3


def test_scales_that_are_no_numbers_are_told_by_name(load: Load) -> None:
    model = load()
    model.model.layers[0].self_attn.q_proj.weight.SCB[3] = float("nan")
    with pytest.raises(UserError, match=r"in 1 tensors \(model.layers.0.self_attn.q_proj.weight.SCB\)"):
        refuse_not_finite("m", model)

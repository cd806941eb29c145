"""`save_pretrained`, and every trainer that calls it, writes the trained model: ledger and open link included."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaModel, Trainer, TrainerCallback, TrainingArguments

from cola_fast import ChainCallback, UserError, attach

from ..conftest import disturb, snapshot, tiny_llama
from .conftest import third_fold_raises
from .trainer_runs import COMMON, token_rows

KINDS: dict[str, tuple[bool, dict[str, Any]]] = {  # on 4-bit weights?
    "dense": (False, {}),
    "dora": (False, {"gate": "dora"}),
    "pissa": (False, {"init": "pissa"}),
    "dense-ledger": (False, {"base": "ledger"}),
    "ledger": (True, {"base": "ledger"}),
    "nf4": (True, {"base": "nf4"}),
    "part-nf4": (True, {"base": "nf4", "targets": ["q_proj", "lm_head"]}),
}
KEYS = {"r": 3, "targets": "all-linear"}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids)[0]
    return result


def close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm() / expected.norm()) < 1e-4


def trained(model: nn.Module, *, links: int = 1, **keys: Any) -> Any:
    """Some tied links, and an open one that moves the model."""
    chain = attach(model, **{**KEYS, **keys})
    for seed in range(links):
        disturb(chain, seed=seed)
        chain.tie()
        chain.extend()
    disturb(chain, seed=9)
    return chain


def keys_of(folder: Path) -> set[str]:
    return {key for path in folder.glob("*.safetensors") for key in safe_open(path, "pt").keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("links", [0, 2], ids=["open", "tied-and-open"])
def test_transformers_reads_the_trained_model(
    kind: str, links: int, load_nf4: Callable[..., nn.Module], ids: Tensor, tmp_path: Path
) -> None:
    four_bit, keys = KINDS[kind]
    load = load_nf4 if four_bit else tiny_llama
    model: Any = load()
    before = logits(model, ids)
    chain = trained(model, links=links, **keys)
    live, state = logits(model, ids), {key: value.clone() for key, value in model.state_dict().items()}
    assert float((live - before).norm() / before.norm()) > 0.05
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(saved, ids), live)
    assert not any("lora" in key or "quant" in key for key in keys_of(tmp_path))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(model, ids), live)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert (getattr(model.config, "quantization_config", None) is not None) == four_bit
    chain.export_merged(tmp_path / "merged")
    for name, weight in saved.state_dict().items():
        exported = load_file(tmp_path / "merged" / "model.safetensors")
        assert torch.equal(exported.get(name, weight), weight)


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "ledger"])
def test_the_trainer_saves_a_run_that_was_stopped(
    four_bit: bool, load_nf4: Callable[..., nn.Module], ids: Tensor, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    model: Any = load_nf4() if four_bit else tiny_llama()
    chain = attach(model, **KEYS)
    trainer = Trainer(
        model=model, args=TrainingArguments(str(tmp_path / "run"), **{**COMMON, "eval_strategy": "no"}),
        train_dataset=token_rows(), callbacks=[ChainCallback(chain, links=3), Stop()],
    )  # fmt: skip
    trainer.train()
    assert (len(chain.links), chain.open_link is not None) == (1, True)
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    close(logits(saved, ids), logits(model.eval(), ids))
    for folder in ("saved", "run/checkpoint-4"):
        assert not any("lora" in key for key in keys_of(tmp_path / folder))


def test_every_way_to_call_it(ids: Tensor, tmp_path: Path) -> None:
    model: Any = tiny_llama(tie_word_embeddings=True)
    chain = trained(model)
    live = logits(model, ids)
    calls: dict[str, Callable[[Path], Any]] = {
        "shards": lambda p: model.save_pretrained(p, max_shard_size="20KB"),
        "state": lambda p: model.save_pretrained(p, state_dict={k: v.clone() for k, v in model.state_dict().items()}),
        "by-place": lambda p: model.save_pretrained(p, True, model.state_dict()),
        "new-format": lambda p: model.save_pretrained(p, save_original_format=False),
        "compiled": lambda p: torch.compile(model).save_pretrained(p),
        "between": lambda p: (chain.tie(), model.save_pretrained(p)),
    }
    for name, call in calls.items():
        call(tmp_path / name)
        close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), ids), live)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "other-process", is_main_process=False)
    assert list((tmp_path / "other-process").iterdir()) == []


def test_a_model_inside_the_model(ids: Tensor, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    trained(model)
    model.model.save_pretrained(tmp_path)
    close(logits(LlamaModel.from_pretrained(tmp_path), ids), logits(model.model, ids))


def test_experts_under_the_names_of_their_checkpoint(ids: Tensor, tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        shared_expert_intermediate_size=16, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    trained(model, targets=["q_proj", "gate_proj", "down_proj"])
    model.save_pretrained(tmp_path)
    assert any(".experts.0." in key for key in keys_of(tmp_path))
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


def test_copies_save_themselves(ids: Tensor, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    chain = trained(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {"copied": copy.deepcopy(model), "unpickled": torch.load(file, weights_only=False)}
    disturb(chain, seed=77)  # the original goes on
    for name, other in copies.items():
        assert float((logits(other, ids) - logits(model, ids)).norm()) > 0.01
        other.save_pretrained(tmp_path / name)
        close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), ids), logits(other, ids))


def test_a_loop_of_ones_own_resumes(ids: Tensor, tmp_path: Path) -> None:
    """state_dict() is what it was: accelerate's checkpoints, and torch.save, bring weights and factors back."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model: Any = tiny_llama()
    chain = trained(model)
    prepared, _ = accelerator.prepare(model, torch.optim.AdamW(chain.parameters()))
    live, state = logits(prepared, ids), copy.deepcopy(model.state_dict())
    accelerator.save_state(str(tmp_path))
    disturb(chain, seed=5)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(logits(prepared, ids), live)
    disturb(chain, seed=6)
    model.load_state_dict(state)
    assert torch.equal(logits(model, ids), live)
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path / "model")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), ids), live)


def test_detached_it_is_as_before(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    vars(model)["save_pretrained"] = mine = print
    hooks = len(model._load_state_dict_pre_hooks)
    chain = attach(model)
    assert model.save_pretrained is not mine
    chain.detach()
    assert model.save_pretrained is mine
    assert "save_pretrained" not in vars(model.model)
    assert len(model._load_state_dict_pre_hooks) == hooks


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_right_is_refused(load_nf4: Callable[..., nn.Module], tmp_path: Path) -> None:
    from huggingface_hub import PyTorchModelHubMixin

    class Hub(nn.Module, PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(8, 8)

    model: Any = tiny_llama()
    trained(model)
    half = {key: value for key, value in model.state_dict().items() if "lora" not in key}
    fp4: Any = load_nf4(kind="fp4")
    trained(fp4, targets=["lm_head"])
    hub: Any = Hub()
    attach(hub, r=2, targets=["q_proj"])
    for call, sentence in (
        (lambda: model.save_pretrained(tmp_path / "x", state_dict=half), "but not the open link"),
        (lambda: model.save_pretrained(tmp_path / "x", distributed_checkpoint=True), "leave it out"),
        (lambda: fp4.save_pretrained(tmp_path / "x"), "use chain.export_adapter"),
        (lambda: hub.save_pretrained(tmp_path / "x"), r"call chain.tie\(\) and chain.detach\(\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()
        assert not (tmp_path / "x").exists()


def test_a_fold_that_was_interrupted(tmp_path: Path) -> None:
    model: Any = tiny_llama()
    chain = attach(model)
    disturb(chain)
    with third_fold_raises(KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        chain.tie()
    with pytest.raises(UserError, match="Folding a link was interrupted"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_merged_weights_are_not_loaded_over_an_open_link(ids: Tensor, tmp_path: Path) -> None:
    """A Trainer without ChainCallback would resume from its model file: the link would count twice."""
    arguments = {**COMMON, "max_steps": 4, "eval_strategy": "no"}

    def make() -> Trainer:
        model = tiny_llama()
        attach(model, **KEYS)
        return Trainer(model=model, args=TrainingArguments(str(tmp_path), **arguments), train_dataset=token_rows())

    make().train()
    again: Any = make()
    with pytest.raises(UserError, match="a Trainer resumes with ChainCallback"):
        again.train(resume_from_checkpoint=True)
    close(logits(again.model, ids), logits(tiny_llama(), ids))


@pytest.mark.parametrize("other", [False, True], ids=["own", "of-another-run"])
def test_checkpoints_of_earlier_versions(other: bool, tmp_path: Path) -> None:
    """Their model file holds weights as they are, and the open link's factors."""

    class Earlier(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "model.safetensors"
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)

    def make(out: Path, **arguments: Any) -> tuple[Any, Any]:
        model: Any = tiny_llama()
        chain = attach(model, r=2)
        settings = {**COMMON, "max_steps": 6, "eval_strategy": "no", "save_steps": 1, "save_total_limit": None}
        return chain, Trainer(
            model=model, args=TrainingArguments(str(out), **{**settings, **arguments}), train_dataset=token_rows(),
            callbacks=[ChainCallback(chain, links=3), Earlier()],
        )  # fmt: skip

    chain, trainer = make(tmp_path / "run")
    trainer.train()
    if other:
        make(tmp_path / "other", learning_rate=0.01)[1].train()
        for step in (1, 2):
            before = snapshot(tmp_path)
            with pytest.raises(UserError, match="hold different links"):
                make(tmp_path / "other")[1].train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
            assert snapshot(tmp_path) == before
        return
    for step in (1, 2, 6):
        again, resumed = make(tmp_path / "run")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{step}"))
        assert [link.sha256 for link in again.links] == [link.sha256 for link in chain.links]

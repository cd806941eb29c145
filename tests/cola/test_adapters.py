"""PEFT adapters into a chain and out of it: the same function, the rank asked for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from cola_fast import ChainCallback, UserError, attach, load_chain
from cola_fast.chain.adapters import cut_to_rank, read_adapter
from cola_fast.layers.factors import Factors

from ..conftest import disturb, snapshot, tiny_llama
from .trainer_runs import CHAT_TEMPLATE, COMMON

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 5, "layers.1.self_attn.v_proj": 3},
        "alpha_pattern": {r"layers\.\d\.self_attn\.v_proj": 3},
    },
    "fewer-modules": {"r": 3, "target_modules": r".*layers\.1\.self_attn\.q_proj"},
}  # fmt: skip


def save_adapter(folder: Path, base: nn.Module | None = None, **keys: Any) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(base or tiny_llama(), LoraConfig(init_lora_weights=False, **keys))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.mul_(0.3)
    for config in model.peft_config.values():  # as PEFT saves after training: the values are no initialisation now
        config.init_lora_weights = True
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < bound


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_becomes_link_0(kind: str, ids: Tensor, tmp_path: Path) -> None:
    expected = logits(save_adapter(tmp_path / "adapter", **ADAPTERS[kind]).eval(), ids)
    model = tiny_llama()
    before = logits(model, ids)
    assert float((expected - before).norm() / before.norm()) > 0.02
    chain = attach(model, r=2, alpha=4)
    chain.save(tmp_path / "run")
    link = chain.import_adapter(tmp_path / "adapter")
    assert link.index == 0
    assert chain.open_link is not None
    assert chain.open_link.index == 1
    close(logits(model, ids), expected)
    disturb(chain)
    chain.tie()
    after = logits(model, ids)
    chain.save(tmp_path / "run")
    close(logits(load_chain(tiny_llama(), tmp_path / "run").model, ids), after, 1e-7)
    chain.export_adapter(tmp_path / "both")
    close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "both"), ids), after)


def test_into_a_later_place(ids: Tensor, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    model = tiny_llama()
    chain = attach(model, r=2)
    disturb(chain)
    chain.tie()
    chain.extend()
    assert chain.import_adapter(tmp_path / "adapter").index == 1
    twice = logits(model, ids)
    chain.export_adapter(tmp_path / "both")
    close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "both"), ids), twice)


def test_ranks_come_back_as_they_went(tmp_path: Path) -> None:
    """Rank patterns, through PEFT and back."""
    chain = attach(tiny_llama(), r=2, rank_pattern={"layers.1.self_attn.q_proj": 5, "v_proj": 3})
    disturb(chain)
    chain.export_adapter(tmp_path / "one")
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    assert sorted({f.rank for f in one.values()}) == [2, 3, 5]
    for name, f in one.items():
        assert torch.equal(f.a, two[name].a)
        assert torch.equal(f.b, two[name].b)
        assert f.scale == two[name].scale
    again = attach(tiny_llama(), r=2)
    again.import_adapter(tmp_path / "two")
    for name, f in again.links[0].factors().items():
        assert torch.equal(f.b * f.scale, one[name].b * one[name].scale)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"bias": "all"}, "uses bias"),
        ({"target_modules": ["q_proj", "down_proj"]}, r"layers.0.mlp.down_proj and 1 more modules, .* targets"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no LoRA factor of a linear"),
    ],
    ids=["dora", "modules_to_save", "bias", "outside", "embedding"],
)
def test_refused(keys: dict[str, Any], sentence: str, ids: Tensor, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", **{**ADAPTERS["plain"], **keys})
    refused(tmp_path, sentence, ids)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ],
    ids=["type", "pissa"],
)
def test_refused_by_its_configuration(edit: dict[str, Any], sentence: str, ids: Tensor, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    refused(tmp_path, sentence, ids)


def test_refused_files_and_states(ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config.json is missing"):
        attach(tiny_llama()).import_adapter(tmp_path / "nowhere")
    save_adapter(tmp_path / "adapter", tiny_llama(hidden_size=48), **ADAPTERS["plain"])
    refused(tmp_path, "fits a weight of 48 x 48", ids)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    refused(tmp_path, "is damaged", ids)
    file.unlink()
    refused(tmp_path, "save it as safetensors", ids)
    chain = attach(tiny_llama())
    disturb(chain)
    with pytest.raises(UserError, match="has been trained"):
        chain.import_adapter(tmp_path / "adapter")


def refused(folder: Path, sentence: str, ids: Tensor) -> None:
    """With nothing changed, in memory or on disk."""
    model = tiny_llama()
    chain = attach(model, r=2)
    chain.save(folder / "run")
    before, files = logits(model, ids), snapshot(folder)
    with pytest.raises(UserError, match=sentence):
        chain.import_adapter(folder / "adapter")
    assert snapshot(folder) == files
    assert torch.equal(logits(model, ids), before)
    assert chain.open_link is not None
    for file in (folder / "run").rglob("*"):
        if file.is_file():
            file.unlink()


# --- out, at a rank ---------------------------------------------------------------------------------------------------


def four_links(model: nn.Module, **keys: Any) -> Any:
    chain = attach(model, r=3, **keys)
    for k in range(4):
        disturb(chain, seed=k)
        chain.tie()
        if k < 3:
            chain.extend()
    return chain


@pytest.mark.parametrize("rank", [1, 4, 11, 12, 40])
def test_the_best_adapter_of_a_rank(rank: int, tmp_path: Path) -> None:
    """Against the SVD of the whole N x K update, in fp64."""
    chain = four_links(tiny_llama(), targets=["q_proj", "down_proj"])
    exported = chain.export_adapter(tmp_path / "cut", rank=rank)
    assert exported.rank == min(rank, 12)
    chain.export_adapter(tmp_path / "exact")
    exact, cut = read_adapter(tmp_path / "exact"), read_adapter(tmp_path / "cut")
    for name, f in exact.items():
        update = f.scale * f.b.double() @ f.a.double()
        s = torch.linalg.svdvals(update)
        best = float(s[rank:].norm() / s.norm())
        got = float((cut[name].scale * cut[name].b.double() @ cut[name].a.double() - update).norm() / update.norm())
        assert got == pytest.approx(best, abs=1e-6)
        assert exported.errors[name] == pytest.approx(best, abs=1e-6)
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_four_links_trained_by_trl(base: str, load_nf4: Any, tiny_folder: Path, ids: Tensor, tmp_path: Path) -> None:
    """A real chain on chat data; its export in PEFT, and as vLLM reads adapters: one alpha / r, ranks up to a limit."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    load = load_nf4 if base == "nf4" else lambda: tiny_llama()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [
        [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2}"}]
        for i in range(16)
    ]
    model = load()
    start = logits(model.train(), ids)
    chain = attach(model, r=3, targets=["q_proj", "v_proj", "down_proj"])
    arguments = {**COMMON, "max_steps": 8, "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    trainer = SFTTrainer(
        model=model, args=SFTConfig(str(tmp_path / "run"), bf16=False, **arguments), processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"messages": chats}), callbacks=[ChainCallback(chain, links=4)],
    )  # fmt: skip
    trainer.train()
    assert len({link.sha256 for link in chain.links}) == 4
    live = logits(model.eval(), ids)
    assert float((live - start).norm() / start.norm()) > 0.02
    trainer.save_model(str(tmp_path / "saved"))
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), ids), live)
    exported = chain.export_adapter(tmp_path / "adapter")
    assert (exported.rank, exported.exact) == (12, True)
    assert exported.notes == ["vLLM, by its documentation (not run here): --enable-lora --max-lora-rank 16"]
    close(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval(), ids), live)

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert not any(settings.get(key) for key in ("modules_to_save", "use_dora", "use_rslora", "lora_bias"))
    assert settings["bias"] == "none"
    assert settings["r"] <= 16
    for name, f in read_adapter(tmp_path / "adapter").items():
        assert f.rank <= 16
        assert f.scale == settings["lora_alpha"] / settings["r"], name


def test_no_matrix_of_the_weights_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 65,536 x 65,536 update would need 32 GiB; and a module with a zero update loses nothing."""
    f = Factors(torch.randn(6, 1 << 16), torch.randn(1 << 16, 6), 6.0)
    cut, error = cut_to_rank(f, 2)
    assert (cut.rank, cut.scale) == (2, 1.0)
    assert 0.5 < error < 1
    _, error = cut_to_rank(Factors(torch.randn(6, 9), torch.zeros(7, 6), 6.0), 2)
    assert error == 0


def test_the_report(tmp_path: Path) -> None:
    chain = four_links(tiny_llama(), targets=["q_proj", "v_proj"])
    text = str(chain.export_adapter(tmp_path / "cut", rank=4))
    assert "rank 4" in text
    assert [line.split()[:3] for line in text.splitlines()[1:3]] == [
        ["q_proj", "2", "modules"],
        ["v_proj", "2", "modules"],
    ]
    assert "--max-lora-rank 8" in text
    exact = chain.export_adapter(tmp_path / "exact")
    assert "exact" in str(exact)
    assert Path(exact) == tmp_path / "exact"
    with pytest.raises(UserError, match="rank is 0"):
        chain.export_adapter(tmp_path / "none", rank=0)
    assert not (tmp_path / "none").exists()

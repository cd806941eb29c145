"""What is said of vLLM is what its documentation says, by architecture, rank, scale, setting and module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cola_fast import attach
from cola_fast.chain.vllm import vllm_notes
from cola_fast.layers.factors import Factors

from ..conftest import disturb, tiny_llama

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip
IMAGES = {"patch_size": 8, "image_size": 16}


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([1], "--max-lora-rank 1"),
        ([2], "--max-lora-rank 8"),
        ([8], "--max-lora-rank 8"),
        ([9], "--max-lora-rank 16"),
        ([4, 300], "--max-lora-rank 320"),
        ([513], "at most 512"),
    ],
)
def test_ranks_and_scales(ranks: list[int], says: str) -> None:
    model = tiny_llama()
    factors = {f"{r}.q_proj": Factors(torch.zeros(r, 600), torch.zeros(600, r), float(r)) for r in ranks}
    (note,) = vllm_notes(model, factors, {})
    assert says in note
    other = {"x.q_proj": Factors(torch.zeros(2, 9), torch.zeros(9, 2), 1.0)}
    text = " ".join(vllm_notes(model, {**other, **factors}, {}))
    assert "one alpha / r for all modules" in text
    assert "--enable-lora" not in text


@pytest.mark.parametrize("setting", ["use_dora", "modules_to_save", "trainable_token_indices"])
def test_more_than_a_lora(setting: str) -> None:
    factors = {"q_proj": Factors(torch.zeros(2, 9), torch.zeros(9, 2), 2.0)}
    (note,) = vllm_notes(tiny_llama(), factors, {setting: ["score"]})
    assert f"no adapter with {setting}" in note


@pytest.mark.parametrize(
    ("kind", "keys", "target", "says"),
    [
        ("Llama|ForCausalLM", {"vocab_size": 64}, "q_proj", "--enable-lora --max-lora-rank 8"),
        ("Llama|ForSequenceClassification", {"vocab_size": 64}, "q_proj", "not checked"),
        ("Llama|ForCausalLM", {"vocab_size": 258049, "hidden_size": 4}, "lm_head", "258049 tokens, at most 258048"),
        ("GPTNeoX|ForCausalLM", {"vocab_size": 64}, "dense", "not checked"),
        ("Phi|ForCausalLM", {"vocab_size": 64}, "dense", "not checked whether its PhiForCausalLM takes links on dense"),
        ("ViT|ForImageClassification", IMAGES, r".*\.q_proj", "not checked"),
        ("CLIPVision|Model", IMAGES, "q_proj", "not checked"),
        ("T5|ForConditionalGeneration", {"vocab_size": 64}, "q", "not checked"),
    ],
    ids=["llama", "classifier", "head", "neox", "linear", "vit", "clip", "t5"],
)
def test_only_what_is_documented_is_claimed(
    kind: str, keys: dict[str, Any], target: str, says: str, tmp_path: Path
) -> None:
    import transformers

    name, head = kind.split("|")
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = getattr(transformers, f"{name}Config")(**{**(t5 if name == "T5" else SIZES), **keys})
    chain = attach(getattr(transformers, name + head)(config), targets=target, r=2)
    disturb(chain)
    notes = " ".join(chain.export_adapter(tmp_path / "adapter").notes)
    assert says in notes
    assert ("--enable-lora" in notes) == ("--enable-lora" in says)

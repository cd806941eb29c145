"""`targets: all-linear` chooses by itself, so it refuses no model for its choice: real architectures, tiny."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cola_fast import UserError, attach, load_chain
from cola_fast.errors import Note
from cola_fast.ranks import block_ranks, gelora_ranks

from ..conftest import disturb, tiny_llama

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**COMMON, "num_key_value_heads": 2}
MOE = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**MOE, "shared_expert_intermediate_size": 16}
NEXT = {
    **SHARED, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
DEEPSEEK = {
    **COMMON, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 1}
FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

# name of the model -> configuration, how many modules get a link, what is said (None: nothing)
MODELS: dict[str, tuple[str, dict[str, Any], int, str | None]] = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA, 14, None),
    "GemmaForCausalLM": ("GemmaConfig", {**LLAMA, "head_dim": 8}, 14, None),
    "PhiForCausalLM": ("PhiConfig", COMMON, 12, None),
    "MixtralForCausalLM": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, 8, None),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", DEEPSEEK, 16, None),
    "T5ForConditionalGeneration": ("T5Config", T5, 32, None),
    "BertForMaskedLM": ("BertConfig", COMMON, 13, None),
    "ViTForImageClassification": ("ViTConfig", VIT, 12, None),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", SHARED, 16, r"2 of 16 modules cannot have rank 8 .*shared_expert_gate 1"),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", NEXT, 15, r"3 of 15 modules .*in_proj_ba 4, .*shared_expert_gate 1"),
    "MambaForCausalLM": ("MambaConfig", MAMBA, 8, r"2 of 8 modules cannot have rank 8 .*dt_proj 1"),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, 0, r"no torch.nn.Linear besides its output head. It has Conv1D layers"),
    "FalconForCausalLM": ("FalconConfig", FALCON, 0, r"head that can take a link: .* is a .*FalconLinear, but a link"),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, MODELS[name][0])(**MODELS[name][1])).eval()


def attached(model: nn.Module, **keys: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chain = attach(model, targets="all-linear", **keys)
    return chain, [str(w.message) for w in caught if issubclass(w.category, Note)]


@pytest.mark.parametrize("name", MODELS)
def test_it_works_with_notes_or_says_in_a_sentence_why_not(name: str) -> None:
    _, _, count, sentence = MODELS[name]
    if count == 0:
        with pytest.raises(UserError, match=str(sentence)):
            attach(build(name), targets="all-linear", r=8)
        return
    chain, notes = attached(build(name), r=8)
    assert len(chain.layers) == len(chain.open_link.ranks) == count
    said = [note for note in notes if "cannot have rank" in note]
    assert said == [] if sentence is None else re.search(sentence, said[0])


def test_small_weights_get_the_highest_rank_they_can_have_in_every_link(ids: Tensor, tmp_path: Path) -> None:
    """Also in later links of other ranks, in a chain that is loaded, and in its export."""
    gate = "model.layers.1.mlp.shared_expert_gate"
    chain, _ = attached(build("Qwen3NextForCausalLM"), r=2)
    for rank in (None, 8):
        disturb(chain)
        chain.tie()
        chain.extend(rank)
    assert chain.open_link.ranks[gate] == 1
    assert chain.open_link.ranks["model.layers.0.linear_attn.in_proj_ba"] == 4
    chain.save(tmp_path / "run")
    loaded = load_chain(build("Qwen3NextForCausalLM"), tmp_path / "run")
    disturb(loaded)
    loaded.tie()
    assert loaded.extend(16).ranks[gate] == 1
    assert chain.export_adapter(tmp_path / "adapter").rank == 12  # 2 + 2 + 8, and 3 of the gate
    with pytest.raises(UserError, match="The rank is 65, but the model's largest linear can have 32"):
        loaded.ranks(65)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora-ga", "eva"])
def test_starts_that_need_directions(init: str, ids: Tensor) -> None:
    """LoRA-GA needs two for each of a link's: a gate of one row gets no link, a matrix of four rows rank 2."""
    model = build("Qwen3NextForCausalLM")
    with torch.no_grad():
        before = model(ids).logits
    chain, notes = attached(model, r=8, init=init, batches=[{"input_ids": ids, "labels": ids}])
    ranks = {name.rsplit(".", 1)[-1]: rank for name, rank in chain.open_link.ranks.items()}
    one, four = (None, 2) if init == "lora-ga" else (1, 4)
    assert (ranks.get("shared_expert_gate"), ranks["in_proj_ba"]) == (one, four)
    assert ("shared_expert_gate none" in " ".join(notes)) == (one is None)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-3)
    chain.tie()
    chain.extend(4)


def test_what_is_named_is_refused(model: nn.Module) -> None:
    moe = build("Qwen2MoeForCausalLM")
    with pytest.raises(
        UserError, match=r"rank of model.layers.0.mlp.shared_expert_gate is 2, but its weight is 1 x 32"
    ):
        attach(moe, targets=["shared_expert_gate"], r=2)
    with pytest.raises(
        UserError, match=r"rank of model.layers.0.mlp.shared_expert_gate is 2, but its weight is 1 x 32"
    ):
        attach(moe, targets="all-linear", r=1, rank_pattern={"shared_expert_gate": 2})
    with pytest.raises(UserError, match=r"no torch.nn.Linear besides its output head that can take a link: 0 is a "):
        attach(nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)), targets="all-linear")


class Odd(nn.Module):
    """A linear that can take a link, and one of each kind that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.pruned = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.hooked = nn.Linear(16, 16)
        self.hooked.forward = self.hooked.forward  # type: ignore[method-assign]
        self.narrow = nn.Linear(16, 16)
        self.narrow.weight = nn.Parameter(torch.zeros(16, 16).to(torch.float8_e4m3fn), requires_grad=False)


def test_linears_that_can_take_none_are_left_out_with_a_note() -> None:
    chain, notes = attached(Odd(), r=2)
    assert list(chain.layers) == ["plain"]
    assert "leaves out 6 of 7 linears. attention.out_proj is a torch.nn" in notes[0]
    for name, sentence in {
        "attention.out_proj": "NonDynamicallyQuantizableLinear, but a link",
        "pruned": "computes its weight anew",
        "first": "shares its weight with second",
        "hooked": "has had its forward replaced",
        "narrow": "has a weight of torch.float8_e4m3fn",
    }.items():
        with pytest.raises(UserError, match=f"^{name} .*{sentence}"):
            attach(Odd(), targets=[name], r=2)


def test_linears_that_quantise_at_each_call_are_left_out() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"eight": bnb.nn.Linear8bitLt(64, 64), "plain": nn.Linear(64, 64)})
    chain, notes = attached(model, r=2)
    assert list(chain.layers) == ["plain"]
    assert "eight keeps its weight in 16 bits and quantises it at each call" in notes[0]


def test_gelora_gives_small_and_packed_weights_ranks_of_their_own(ids: Tensor, load_nf4: Any) -> None:
    """A gate of one row does not make 1 the rank of its block; nor do the packed codes, which are one wide."""
    batches = [{"input_ids": torch.randint(0, 64, (64, 12), generator=torch.Generator().manual_seed(3))}]
    model = build("Qwen2MoeForCausalLM")
    blocks = block_ranks(model, batches, mean_rank=6)
    ranks = gelora_ranks(model, batches, mean_rank=6)
    assert sum(block.rank for block in blocks) == 12
    for block in blocks:
        assert {ranks[name] for name in block.modules if not name.endswith("shared_expert_gate")} == {block.rank}
        assert ranks[f"{block.block}.mlp.shared_expert_gate"] == 1
    attach(model, targets="all-linear", rank_pattern=ranks)
    assert sum(block.rank for block in block_ranks(load_nf4(), batches, mean_rank=6)) == 12


def test_a_model_that_has_it_all_gets_no_note() -> None:
    assert attached(tiny_llama(), r=8)[1] == []

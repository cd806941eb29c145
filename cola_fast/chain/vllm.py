"""What vLLM can do with an adapter, as far as its documentation says. vLLM itself is not run here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.factors import Factors

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank can be: vllm/config/lora.py
LARGEST_VOCABULARY = 258048  # of a link on lm_head: vllm/lora/layers/logits_processor.py
# `<name>ForCausalLM`, marked for LoRA in docs/models/supported_models.md of vLLM's repository, November 2026
DECODERS = {
    "Afmoe", "Apertus", "Arcee", "BailingMoe", "BailingMoeV2", "Cohere", "Cohere2", "Cohere2Moe", "Cwm", "DeciLM",
    "Deepseek", "DeepseekV2", "DeepseekV3", "DeepseekV32", "Ernie4_5", "Ernie4_5_Moe", "Exaone", "Exaone4",
    "FalconH1", "Gemma", "Gemma2", "Gemma3", "Gemma4", "Glm", "Glm4", "Glm4Moe", "Glm4MoeLite", "GlmMoeDsa",
    "GPTBigCode", "GptOss", "Granite", "GraniteMoe", "GraniteMoeHybrid", "GraniteMoeShared", "HunYuanDenseV1",
    "HunYuanMoEV1", "InternLM2", "InternLM3", "Jamba", "Lfm2", "Lfm2Moe", "Llama", "LongcatFlash", "MiMo",
    "MiniCPM", "MiniCPM3", "MiniMaxM2", "Mistral", "Mixtral", "Nemotron", "NemotronH", "Olmo", "Olmo2", "Olmo3",
    "OlmoHybrid", "OPT", "Phi", "Phi3", "PhiMoE", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next", "SeedOss",
    "SmolLM3", "Solar", "Starcoder2", "VaultGemma",
}  # fmt: skip
# Linears that those models are made of in vLLM, by the names that transformers gives them. Others (routers, gates of
# experts, convolutions) may have no counterpart that takes a link.
LINEARS = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "lm_head",
}  # fmt: skip
SETTINGS = ("modules_to_save", "trainable_token_indices", "use_dora")  # of adapter_config.json, which vLLM takes unset


def vllm_notes(model: nn.Module, factors: Mapping[str, Factors], config: Mapping[str, Any]) -> list[str]:
    """What is in vLLM's way, or how its documentation has this adapter loaded; `config` is adapter_config.json."""
    kind = type(model).__name__
    largest = max(f.rank for f in factors.values())
    fitting = next((rank for rank in RANKS if rank >= largest), None)
    ends = {name.rsplit(".", 1)[-1] for name in factors}
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 0
    obstacles = []
    if set_to := [key for key in SETTINGS if config.get(key)]:
        obstacles.append(f"vLLM loads no adapter with {' or '.join(set_to)}")
    if fitting is None:
        obstacles.append(f"vLLM cannot load rank {largest}, at most {RANKS[-1]}: export with a rank")
    if len({f.scale for f in factors.values()}) > 1:
        obstacles.append("vLLM uses one alpha / r for all modules, but the modules' scales differ")
    if "lm_head" in ends and vocabulary > LARGEST_VOCABULARY:
        obstacles.append(f"vLLM takes no link on lm_head of {vocabulary} tokens, at most {LARGEST_VOCABULARY}")
    if obstacles:
        return [f"{obstacle}; the merged model needs nothing of this" for obstacle in obstacles]
    if kind.removesuffix("ForCausalLM") not in DECODERS or not kind.endswith("ForCausalLM"):
        return [f"vLLM: not checked, its documentation does not list {kind} with LoRA"]
    if unknown := sorted(ends - LINEARS):
        return [f"vLLM: not checked whether its {kind} takes links on {', '.join(unknown)}"]
    return [f"vLLM, by its documentation (not run here): --enable-lora --max-lora-rank {fitting}"]

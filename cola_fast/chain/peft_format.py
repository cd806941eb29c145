"""PEFT's file format for a LoRA adapter: what a sealed link is on disk, and what a whole chain exports to.

    adapter_config.json          peft_type LORA, r, lora_alpha, rank_pattern, alpha_pattern, target_modules
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [R, K], .lora_B.weight [N, R],
                                 of DoRA also .lora_magnitude_vector [N]
                                 base_model.model.<module>.<key>, of modules that are trained whole (modules_to_save)
                                 base_model.model.<embedding>.token_adapter.trainable_tokens_delta [n, K], rows

PEFT computes scale = alpha / r per module, where `rank_pattern` and `alpha_pattern` override `r` and `lora_alpha`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import safetensors.torch
from torch import Tensor, nn

from ..layers.factors import Factors

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")  # of a factor's name
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"  # behind the name of an embedding or output head


class Also(NamedTuple):
    """What an adapter holds beside factors: see `chain.beside`."""

    modules: tuple[str, ...] = ()  # trained whole
    rows: Mapping[str, list[int]] = {}  # embedding or output head -> the tokens whose rows are trained
    tensors: Mapping[str, Tensor] = {}  # `<module>.<key>`, `<embedding>.<TOKEN_ROWS>`


def task_type(model: nn.Module) -> str | None:
    """CAUSAL_LM for a decoder that generates. PEFT wraps anything else only without one."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") and not encoder_decoder else None


def encode(
    factors: Mapping[str, Factors],
    *,
    targets: Sequence[str],
    base_name: str,
    base_revision: str | None,
    dropout: float,
    task_type: str | None = None,
    also: Also = Also(),  # noqa: B008
) -> dict[str, bytes]:
    """File name -> content. The bytes depend on the arguments only, so their hash identifies the link."""
    ranks = {name: f.rank for name, f in factors.items()}
    alphas = {name: f.alpha for name, f in factors.items()}
    common_rank = Counter(ranks.values()).most_common(1)[0][0]
    common_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "rank_pattern": {_key(name, ranks): rank for name, rank in ranks.items() if rank != common_rank},
        "alpha_pattern": {_key(name, alphas): alpha for name, alpha in alphas.items() if alpha != common_alpha},
        "target_modules": sorted(targets),
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(f.magnitude is not None for f in factors.values()),
        "modules_to_save": list(also.modules) or None,
        **({"trainable_token_indices": dict(also.rows)} if also.rows else {}),
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in also.tensors.items()}
    for name, f in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = f.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = f.b.contiguous()
        if f.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = f.magnitude.contiguous()
    return {
        CONFIG_FILE: (json.dumps(config, indent=1, sort_keys=True) + "\n").encode(),
        TENSOR_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }


def _key(name: str, names: Iterable[str]) -> str:
    """Of a pattern that means this module alone: PEFT looks for it at the end of every name."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def decode_also(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """`Also.tensors` of an adapter written by `encode`."""
    tensors = safetensors.torch.load(files[TENSOR_FILE])
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if not key.endswith(ENDS)}


def decode(files: Mapping[str, bytes]) -> dict[str, Factors]:
    """The factors of an adapter written by `encode`."""
    config = json.loads(files[CONFIG_FILE])
    tensors = safetensors.torch.load(files[TENSOR_FILE])
    ends = ".lora_A.weight"
    names = {key: key.removeprefix(PREFIX).removesuffix(ends) for key in tensors if key.endswith(ends)}
    factors = {}
    for key, a in tensors.items():
        if key in names:
            name = names[key]
            alpha = float(config["alpha_pattern"].get(_key(name, names.values()), config["lora_alpha"]))
            b, magnitude = (tensors.get(f"{PREFIX}{name}.{key}") for key in ("lora_B.weight", "lora_magnitude_vector"))
            assert b is not None
            factors[name] = Factors(a, b, alpha, magnitude=magnitude)
    return dict(sorted(factors.items()))

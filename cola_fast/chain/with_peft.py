"""How PEFT reads an adapter: its own loader, on a copy of the model that has no weights, before anyone relies on it.

In transformers 5, models with experts hold those as one tensor. Where an adapter's target_modules name gate_proj,
up_proj or down_proj, PEFT 0.21 takes that tensor to be meant, everywhere: the linears of those names, in dense blocks
and shared experts, are then no targets, and their links are left out with a warning. Whole names and regular
expressions come to the same. But target_parameters (`...gate_proj.weight`) it takes as they are, for the same update.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import listed, reason
from ..layers import weights
from ..layers.factors import Factors
from ..layers.layer import LoRALinear
from ..layers.trained_modules import Changed, go_back
from .peft_format import PREFIX, TENSOR_FILE


class Reading(NamedTuple):
    sentence: str
    lost: frozenset[str] = frozenset()  # modules whose links PEFT leaves out or changes


def with_peft(model: nn.Module, folder: Path, factors: Mapping[str, Factors]) -> Reading:
    """What PEFT makes of the adapter in `folder`, which holds these factors."""
    if importlib.util.find_spec("peft") is None:
        return Reading("not compared: how PEFT reads it (peft is not installed)")
    title = f"PEFT {importlib.metadata.version('peft')}"
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(folder)
        empty = without_weights(model, but=config.modules_to_save or ())
    except Exception as error:  # whatever a model's own copying raises
        return Reading(f"not compared: how {title} reads it (the model cannot be copied: {reason(error)})")
    with safe_open(folder / TENSOR_FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            peft = PeftModel(empty, config)
            set_peft_model_state_dict(peft, dict(tensors))
            loaded = get_peft_model_state_dict(peft, save_embedding_layers=False)
    except Exception as error:  # PEFT's are of many kinds
        return Reading(f"{title} does not load it ({reason(error)}): export the merged model", frozenset(factors))
    modules = dict(peft.get_base_model().named_modules())
    wrong = {_module(key) for key, value in tensors.items() if key not in loaded or not torch.equal(loaded[key], value)}
    wrong |= {_module(key) for key in loaded.keys() - tensors.keys()}
    wrong |= {name for name, f in factors.items() if _scale(modules.get(name)) != f.scale}
    if wrong:
        names = f"{listed(sorted(wrong), 3)} ({len(wrong)} modules)"
        return Reading(f"{title} leaves out or changes the links of {names}: export the merged model", frozenset(wrong))
    return Reading(f"compared: {title} finds every module, with these factors and scales")


def as_parameters(config: bytes, names: Iterable[str]) -> bytes:
    """This adapter_config.json with the linears of these names, and what is targeted with them, as target_parameters.
    PEFT has no dropout for those, which is for training alone."""
    settings, moved = json.loads(config), sorted(names)
    targets = [t for t in settings["target_modules"] if not any(f".{name}".endswith(f".{t}") for name in moved)]
    parameters = [f"{name}.weight" for name in moved]
    for patterns in ("rank_pattern", "alpha_pattern"):
        for key in [key for key in settings[patterns] if key.removeprefix("^") in moved]:
            settings[patterns][rf"{key}(\.weight)?"] = settings[patterns].pop(key)
    settings |= {"target_modules": targets, "target_parameters": parameters, "lora_dropout": 0.0}
    return (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode()


def _module(key: str) -> str:
    return key.removeprefix(PREFIX).partition(".lora_")[0]


def _scale(module: nn.Module | None) -> float | None:
    scaling: Mapping[str, float] = getattr(module, "scaling", {})
    return scaling.get("default")


def without_weights(model: nn.Module, but: Iterable[str] = ()) -> nn.Module:
    """A copy of the model whose parameters and buffers take no memory, with plain modules for those of a chain. but:
    modules that weights are to be loaded into."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        blank = _blank(tensor.shape)
        memo[id(tensor)] = nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank
    memo |= {id(kept): kept for _, weight in weights.in_model(model) for kept in weight.attached()}
    twin = copy.deepcopy(model, memo)
    for layer in list(twin.modules()):
        if isinstance(layer, LoRALinear):
            plain = layer.to_linear()
            plain.__class__ = nn.Linear
            plain.weight = nn.Parameter(_blank((plain.out_features, plain.in_features)), requires_grad=False)
        elif isinstance(layer, Changed):
            go_back(layer)
    for name in but:
        for tensor in twin.get_submodule(name).state_dict(keep_vars=True).values():
            tensor.data = torch.zeros(tensor.shape)
    return twin


def _blank(shape: Any) -> Tensor:
    return torch.zeros(()).expand(shape)

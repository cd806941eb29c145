"""Is a checkpoint whole? Which files it is read from, what was missing in them, and whether the numbers are numbers.

transformers fills in what is missing with random numbers and reads whatever file an index names. Neither is an error
to it, so both are looked for here, before and after it loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import nn

from ..errors import UserError, listed, shown, told
from ..layers import weights
from ..layers.weights.weight import Weight

INDEX = ".safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYERS = 10_000  # more than any model has; transformers would make them all before it looks at the weights


def check_settings(name: str, settings: Any) -> None:
    """Raises UserError for a config.json that asks for what cannot be loaded, or for more than memory holds."""
    layers = getattr(settings, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > LAYERS:
        raise UserError(f"The config.json of {name} has num_hidden_layers {shown(layers)}: a model has fewer.")
    given: Any = getattr(settings, "quantization_config", None)
    if given is not None and weights.stored_as(keys := keys_of(given)) is None:
        known = " or ".join(kind.title for kind in weights.quantised_kinds())
        raise UserError(
            f"The weights of {name} are quantised to {_kind(keys)}, but a chain is trained on weights that are not "
            f"quantised, or on bitsandbytes' {known}: give the original model, and set model.load_in_4bit for NF4."
        )


def keys_of(quantisation: Any) -> Mapping[str, Any]:
    """A quantization_config as config.json has it, or as transformers made an object of it."""
    return quantisation if isinstance(quantisation, Mapping) else vars(quantisation)


def _kind(settings: Mapping[str, Any]) -> str:
    """What an unknown quantization_config quantises to, as its library says."""
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "8 bits"
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4")).lower()
    return shown(settings.get("quant_method"))


def refuse_other_files(name: str, settings: Any, find: Callable[[str], str | None]) -> None:
    """Raises UserError if transformers would read weights that are no safetensors, or lie elsewhere.

    find: file name -> where the checkpoint's file of that name is; None if it has none.
    """
    if find("adapter_config.json") is not None:
        raise UserError(
            f"{name} holds a PEFT adapter (adapter_config.json): give the model that it was made for, or one that it "
            "is merged into."
        )
    explicit = getattr(settings, "transformers_weights", None)
    if explicit is not None:
        _require_safetensors(f"The config.json of {name}", explicit, also=INDEX)
    named = explicit if isinstance(explicit, str) and explicit.endswith(INDEX) else f"model{INDEX}"
    index = find(named)
    if index is None:
        return
    with told(f"{index} is no index of weights"):
        files = set(json.loads(Path(index).read_bytes())["weight_map"].values())
    for file in files:
        _require_safetensors(index, file)


def _require_safetensors(where: str, file: Any, also: str = ".safetensors") -> None:
    if not isinstance(file, str) or not file.endswith((".safetensors", also)):
        raise UserError(f"{where} names {shown(file)} as weights, but only .safetensors files are read: convert them.")
    for path in (PurePosixPath(file), PureWindowsPath(file)):
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise UserError(f"{where} names {shown(file)} as weights, which lies outside the model's folder: not read.")


def refuse_incomplete(name: str, report: Mapping[str, Collection[Any]]) -> None:
    """Raises UserError if the loading report of transformers names tensors that are missing or of another shape."""
    wrong = sorted(
        f"{key} ({_size(found)} instead of {_size(wanted)})" for key, found, wanted in report["mismatched_keys"]
    )
    if wrong:
        raise UserError(f"The weights of {name} do not fit its config.json: {listed(wrong, 3)}. Give the right one.")
    missing = sorted(report["missing_keys"])
    if not missing:
        return
    unused = sorted(report["unexpected_keys"])
    raise UserError(
        f"The weights of {name} lack {len(missing)} tensors of the model ({listed(missing, 3)}), which would be "
        "random: give a whole checkpoint of such a model."
        + (f" It has {len(unused)} others ({listed(unused, 3)}){_why(missing, unused)}." if unused else "")
    )


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _why(missing: Collection[str], unused: Collection[str]) -> str:
    """What makes a missing name of one that is not used: `module.`, which DataParallel puts in front, and the like."""
    for other in unused:
        for key in missing:
            if other.endswith(f".{key}"):
                return f", with {other.removesuffix(key)} in front: take that off"
            if key.endswith(f".{other}"):
                return f", without {key.removesuffix(other)} in front: put that there"
    return ""


def refuse_others_than(name: str, kind: type[Weight], model: nn.Module) -> None:
    """Raises UserError if a checkpoint whose config.json says that its weights are of this kind holds others, which
    transformers leaves as they are."""
    linears = {f"{path}.weight": m for path, m in model.named_modules() if kind.held_by(type(m))}
    wrong = [key for key, linear in linears.items() if not isinstance(weights.of(linear), kind)]
    if wrong:
        raise UserError(
            f"The weights of {name} do not fit its config.json, which says {kind.size}: {listed(wrong, 3)} are not. "
            "Give the right one, or take quantization_config out."
        )


def refuse_not_finite(name: str, model: nn.Module) -> None:
    """Raises UserError for weights that are NaN or infinite; of quantised weights it looks at the scales. Every number
    is read once, as fast as memory gives it."""
    found = ((key, weight.numbers()) for key, weight in weights.in_model(model))
    tensors = {f"{key}{end}": part for key, parts in found for end, part in parts.items()}
    checked = {key: t for key, t in tensors.items() if t.dtype in FLOATS and t.numel() and not t.is_meta}
    finite = {key: torch.stack(torch.aminmax(t.detach())).isfinite().all() for key, t in checked.items()}
    bad = [key for key, fine in finite.items() if not bool(fine)]
    if bad:
        raise UserError(
            f"The weights of {name} hold NaN or infinite numbers in {len(bad)} tensors ({listed(bad, 3)}): give a "
            "checkpoint that is whole, or load it in a wider dtype if it was saved in one."
        )

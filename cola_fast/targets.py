"""Which modules a chain covers, and the rank each of them gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import patterns
from .errors import UserError, near, shown


def select_modules(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """Full name -> module, in the model's order.

    targets: module names (a suffix such as `q_proj` is enough), `"all-linear"` (every `nn.Linear` but the output head),
    or one regular expression that must match the full name.

    Raises UserError for a target that matches nothing, a module that is no `nn.Linear`, and a weight that other modules
    share, since folding into it would change them too.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if not isinstance(targets, str) and not (
        isinstance(targets, Sequence) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise UserError(f"targets is {shown(targets)}, but must be all-linear, a name or pattern, or a list of them.")
    if targets == "all-linear":
        heads = _heads(model)
        chosen = [n for n, m in modules.items() if isinstance(m, nn.Linear) and not any(m is head for head in heads)]
        if not chosen:
            raise UserError("targets is all-linear, but the model has no torch.nn.Linear besides its output head.")
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        found = {name for pattern in wanted for name in matching(pattern, modules)}
        chosen = [name for name in modules if name in found]
    return _checked(model, modules, chosen)


def modules_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The same for full names. One that the model has not is left out."""
    modules, wanted = {name: module for name, module in model.named_modules() if name}, set(names)
    return _checked(model, modules, [name for name in modules if name in wanted])


def _checked(model: nn.Module, modules: Mapping[str, nn.Module], chosen: Sequence[str]) -> dict[str, nn.Linear]:
    selected = {}
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}
    for name in chosen:
        module = modules[name]
        if any(name.startswith(f"{layer}.") for layer in adapted):
            raise UserError(
                f"{name} belongs to a LoRA layer of PEFT: merge the adapter first (merge_and_unload), or train it as "
                "it is, with accelerate_peft or ChainCallback."
            )
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"{name} is a {type(module).__name__}, but a link can only be attached to torch.nn.Linear."
                + near(name, [n for n, m in modules.items() if isinstance(m, nn.Linear)])
            )
        parent = modules.get(name.rpartition(".")[0], model)
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise UserError(
                f"{name} belongs to a {type(parent).__name__}, which in eval mode reads its weights past the link: "
                "call torch.backends.mha.set_fastpath_enabled(False) first, or choose other targets."
            )
        selected[name] = module
    _refuse_shared_weights(model, selected)
    return selected


def assign_ranks(shapes: Mapping[str, tuple[int, int]], r: int, pattern: Mapping[str, int] | None) -> dict[str, int]:
    """Rank of each module: the first entry of `pattern` that matches its name, else `r`.

    shapes: name -> (N, K). Raises UserError for a rank outside [1, min(N, K)] and for an entry that matches nothing.
    """
    pattern = {} if pattern is None else pattern
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise UserError(f"rank_pattern is {shown(pattern)}, but must map names or patterns of modules to ranks.")
    matches = {key: set(matching(key, shapes, what="rank_pattern key")) for key in pattern}
    ranks = {}
    for name, (n, k) in shapes.items():
        rank = next((pattern[key] for key in pattern if name in matches[key]), r)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise UserError(
                f"The rank of {name} is {shown(rank)}, but a rank is a whole number: choose 1 to {min(n, k)}."
            )
        if not 1 <= rank <= min(n, k):
            raise UserError(
                f"The rank of {name} is {shown(rank)}, but its weight is {n} x {k}: choose 1 to {min(n, k)}."
            )
        ranks[name] = rank
    return ranks


def block_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`: up to the first number. The name itself if it has none."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found[0] if found else name


def short_targets(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The last parts of the names (`q_proj`) if they select exactly these modules of the model, else the full names."""
    wanted = set(names)
    suffixes = {name.rsplit(".", 1)[-1] for name in wanted}
    exact = {name for name, _ in model.named_modules() if name and name.rsplit(".", 1)[-1] in suffixes} == wanted
    return sorted(suffixes) if exact else sorted(wanted)


def matching(pattern: str, names: Iterable[str], what: str = "target") -> list[str]:
    """Those of the names that end in it, or else that it matches as a regular expression. Raises UserError for none."""
    names = list(names)
    found = [name for name in names if name == pattern or name.endswith("." + pattern)]
    if not found:
        try:
            found = list(filter(patterns.compile(pattern), names))
        except patterns.PatternError as error:
            raise UserError(
                f"The {what} {shown(pattern)} is neither a module name nor a regular expression ({error})."
            ) from None
    if not found:
        leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit())
        hint = near(pattern, names if "." in pattern else leaves) or f" The model has: {', '.join(list(leaves)[:12])}."
        raise UserError(f"The {what} {shown(pattern)} matches no module.{hint}")
    return found


def _heads(model: nn.Module) -> list[nn.Module]:
    """Output layers: what transformers calls the output embeddings, and classification heads outside the backbone."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    named = [getattr(model, name, None) for name in ("score", "classifier", "qa_outputs")]
    return [module for module in (head, *named) if isinstance(module, nn.Module)]


def _refuse_shared_weights(model: nn.Module, selected: Mapping[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 2:
                owners.setdefault(_memory(parameter), []).append(name)
    for name, module in selected.items():
        if module._parameters.get("weight") is None:
            raise UserError(
                f"{name} computes its weight anew at each call, as pruning and weight norm do, so that nothing can be "
                "folded into it: make that permanent first, or choose other targets."
            )
        sharing = [other for other in owners[_memory(module.weight)] if other != name]
        if sharing:
            raise UserError(
                f"{name} shares its weight with {', '.join(sharing)}, so folding a link would change both: "
                "choose other targets, or untie the weights first."
            )


def _memory(parameter: Tensor) -> int:
    """Where it lies; of one that lies nowhere or in several places, which object it is."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta
    return parameter.data_ptr() if plain else id(parameter)

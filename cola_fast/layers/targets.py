"""Which modules a chain covers, and the rank each of them gets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from ..errors import UserError, near, shown
from . import name_patterns
from .obstacles import obstacles


class Selection(NamedTuple):
    modules: dict[str, nn.Linear]  # full name -> module, in the model's order
    note: str | None  # what all-linear has left out, and why


def select(model: nn.Module, targets: str | Sequence[str], taken: Collection[nn.Module] = ()) -> Selection:
    """The modules that a chain covers.

    targets: module names (a suffix such as `q_proj` is enough), `"all-linear"` (every `nn.Linear` but the output head,
    those that are `taken` and those that can take no link), or one regular expression that must match the full name.

    Raises UserError for a target that matches nothing, and for a module that is named but can take no link.
    """
    if not isinstance(targets, str) and not (
        isinstance(targets, Sequence) and targets and all(isinstance(t, str) for t in targets)
    ):
        raise UserError(f"targets is {shown(targets)}, but must be all-linear, a name or pattern, or a list of them.")
    modules = _modules(model)
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else list(targets)
        found = {name for pattern in wanted for name in matching(pattern, modules)}
        return Selection(_checked(model, [name for name in modules if name in found]), None)
    others = {*output_heads(model), *taken}
    linears = [n for n, m in modules.items() if isinstance(m, nn.Linear) and m not in others]
    without = obstacles(model, linears)
    firsts: dict[str, str] = {}  # obstacle -> the first linear that it keeps from a link
    for name, obstacle in without.items():
        firsts.setdefault(obstacle, name)
    why = " ".join(f"{name} {obstacle}" for obstacle, name in itertools.islice(firsts.items(), 3))
    chosen = {name: cast(nn.Linear, modules[name]) for name in linears if name not in without}
    if not chosen:
        raise UserError(
            "targets is all-linear, but the model has no torch.nn.Linear besides its output head"
            + (f" that can take a link: {why}" if why else f".{_instead(modules.values())}")
        )
    count = f"{len(without)} of {len(linears)} linears"
    return Selection(chosen, f"targets: all-linear leaves out {count}. {why}" if without else None)


def select_modules(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The modules of `select` alone."""
    return select(model, targets).modules


def modules_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """The same for full names. One that the model has not is left out."""
    wanted = set(names)
    return _checked(model, [name for name in _modules(model) if name in wanted])


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name}


def _checked(model: nn.Module, chosen: Sequence[str]) -> dict[str, nn.Linear]:
    """Modules that were named: an obstacle is an error."""
    modules = _modules(model)
    for name in chosen:
        if not isinstance(modules[name], nn.Linear):
            raise UserError(
                f"{name} is a {type(modules[name]).__name__}, but a link can only be attached to torch.nn.Linear."
                + near(name, [n for n, m in modules.items() if isinstance(m, nn.Linear)])
            )
    for name, obstacle in obstacles(model, chosen).items():
        raise UserError(f"{name} {obstacle}")
    return {name: cast(nn.Linear, modules[name]) for name in chosen}


def assign_ranks(
    shapes: Mapping[str, tuple[int, int]],
    r: int,
    pattern: Mapping[str, int] | None,
    highest: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Rank of each module: the first entry of `pattern` that matches its name, else `r`.

    shapes: name -> (N, K). highest: what `r` becomes where it is more than that, if it is not for all; a module where
    that is 0 is left out.

    Raises UserError for a rank outside [1, min(N, K)] and for an entry that matches nothing.
    """
    pattern = {} if pattern is None else pattern
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise UserError(f"rank_pattern is {shown(pattern)}, but must map names or patterns of modules to ranks.")
    matches = {key: set(matching(key, shapes, what="rank_pattern key")) for key in pattern}
    given = {name: next((pattern[key] for key in pattern if name in matches[key]), r) for name in shapes}
    for name, rank in given.items():
        if isinstance(rank, bool) or not isinstance(rank, int):
            n, k = shapes[name]
            raise UserError(
                f"The rank of {name} is {shown(rank)}, but a rank is a whole number: choose 1 to {min(n, k)}."
            )
    named = set[str]().union(*matches.values())
    if highest is not None and isinstance(r, int) and r > (most := max(highest.values())):
        raise UserError(f"The rank is {r}, but the model's largest linear can have {most}: choose 1 to {most}.")
    ranks = {}
    for name, rank in given.items():
        n, k = shapes[name]
        if highest is not None and name not in named and 0 <= highest[name] < rank:
            rank = highest[name]
            if rank == 0:
                continue
        if not 1 <= rank <= min(n, k):
            raise UserError(f"The rank of {name} is {rank}, but its weight is {n} x {k}: choose 1 to {min(n, k)}.")
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
            found = list(filter(name_patterns.compile(pattern), names))
        except name_patterns.PatternError as error:
            raise UserError(
                f"The {what} {shown(pattern)} is neither a module name nor a regular expression ({error})."
            ) from None
    if not found:
        leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit())
        hint = near(pattern, names if "." in pattern else leaves) or f" The model has: {', '.join(list(leaves)[:12])}."
        raise UserError(f"The {what} {shown(pattern)} matches no module.{hint}")
    return found


def output_heads(model: nn.Module) -> list[nn.Module]:
    """Output layers: what transformers calls the output embeddings, and classification heads outside the backbone."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    named = [getattr(model, name, None) for name in ("score", "classifier", "qa_outputs")]
    return [module for module in (head, *named) if isinstance(module, nn.Module)]


def _instead(modules: Iterable[nn.Module]) -> str:
    """What a model without linears has in their place."""
    kinds = dict.fromkeys(type(module).__name__ for module in modules)
    found = [kind for kind in ("Conv1D", "Conv1d", "Conv2d") if kind in kinds]
    return f" It has {found[0]} layers, which take no link." if found else ""

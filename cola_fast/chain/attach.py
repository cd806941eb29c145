"""The two ways to a chain: attach a fresh one to a model, or load one from its folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import store, world
from ..errors import UserError, listed, note, shown
from ..layers.layer import LoRALinear
from ..layers.targets import modules_named, select
from ..methods.options import ChainOptions, LinkOptions, from_arguments
from .bases import choose_base
from .beside import choose_beside, recorded_beside, require_apart
from .calibration import Batches
from .chain import Chain
from .chain_json import load_state, read_record
from .coverage import coverage
from .fingerprint import base_identity, fingerprint
from .open_link import Settings
from .sealed_link import SealedLink


def attach(
    model: nn.Module,
    options: ChainOptions | None = None,
    *,
    seed: int = 0,
    first_rank: int | None = None,
    batches: Batches | None = None,
    original: nn.Module | None = None,
    **keys: Any,
) -> Chain:
    """Freeze `model` and open link 0 on the targeted linears. The model's function does not change.

    Args:
        options: a chain's options as one object, which a type checker sees into, or each as an argument, which is
            checked when it is called: `attach(model, r=8, targets="all-linear")`.
            They and their defaults are in `methods.options`, and the keys of a configuration's section `chain`.
        seed: of the links' initial values and of stochastic rounding.
        first_rank: rank of link 0 if it is not `r`, as in a step-down.
        batches: with init="eva" or "lora-ga", a few training batches to look at, for this link and later ones: what
            the model's forward takes, with labels for lora-ga (`input_ids` and `labels` [B, T], `attention_mask`).
        original: with init="loftq", the 16-bit model that a 4-bit `model` was quantised from. It is not kept.

    Raises:
        UserError (a ValueError): see `layers.targets` and `layers.layer`. The model is then as it was.
    """
    if options is not None and (keys or not isinstance(options, ChainOptions)):
        given = f"and {listed(keys)} beside it" if keys else f"a {type(options).__name__}"
        raise UserError(f"options is given {given}: give one ChainOptions, or the options as arguments.")
    o = from_arguments(keys) if options is None else options
    model = _bare(model)
    capped = isinstance(o.targets, str) and o.targets == "all-linear"
    shared = {field.name: getattr(o, field.name) for field in fields(LinkOptions)}
    settings = Settings(**shared, seed=seed, capped=capped)
    settings.check()
    beside = choose_beside(model, o.train_also, o.train_tokens)
    modules, left_out = select(model, o.targets, beside.held())
    require_apart(beside, modules)
    shapes = {n: (m.out_features, m.in_features) for n, m in modules.items()}
    lower = settings.lowered(shapes, first_rank)
    experts = coverage(model, modules).note() if capped else None
    pattern = dict(o.rank_pattern) if o.rank_pattern else None
    settings = replace(settings, alpha=float(o.alpha), rank_pattern=pattern)
    kind = choose_base(o.base, o.rounding, modules.values())
    chain = Chain(model, modules, kind, settings, base_identity(model, beside), beside)
    try:
        beside.begin_at(world.lead(beside.values))  # a fresh head is rank 0's everywhere
        chain.extend(first_rank, batches=batches, original=original)
    except BaseException:
        chain.detach(discard=True)
        raise
    for sentence in filter(None, (left_out, lower, experts, beside.forgotten(modules))):
        note(sentence)
    return chain


def _shown_with_options(function: Any) -> None:
    """`help(attach)` and editors list every option with its default, as if each were written out."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields(ChainOptions)]
    function.__signature__ = own.replace(parameters=[*kept, *options])


_shown_with_options(attach)


def load_chain(model: nn.Module, folder: str | Path, *, links: int | None = None) -> Chain:
    """Rebuild a saved chain on a fresh copy of its base model: fold the sealed links, then reopen the open one.

    links: fold only the first ones and open none, to look at an earlier point of the chain.

    Raises UserError if the folder holds no chain, the model is not its base, or a file is damaged. Files are checked
    before the model is touched.
    """
    folder = store.given_path(folder).absolute()
    record = read_record(folder)
    state = load_state(folder, record) if links is None else None
    return rebuild(model, folder, record, state, links=links)


def rebuild(
    model: nn.Module,
    folder: Path,
    record: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    *,
    links: int | None = None,
) -> Chain:
    """The chain of `folder`, whose record and state have been read. See `load_chain`."""
    model = _bare(model)
    beside = recorded_beside(model, record.get("beside"))
    actual = fingerprint(model, beside)
    if actual != record["base"]["fingerprint"]:
        raise UserError(
            f"{folder} belongs to base model {record['base']['name']}, but this model's weights differ from it (or a "
            "chain has been tied into them already): load the untouched base first."
        )
    sealed = [SealedLink.from_record(entry, folder) for entry in record["links"]]
    if links is not None and (isinstance(links, bool) or not isinstance(links, int) or not 0 <= links <= len(sealed)):
        raise UserError(f"{folder} has {len(sealed)} sealed links, so links={shown(links)} cannot be loaded.")
    for link in sealed:
        link.require_fitting(record["modules"])
        beside.require_fitting(link.also(), str(link.folder))
    start = beside.read_start(folder, record.get("beside"))
    if state is not None:
        beside.require_fitting(state.get("beside", {}), f"The newest state in {folder}")
    settings = Settings(**{f.name: record[f.name] for f in fields(Settings) if f.name in record})
    settings.check()
    modules = modules_named(model, record["modules"])
    found = {name: [module.out_features, module.in_features] for name, module in modules.items()}
    if found != record["modules"]:
        wrong = next(name for name in record["modules"] if found.get(name) != record["modules"][name])
        raise UserError(
            f"{folder} has links on {wrong}, {record['modules'][wrong]}, but this model has "
            f"{found.get(wrong, 'no such linear')} there: load the base that the chain was attached to."
        )
    base = choose_base(record["base_kind"], record["rounding"], modules.values())
    chain = Chain(model, modules, base, settings, record["base"], beside)
    beside.begin_at(start)
    chain.folder, chain.state, chain.about = folder, record.get("state"), dict(record.get("about") or {})
    chain.waiting, chain.recorded = sealed, (folder, dict(record))
    chain.replay(len(sealed) if links is None else links)
    if state is not None and state["links"] == len(chain.links):
        chain.reopen(state)
    return chain


def _bare(model: nn.Module) -> nn.Module:
    """The model that a compiled one wraps, which gives its modules the names that everybody else knows.

    Raises UserError for no module at all, for one that carries a chain, and for wrappers that a link does not go into.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is {type(model).__name__}, but a link is attached to a torch.nn.Module.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UserError(
            f"model is wrapped in {type(model).__name__}, which does not know of parameters that come later: give the "
            "model inside (model.module), and wrap it after that, and again after every extend()."
        )
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    wrapped = next((name for name, _ in model.named_modules() if name.endswith("._orig_mod")), None)
    if wrapped is not None:
        raise UserError(
            f"{wrapped.removesuffix('._orig_mod')} is wrapped by torch.compile, which renames what is in it: attach "
            "before compiling it, or use its own method compile(), which wraps nothing."
        )
    adapted = next((name for name, module in model.named_modules() if _is_peft(module)), None)
    if adapted is not None:
        raise UserError(
            f"{adapted or 'model'} belongs to a PEFT adapter, which a chain does not train: attach to "
            "peft_model.merge_and_unload(), the model with the adapter in its weights, or peft_model.unload(), the one "
            "without it; or train the adapter itself, faster, with accelerate_peft."
        )
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise UserError(
            "The model already belongs to a chain: call chain.detach() first, or give one chain all the targets."
        )
    return model


def _is_peft(module: nn.Module) -> bool:
    """A PeftModel, or one of the layers that PEFT puts into somebody's model, accelerated or not."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)

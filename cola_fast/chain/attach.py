"""The two ways to a chain: attach a fresh one to a model, or load one from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import store, world
from ..errors import UserError, note, shown
from ..layers.layer import LoRALinear
from ..layers.targets import modules_named, select
from .bases import choose_base
from .beside import choose_beside, recorded_beside, require_apart
from .calibration import Batches
from .chain import Chain
from .coverage import coverage
from .fingerprint import base_identity, fingerprint
from .open_link import Settings
from .record import load_state, read_record
from .sealed_link import SealedLink


def attach(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16.0,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
    base: str = "auto",
    rounding: str = "auto",
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    first_rank: int | None = None,
    init: str = "kaiming",
    scaling: str = "lora",
    frozen: str | None = None,
    share: float = 1.0,
    carry: float = 0.0,
    gate: str | None = None,
    batches: Batches | None = None,
    original: nn.Module | None = None,
    train_also: str | Sequence[str] = (),
    train_tokens: Sequence[int] = (),
) -> Chain:
    """Freeze `model` and open link 0 on the targeted linears. The model's function does not change.

    Args:
        r: rank of a link.
        alpha: of a link; its scale is alpha / R, R being the module's own rank, see `scaling`.
        targets: names (`q_proj`), `"all-linear"`, or a regular expression over full module names.
        dropout: on the low-rank branch, in training mode.
        base: where tied links are kept, see `chain.bases`.
        rounding: of a tie: nearest, or stochastic, which `auto` is; see `chain.bases`.
        seed: of the links' initial values and of stochastic rounding.
        rank_pattern: module name or pattern -> rank, over `r`.
        first_rank: rank of link 0 if it is not `r`, as in a step-down.
        init: a name from `methods`: how a link starts (kaiming, pissa, olora, carry, eva, lora-ga, loftq).
        scaling: a name from `methods`: its scale (lora: alpha / R, rslora: alpha / sqrt(R), constant: alpha / r).
        frozen: "a" or "b", the factor that is not trained.
        share: of the blocks, drawn anew for each link, that it covers.
        carry: with init="carry", the share of a link that the next one starts from.
        gate: what a link trains beside A and B: adalora, sora (gates on the rank), dora (one on the output) or None.
        batches: with init="eva" or "lora-ga", a few training batches to look at, for this link and later ones: what
            the model's forward takes, with labels for lora-ga (`input_ids` and `labels` [B, T], `attention_mask`).
        original: with init="loftq", the 16-bit model that a 4-bit `model` was quantised from. It is not kept.
        train_also: modules that are trained whole beside the links (a classification head, embeddings, norms), by name,
            end of a name or regular expression; see `chain.beside`. A head that no checkpoint has belongs here.
        train_tokens: tokens whose rows of the embeddings, and of the output head, are trained beside the links, such as
            those that `resize_token_embeddings` has made room for.

    Raises:
        UserError (a ValueError): see `layers.targets` and `layers.layer`. The model is then as it was.
    """
    model = _bare(model)
    capped = isinstance(targets, str) and targets == "all-linear"
    settings = Settings(r, alpha, dropout, seed, rank_pattern, init, scaling, frozen, share, carry, gate, capped)
    settings.validate()
    beside = choose_beside(model, train_also, train_tokens)
    modules, left_out = select(model, targets, beside.held())
    require_apart(beside, modules)
    shapes = {n: (m.out_features, m.in_features) for n, m in modules.items()}
    lower = settings.lowered(shapes, first_rank)
    experts = coverage(model, modules).note() if capped else None
    settings = replace(settings, alpha=float(alpha), rank_pattern=dict(rank_pattern) if rank_pattern else None)
    kind = choose_base(base, rounding, modules.values())
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
    settings.validate()
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

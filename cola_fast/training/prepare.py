"""What a run needs before its first step, from the configuration alone: the base, the data's order, a link's ranks and
examples. Nothing here writes to the disk, so bad input is refused before a run has begun.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import datetime
from typing import Any

import torch
from torch import nn

from .. import world
from ..chain.calibration import Sample, draw
from ..chain.chain import Chain
from ..config import ChainConfig, Config
from ..data import heads
from ..data.batches import Feed
from ..data.rows import Data, holds_out, load_data
from ..errors import UserError, listed, note
from ..layers import weights
from ..layers.weights.weight import Weight
from ..methods import GRADIENT, RANKS, wanted_by
from ..seeds import derive_seed
from . import metrics
from .batch_checks import check_causal, check_packing, check_padding
from .models import context_length, load_model, quantised_as, resolve_device, resolve_dtype, stored_as, unquantised
from .optimizer import make_optimizer
from .schedule import Schedule, plan


def prepare(config: Config, data: Data, *, flat: bool = False) -> tuple[Schedule, Feed]:
    """The data's order and the schedule that follows from its length."""
    t, init = config.train, config.chain.init
    metrics.require(t.loggers)
    if wanted_by(init).corrects and not weights.loaded_as(config.model):
        raise UserError(
            f"chain.init is {init}, which corrects what quantising has lost: set model.load_in_4bit, or choose another."
        )
    if not data.train:
        raise UserError("The training set is empty once the examples that do not fit have been dropped.")
    if (config.schedule.plateau or t.early_stop) and not data.eval:
        key = "schedule.plateau" if config.schedule.plateau else "train.early_stop"
        raise UserError(f"{key} needs a validation set: set data.eval or data.eval_share.")
    if t.accumulation % world.size():
        raise UserError(
            f"train.accumulation is {t.accumulation}, but {world.size()} processes share the forward passes of a step: "
            f"set it to {world.size()} or a multiple (and train.batch_size lower, for as many rows a step as before)."
        )
    feed = Feed(data.train, t, max_length=data.max_length, flat=flat, held=data.eval)
    return plan(config.schedule, rank=config.chain.r, steps_per_epoch=len(feed) / t.accumulation), feed


def read_data(config: Config, model: nn.Module, tokenizer: Any, date: datetime | None) -> Data:
    """The data as this model can take it: within its context and its vocabulary.

    date: when its run began (see `run.begun`). Raises UserError if that is not known and decides what was held out.
    """
    data = load_data(
        config.data, tokenizer, context=context_length(model), seed=config.train.seed, date=date,
        head=heads.head_of(model, config.model),
    )  # fmt: skip
    if date is None and data.kind == "messages" and holds_out(config.data):
        raise UserError(
            "The run was started by an earlier version, which chose the held-out conversations by what the chat "
            "template made of them: go on with that version, or set data.eval to a file that was not trained on."
        )
    require_vocabulary(model, data)
    return data


def require_vocabulary(model: nn.Module, data: Data) -> None:
    """Raises UserError for a token of the data that the model has no embedding of; of one that only the tokenizer has,
    a note tells."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None:
        return
    examples = itertools.chain(data.train, data.eval, data.test)
    largest = max((max(map(max, filter(None, (e.input_ids, *e.candidates)))) for e in examples), default=0)
    rows = embedding.weight.shape[0]
    if largest >= rows:
        raise UserError(
            f"The tokenizer gives token {largest}, but the model has embeddings of {rows} tokens (and the tokenizer "
            f"has {data.vocabulary}): use the model's own tokenizer, or resize its embeddings and save it first."
        )
    if data.vocabulary > rows:
        data.notes.append(
            f"the tokenizer has {data.vocabulary} tokens, but the model embeddings of {rows}: the data uses none of "
            "the others, but another text may"
        )


def check_batches(config: Config, model: nn.Module, data: Data) -> None:
    """Raises UserError if the model sees what it should not: later tokens, or other sequences of a batch if there will
    be several."""
    if config.model.task != "causal-lm":
        return
    check_causal(model)
    t = config.train
    several = max(t.batch_size, t.eval_batch_size) > 1 or any(len(c) > 1 for e in data.train[:1] for c in e.candidates)
    if t.packing:
        check_packing(model)
    elif several:
        check_padding(model)


def base_kind(config: Config) -> type[Weight] | None:
    """The kind that the base's linears will be quantised to, as configured or because the checkpoint's are.

    Raises UserError for what that rules out.
    """
    kind, c = quantised_as(config.model), config.chain
    if kind is None:
        return None
    stored = stored_as(config.model) is not None
    what = f"{config.model.name} is stored in {kind.size}" if stored else f"model.{kind.option} is set"
    if c.base not in (*kind.bases, "auto"):
        raise UserError(f"chain.base is {c.base}, but {what}: use {', '.join(kind.bases)} or auto.")
    if config.train.shard:
        raise UserError(f"train.shard is for 16- and 32-bit weights, but {what}: leave it out.")
    if stored and wanted_by(c.init).corrects:
        raise UserError(
            f"chain.init is {c.init}, which needs the weights from before they were quantised, but {what}: give the "
            "original model and set model.load_in_4bit, or choose another."
        )
    return kind


def load_base(config: Config) -> tuple[nn.Module, torch.device | None]:
    """The model on this process's device; or on the CPU, with the device that it is to be sharded onto."""
    settings = replace(config.model, device=world.device(config.model.device))
    base_kind(config)
    if not config.train.shard or world.size() == 1:
        fresh: list[str] = []
        with torch.random.fork_rng([]):
            torch.manual_seed(derive_seed(config.train.seed, "head"))
            model = load_model(settings, fresh)
        if fresh:
            note(
                f"{listed(fresh)} of {settings.name}: not in the checkpoint, so drawn by train.seed, and to be trained."
            )
        return model, None
    device = resolve_device(settings.device)
    wide = resolve_dtype(settings.dtype, device) == torch.float32
    return load_model(replace(settings, device="cpu", dtype="fp32" if wide else "bf16")), device


def chain_options(config: Config, model: nn.Module, data: Data | None) -> ChainConfig:
    """What `attach` takes: with the ranks that the method chooses from the data, and with a classifying task's head."""
    c = config.chain
    given = (c.train_also,) if isinstance(c.train_also, str) else c.train_also
    head = () if config.model.task == "causal-lm" else tuple(heads.names(model))
    pattern = None if data is None else choose_ranks(config, model, data, 0)
    return replace(c, train_also=(*given, *head), rank_pattern=pattern or c.rank_pattern)


def choose_ranks(config: Config, model: nn.Module, data: Data, link: int) -> dict[str, int] | None:
    """What the method chooses for link `link`, the same on all ranks."""
    found = RANKS.choose(config.chain.ranks)(model, data.train, config.chain, link)
    return world.lead(lambda: found)


def looked_at(config: Config, data: Data, link: int) -> list[Sample] | None:
    """What the init looks at before a link: training examples drawn by a seed of their own, not from the feed."""
    c, t = config.chain, config.train
    if wanted_by(c.init).see is None:
        return None
    return draw(data.train, c.calibration, t.batch_size, derive_seed(t.seed, "calibration", link))


def original_model(config: Config) -> nn.Module | None:
    """The model before it was quantised, if the init wants it; on the CPU."""
    if not (wanted_by(config.chain.init).corrects and weights.loaded_as(config.model)):
        return None
    return load_model(replace(unquantised(config.model), device="cpu"))


def rehearse(chain: Chain, config: Config) -> None:
    """Do with the open link what a step does first, so that parts that do not fit each other are refused at once."""
    t, pairs = config.train, chain.pairs()
    make_optimizer(chain, t)
    if t.gradient is not None:
        GRADIENT.choose(t.gradient)(pairs, t)  # there are no gradients yet, so that it changes nothing
    if t.after_step is not None:
        for pair in pairs:
            pair.require_e(f"train.after_step: {t.after_step}")

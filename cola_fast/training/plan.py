"""A run before it starts: what it will train, for how long, and what memory it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..chain.attach import attach
from ..chain.coverage import Coverage, coverage
from ..config import Config
from ..data.batches import Batch, Feed, collate
from ..data.rows import Data
from ..store import given_path
from .batch_checks import wants_flat
from .memory import Estimate, estimate
from .models import load_empty_model, load_tokenizer, resolve_device, resolve_dtype
from .prepare import base_kind, chain_options, prepare, read_data, rehearse
from .run import date_for
from .schedule import Schedule


class Plan(NamedTuple):
    """A run before it starts."""

    need: Estimate
    schedule: Schedule
    feed: Feed
    data: Data
    layers: int  # that get a link
    beside: dict[str, int]  # parameters trained beside the links, and their sizes
    coverage: Coverage  # by all links
    batch: Batch  # the largest one
    device: torch.device
    dtype: torch.dtype


def plan_run(config: Config) -> Plan:
    """Reads the data but no weights, writes nothing."""
    stored = base_kind(config)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    model = load_empty_model(config.model).to(dtype)
    tokenizer = load_tokenizer(config.model)
    data = read_data(config, model, tokenizer, date_for(given_path(config.out)))
    schedule, feed = prepare(config, data)
    c, t = config.chain, config.train
    ranks = [span.rank for span in schedule.spans]
    options = replace(chain_options(config, model, None), init="kaiming", carry=0.0)  # there are no weights to look at
    options = replace(options, base=c.base if stored is None else "ledger")
    chain = attach(model, options, first_rank=max(ranks))
    chain.settings = replace(chain.settings, init=c.init, carry=c.carry)
    chain.settings.check()
    for rank in ranks if c.ranks == "uniform" else []:
        chain.ranks(rank)
    rehearse(chain, config)
    covered = coverage(model, chain.layers, chain.beside.parameters())
    rows = [[data.train[i] for i in row] for row in feed.sampler.rows]
    rows.sort(key=lambda row: -sum(map(len, row)))
    batch = collate(rows[: t.batch_size], flat=wants_flat(model))
    ledger = c.base == "ledger" or (c.base == "auto" and stored is not None)
    need = estimate(
        chain, model, batch, device=device, dtype=dtype, stored=stored, checkpointing=t.activation_checkpointing,
        optimizer=t.optimizer, tied=sum(ranks[:-1]) if ledger else 0,
    )  # fmt: skip
    beside = {name: parameter.numel() for name, parameter in chain.beside.named_parameters()}
    return Plan(need, schedule, feed, data, len(chain.pairs()), beside, covered, batch, device, dtype)


def size_of(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

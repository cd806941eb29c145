"""What a chain writes of itself: chain.json, its state, and what an adapter says of its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import store
from ..errors import UserError
from ..layers.targets import short_targets
from .chain_json import CHAIN_FILE, FORMAT, START_FILE, binding, folder_name, write_state
from .chain_json import write_record as write_chain_file
from .peft_format import task_type
from .sealed_link import SealedLink

if TYPE_CHECKING:
    from .chain import Chain


def write(chain: Chain, folder: Path, extra: Mapping[str, Any] | None) -> None:
    """chain.json last: with it the folder holds a chain, and it names the state. The chain moves there once all of
    it has been written."""
    links = chain.links
    if chain.folder != folder:
        if (folder / CHAIN_FILE).exists():
            raise UserError(f"{folder} already holds a chain: choose another folder, or load that one.")
        store.make_folder(folder)
        links = [replace(link) for link in chain.links]
        for link in links:
            link.write(folder / folder_name(link.index))
        if chain.beside:
            store.write_file(folder / START_FILE, chain.beside.start_file())
    factors = {name: tuple(f) for name, f in chain.live_factors().items()}
    index, starts = (chain.open_link.index, chain.open_link.starts) if chain.open_link is not None else (None, {})
    state = {
        "chain": binding(record(chain, links), len(links)),
        "links": len(chain.links),
        "open": index,
        "factors": factors,
        "starts": {name: tuple(f) for name, f in starts.items()},
        "groups": chain.grouping.state(chain.layers),
        "beside": chain.beside.values(),
        "extra": dict(extra or {}),
    }
    chain.state = write_state(folder, state)
    write_record(chain, folder, links)
    chain.links = links


def peft_fields(chain: Chain, names: Iterable[str]) -> dict[str, Any]:
    """What `peft_format.encode` says of this chain's base, for an adapter of these modules."""
    return {
        "targets": short_targets(chain.model, names),
        "base_name": chain.identity["name"],
        "base_revision": chain.identity["revision"],
        "dropout": chain.settings.dropout,
        "task_type": task_type(chain.model),
        "also": chain.beside.also(),
    }


def record(chain: Chain, links: Sequence[SealedLink]) -> dict[str, Any]:
    """What chain.json says of the chain with these links."""
    return {
        "format": FORMAT,
        "base": chain.identity,
        "base_kind": chain.base.kind,
        "rounding": chain.base.rounding,
        **asdict(chain.settings),
        "modules": {name: list(shape) for name, shape in chain.shapes().items()},
        "beside": chain.beside.record(),
        "links": [{**link.record(), "base_kind": chain.base.kind} for link in links],
        "open": None if chain.open_link is None or chain.open_link.index != len(links) else len(links),
        "state": chain.state,
        "about": chain.about,
    }


def write_record(chain: Chain, folder: Path, links: Sequence[SealedLink]) -> None:
    found = record(chain, links)
    if (folder, found) != chain.recorded:
        write_chain_file(folder, found)
        chain.recorded = (folder, found)

"""A chain inside somebody else's checkpoint: whole copies that can be gone back to, while the chain itself goes on.

`Chain.save` moves the chain into a folder, where every later tie is recorded at once. A trainer that keeps several
checkpoints, and deletes old ones, needs each to hold all links up to its own step and none after it.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .chain import Chain
from .chain_json import load_state, read_record
from .sealed_link import SealedLink


def save_copy(chain: Chain, folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write what `chain.save(folder, extra)` would, whole or not at all, and leave the chain where it is."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    for stale in (temporary, folder):
        shutil.rmtree(stale, ignore_errors=True)
    twin = copy.copy(chain)
    twin.folder, twin.recorded = None, None
    twin.links = [replace(link) for link in chain.links]
    twin.save(temporary, extra)
    os.rename(temporary, folder)


def restore(chain: Chain, folder: Path) -> dict[str, Any]:
    """Bring a freshly attached chain to where the copy in `folder` was made, and return that copy's `extra`.

    The sealed links are folded into the untouched base and the open link is opened as it was. `folder` is not needed
    afterwards.

    Raises UserError if the chain has been used already, was attached in another way, or a file is damaged; the model is
    then as it was.
    """
    record, expected = read_record(folder), chain.record([])
    if chain.links or chain.waiting:
        raise UserError(
            f"{folder} can only be restored into a fresh chain, but this one has {len(chain.links)} sealed links: load "
            "the base model again and attach."
        )
    if record["base"]["fingerprint"] != expected["base"]["fingerprint"]:
        raise UserError(
            f"{folder} belongs to base model {record['base']['name']}, but this model's weights differ from it: load "
            "the untouched base first."
        )
    before, now = _attached(record), _attached(expected)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        what = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed[:3])
        raise UserError(f"{folder} was made by a chain attached in another way ({what}): attach it as it was.")
    sealed = [SealedLink.from_record(entry, folder) for entry in record["links"]]
    for link in sealed:
        link.detach()
        link.require_fitting(record["modules"])
        chain.beside.require_fitting(link.also(), str(folder))
    start = chain.beside.read_start(folder, record.get("beside"))
    state = load_state(folder, record)
    if state is None or state["links"] != len(sealed):
        raise UserError(f"{folder} has no state of its last link: resume from an earlier checkpoint.")
    chain.beside.require_fitting(state.get("beside", {}), str(folder))
    drop_open_link(chain)
    chain.beside.begin_at(start)
    chain.waiting = sealed
    chain.replay(len(sealed))
    chain.reopen(state)
    extra: dict[str, Any] = state["extra"]
    return extra


def _attached(record: Mapping[str, Any]) -> dict[str, Any]:
    """What chain.json says of how the chain was attached. A fresh head starts as another one in every process; `capped`
    is in the ranks, and earlier versions did not record it."""
    of_its_course = ("base", "links", "open", "state", "format", "about", "capped")
    kept = {key: value for key, value in record.items() if key not in of_its_course}
    beside = record.get("beside")
    return {**kept, "beside": beside and {key: value for key, value in beside.items() if key != "start"}}


def drop_open_link(chain: Chain) -> None:
    """Forget the open link, trained or not."""
    for layer in chain.layers.values():
        layer.close()
    chain.open_link = None

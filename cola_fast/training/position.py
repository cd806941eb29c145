"""Where a run is, as every state keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError


@dataclass
class Position:
    """Where a run is. Saved with every state."""

    step: int = 0  # optimizer steps done
    link: int = 0  # the link being trained
    link_start: int = 0  # step at which it was opened
    knot_due: bool = False  # it is fully trained, and to be tied next
    stopping: bool = False  # by early_stop: that knot is the last one
    best_loss: float = math.inf  # on the validation set, over the run
    stale: int = 0  # evaluations since then
    link_best_loss: float = math.inf
    link_stale: int = 0
    tokens: int = 0
    seconds: float = 0.0


def require_position(record: Mapping[str, Any], state: Mapping[str, Any] | None, run: Path) -> Position:
    """Where a state goes on. Refuses one that would train sealed links again."""
    position = position_in(state, run) if state is not None and state["extra"] else Position()
    sealed = len(record["links"])
    if sealed != position.link and not (sealed == position.link + 1 and position.knot_due):
        found = "no readable state" if state is None else f"the newest readable state is of link {position.link + 1}"
        raise UserError(
            f"{run} has {sealed} sealed links, but {found} (files in state/ are missing or damaged): restore them from "
            "a copy, or set `out` to a new folder to train anew. The links are whole: load_chain(model, folder, "
            f"links={sealed}) brings them back."
        )
    return position


def position_in(state: Mapping[str, Any], run: Path) -> Position:
    try:
        return Position(**state["extra"]["position"])
    except (KeyError, TypeError):
        raise UserError(f"The states in {run / 'state'} are not of `cola train`: set `out` to a new folder.") from None

"""A chain's folder without its model: chain.json, and the states of the open link, of which the last are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import store
from .errors import UserError

FORMAT = 1
CHAIN_FILE = "chain.json"
STATES_KEPT = 2
REQUIRED = ("base", "base_kind", "rounding", "seed", "r", "alpha", "dropout", "modules", "links")


def read_record(folder: str | Path) -> dict[str, Any]:
    """chain.json, checked to be one we can read."""
    folder = Path(folder)
    if not (folder / CHAIN_FILE).exists():
        raise UserError(f"{folder} holds no chain ({CHAIN_FILE} is missing): give the folder of a run.")
    record: dict[str, Any] = store.read_json(folder / CHAIN_FILE)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UserError(
            f"{folder / CHAIN_FILE} has format {found}, but this version reads format {FORMAT}: update cola_fast."
        )
    missing = [key for key in REQUIRED if record.get(key) is None]
    if missing:
        raise UserError(
            f"{folder / CHAIN_FILE} does not say the chain's {', '.join(missing)}, without which its links cannot be "
            "folded to the same weights again: restore the file."
        )
    for link in record["links"]:
        kind = link.get("base_kind", record["base_kind"])
        if kind != record["base_kind"]:
            raise UserError(
                f"{folder / CHAIN_FILE} has a link {link['index']} that was tied into a base of kind {kind}, but the "
                f"chain's is {record['base_kind']}: restore the file, or import that link's folder as an adapter."
            )
    return record


def load_state(folder: str | Path) -> dict[str, Any] | None:
    """The newest state saved with the chain: `links` sealed by then, `open` index, `factors`, `extra`. None if there is
    none. A damaged file is passed over for the one before it."""
    for path in reversed(state_files(Path(folder))):
        try:
            state: dict[str, Any] = store.load_tensors(path)
        except Exception:  # whatever a damaged zip or pickle raises
            continue
        return state
    return None


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """As the newest one. It is whole on disk before an old one goes."""
    states = state_files(folder)
    number = int(states[-1].stem) + 1 if states else 0
    store.make_folder(folder / "state")
    store.save_tensors(folder / "state" / f"{number:08d}.pt", state)
    for old in states[: -(STATES_KEPT - 1)]:
        old.unlink(missing_ok=True)


def state_files(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("[0-9]*.pt"))

"""A chain's folder without its model: chain.json, and the states of the open link, of which the last are kept.

chain.json carries its own checksum and is checked to be one a chain can have; a state carries its checksum in its name,
and names the chain it belongs to (`binding`). Folders of format 1, from before there were checksums, are read with a
note. Format 2 knew of nothing that is trained beside the links.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import store
from ..errors import UserError, note
from .peft_format import CONFIG_FILE, TENSOR_FILE

FORMAT = 3
CHAIN_FILE = "chain.json"
START_FILE = "start.safetensors"  # what is trained beside the links, as it was when the chain was attached
STATES_KEPT = 2
REQUIRED = ("base", "base_kind", "rounding", "seed", "r", "alpha", "dropout", "modules", "links")
# What a chain has in common with its states and its best checkpoint. Not rank_pattern, which a later link may change.
BOUND = (
    "base_kind", "rounding", "seed", "r", "alpha", "dropout", "init", "scaling", "frozen", "share", "carry", "gate",
    "modules",
)  # fmt: skip


# --- chain.json -------------------------------------------------------------------------------------------------------


def read_record(folder: str | Path) -> dict[str, Any]:
    """chain.json, checked to be what was written, and one we can read."""
    folder = Path(folder)
    path = folder / CHAIN_FILE
    with store.reading(path):
        if not path.exists():
            raise UserError(f"{folder} holds no chain ({CHAIN_FILE} is missing): give the folder of a run.")
    record, sealed = store.read_sealed(path)
    if record.get("format") not in range(1, FORMAT + 1):
        raise UserError(
            f"{path} has format {record.get('format')!r}, but this version reads formats 1 to {FORMAT}: update "
            "cola_fast."
        )
    if not sealed and record["format"] != 1:
        raise UserError(f"{path} has lost its checksum: it was damaged or edited, restore it from a copy.")
    missing = [key for key in REQUIRED if record.get(key) is None]
    if missing:
        raise UserError(
            f"{path} does not say the chain's {', '.join(missing)}, without which its links cannot be "
            "folded to the same weights again: restore the file."
        )
    wrong = next(_faults(record), None)
    if wrong is not None:
        raise UserError(f"{path} is damaged ({wrong}): restore it from a copy.")
    for link in record["links"]:
        kind = link.get("base_kind", record["base_kind"])
        if kind != record["base_kind"]:
            raise UserError(
                f"{path} has a link {link['index']} that was tied into a base of kind {kind}, but the "
                f"chain's is {record['base_kind']}: restore the file, or import that link's folder as an adapter."
            )
    if not sealed:
        note(f"{path} was written by an earlier version and carries no checksum: damage to it would go unnoticed.")
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    store.write_sealed(folder / CHAIN_FILE, record)


def _faults(record: Mapping[str, Any]) -> Iterator[str]:
    """What no chain can have said of itself."""
    base, modules = record["base"], record["modules"]
    if not (isinstance(base, dict) and isinstance(base.get("name"), str) and _is_hash(base.get("fingerprint"))):
        yield "base has no name and fingerprint"
    for key in ("revision", "quantisation"):
        if isinstance(base, dict) and not isinstance(base.get(key), str | None):
            yield f"base.{key} is no text"
    for key in ("base_kind", "rounding", "init", "scaling", "state"):
        if not isinstance(record.get(key) or "", str):
            yield f"{key} is no text"
    if not _is_count(record["r"]):
        yield "r is no rank"
    if not isinstance(record["seed"], int) or isinstance(record["seed"], bool):
        yield "seed is no whole number"
    for key in ("alpha", "dropout", "share", "carry"):
        if not _is_number(record.get(key, 0.0)):
            yield f"{key} is no number"
    if not isinstance(record.get("about") or {}, dict):
        yield "about is no mapping"
    beside = record.get("beside")
    if beside is not None and not _is_beside(beside):
        yield "beside does not name modules, tokens and the hash of their start"
    pattern = record.get("rank_pattern")
    if pattern is not None and not (isinstance(pattern, dict) and all(map(_is_count, pattern.values()))):
        yield "rank_pattern is no mapping of names to ranks"
    if not (isinstance(modules, dict) and modules and all(map(_is_shape, modules.values()))):
        yield "modules is no mapping of names to shapes"
        return
    if not isinstance(record["links"], list):
        yield "links is no list"
        return
    for index, link in enumerate(record["links"]):
        yield from (f"link {index}: {fault}" for fault in _faults_of_link(link, index, modules))
    opened = record.get("open")
    if opened is not None and opened != len(record["links"]):
        yield f"link {opened!r} is said to be open after {len(record['links'])} links"


def _faults_of_link(link: Any, index: int, modules: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(link, dict):
        yield "it is no mapping"
        return
    if link.get("index") != index:
        yield f"its index is {link.get('index')!r}"
    if link.get("folder") != folder_name(index):
        yield f"its folder is {link.get('folder')!r}"
    ranks, hashes, fold = link.get("ranks"), link.get("sha256"), link.get("fold")
    if not (isinstance(ranks, dict) and ranks and all(map(_is_count, ranks.values()))):
        yield "ranks is no mapping of modules to ranks"
    elif not modules.keys() >= ranks.keys():
        yield f"it has modules that the chain has not, such as {min(ranks.keys() - modules.keys())}"
    if not (isinstance(hashes, dict) and set(hashes) == {CONFIG_FILE, TENSOR_FILE}):
        yield f"sha256 does not name {CONFIG_FILE} and {TENSOR_FILE}"
    elif not all(map(_is_hash, hashes.values())):
        yield "sha256 is no hash"
    if not (isinstance(fold, dict) and isinstance(fold.get("retained", 0.0), int | float)):
        yield "fold is no report"


def _is_beside(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("modules"), list)
        and isinstance(value.get("tokens"), list)
        and all(isinstance(name, str) for name in value["modules"])
        and all(type(token) is int for token in value["tokens"])
        and _is_hash(value.get("start"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def folder_name(index: int) -> str:
    return f"links/{index:03d}"


def binding(record: Mapping[str, Any], links: int) -> str:
    """Names a chain as it was after `links` links: its base, what all links share, and the links themselves."""
    about = {key: record.get(key) for key in BOUND}
    if record.get("beside") is not None:
        about["beside"] = record["beside"]
    hashes = [link["sha256"] for link in record["links"][:links]]
    return store.content_hash([record["base"]["fingerprint"], about, hashes])


# --- states -----------------------------------------------------------------------------------------------------------


def load_state(folder: str | Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The newest state saved with the chain: `links` sealed by then, `open` index, `factors`, `extra`. None if there is
    none.

    Raises UserError if it cannot be read although a link is open: the one before it is of an earlier step.
    """
    state, passed = newest_state(folder, record)
    opened = record.get("open") if record["format"] > 1 else (state or {}).get("open")
    if opened is not None and (passed or state is None):
        problem = passed[0] if passed else f"{Path(folder) / 'state'} holds no state"
        raise UserError(
            f"{problem} The open link was in it: restore it from a copy; or run the `cola train` that made it again, "
            "which goes on from the state before; or take the sealed links alone, "
            f"load_chain(model, folder, links={len(record['links'])})."
        )
    return state


def newest_state(folder: str | Path, record: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state that is whole and belongs to the chain, and why newer ones were passed over, a sentence each."""
    passed: list[str] = []
    for path in reversed(state_files(Path(folder))):
        try:
            state: dict[str, Any] = store.load_tensors(path)
            _require_bound(state, record, path)
        except UserError as error:
            passed.append(str(error))
            continue
        if "-" not in path.stem:
            note(f"{path} was written by an earlier version and carries no checksum: damage to it would go unnoticed.")
        return state, [*passed, *_lost(Path(folder), record, path)]
    return None, [*passed, *_lost(Path(folder), record, None)]


def _lost(folder: Path, record: Mapping[str, Any], newest: Path | None) -> list[str]:
    """A sentence if chain.json names a newer state than there is. It is written after the state that it names."""
    name = record.get("state")
    path = folder / "state" / str(name)
    gone = name is not None and not path.exists() and (newest is None or _number(newest) < _number(path))
    return [f"{path} is missing."] if gone else []


def _require_bound(state: Any, record: Mapping[str, Any], path: Path) -> None:
    keys = {"links": int, "factors": dict, "extra": dict}
    if not (isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in keys.items())):
        raise UserError(f"{path} is damaged (it is no state of a chain).")
    if "chain" in state and state["chain"] != binding(record, state["links"]):
        raise UserError(f"{path} belongs to another chain.")


def write_state(folder: Path, state: Mapping[str, Any]) -> str:
    """As the newest one; returns its name. It is whole on disk before an old one goes."""
    states = state_files(folder)
    number = _number(states[-1]) + 1 if states else 0
    store.make_folder(folder / "state")
    path = store.save_tensors(folder / "state", number, state)
    for old in states[: -(STATES_KEPT - 1)]:
        with suppress(OSError):  # the new one is whole: one too many does no harm
            old.unlink()
    return path.name


def state_files(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("[0-9]*.pt"), key=_number)


def _number(path: Path) -> int:
    number = path.stem.partition("-")[0]
    return int(number) if number.isdecimal() else -1

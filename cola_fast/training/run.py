"""A run folder: who may write in it, and which configuration it belongs to.

config.yaml  chain.json  links/  state/  best/  metrics.jsonl  curves.png
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import config as configuration
from .. import config_tree, store, world
from ..chain.chain_json import CHAIN_FILE, read_record
from ..config import Config, ModelConfig
from ..errors import UserError, shown
from .models import DTYPES, resolve_device, resolve_dtype

CONFIG_FILE = "config.yaml"
CONFIG_KEY, DATE_KEY = "config", "date"  # of what chain.json keeps of a run
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Keys that may differ when a run is resumed: they do not change the links. Data is known by its content, wherever it
# lies (the feed's digest). A model is not: the fingerprint does not see another dtype, or another config.json.
FREE_TRAIN_KEYS = ("save_every", "log_every", "loggers", "eval_batch_size", "shard")
FREE_DATA_KEYS = ("train", "eval", "test")
FREE_KEYS = {"out", *(f"data.{key}" for key in FREE_DATA_KEYS), *(f"train.{key}" for key in FREE_TRAIN_KEYS)}
# Keys that chain.json does not keep: where the model lies by now, and the device it is scored on, are config.yaml's
# to say; whether its code may run is the command line's.
UNRECORDED_KEYS = FREE_KEYS | {"model.name", "model.device", "model.trust_remote_code"}


class Run:
    """`with Run(config) as run`: nothing is written before `claim`, and the folder is let go at the end.

    config: as given, but for a dtype that is `auto`: what it was where the run was started it stays on other machines.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, store.given_path(config.out)
        self._held = contextlib.ExitStack()
        self._holding = False

    def __enter__(self) -> Run:
        in_use = world.lead(self._in_use)
        self.config = replace(self.config, model=world.lead(self._model))
        if in_use:
            world.lead(self._hold)  # an existing run: refuse at once, not after loading a model
        self.date = world.lead(lambda: date_for(self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._held.close()

    @property
    def started(self) -> bool:
        return world.lead((self.path / CHAIN_FILE).exists)

    @property
    def about(self) -> dict[str, Any]:
        """What chain.json keeps of the run."""
        date = {} if self.date is None else {DATE_KEY: self.date.isoformat()}
        return {CONFIG_KEY: recorded(self.config), **date}

    def claim(self) -> None:
        """Nothing is left to be refused: lock the folder for this process, and write down the configuration."""
        world.lead(self._claim)

    def _in_use(self) -> bool:
        with store.reading(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"out is {self.path}, but that is a file: name a folder.")
            above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            if not (above.is_dir() and os.access(above, os.W_OK)):
                raise UserError(f"out is {self.path}, but {above} is no folder that can be written in: name another.")
            return self.path.exists() and any(self.path.iterdir())

    def _model(self) -> ModelConfig:
        model = self.config.model
        if model.dtype == "auto" and (self.path / CONFIG_FILE).exists():
            model = replace(model, dtype=load_config(self.path).model.dtype)
        dtype: Any = DTYPE_NAMES[resolve_dtype(model.dtype, resolve_device(model.device))]
        return replace(model, dtype=dtype)

    def _hold(self) -> None:
        """Lock the folder, and make sure it is this configuration's."""
        with store.reading(self.path):
            there = list(self.path.iterdir()) if self.path.exists() else []
        others = [p.name for p in there if not p.name.startswith(".")]
        if others and not (self.path / CONFIG_FILE).exists():
            raise UserError(f"out is {self.path}, which holds other files ({others[0]}, ...): choose a new folder.")
        if others:
            self._require_same_config()
        store.make_folder(self.path)
        self._held.enter_context(store.lock(self.path))
        self._holding = True
        store.sweep(self.path)

    def _claim(self) -> None:
        if not self._holding:
            self._hold()
        path = self.path / CONFIG_FILE
        if not path.exists() or load_config(self.path) != self.config:  # with what may differ when a run is resumed
            store.write_file(path, configuration.to_yaml(self.config).encode())

    def _require_same_config(self) -> None:
        if (self.path / CHAIN_FILE).exists():
            changed = _changes(read_record(self.path), self.config)
            if changed:
                raise _other_configuration(self.path, changed, "")
        old, new = flatten(config_tree.to_dict(load_config(self.path))), flatten(config_tree.to_dict(self.config))
        if old["model.dtype"] == "auto":  # a file of the user's own, not one that `claim` has written
            old["model.dtype"] = new["model.dtype"]
        keys = dict.fromkeys([*new, *old])  # of a mapping that is gone, only the old ones tell
        changed = [
            f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in keys
            if key not in FREE_KEYS and new.get(key) != old.get(key)
        ]
        if changed:
            moved = " If the model has only moved, write its new name into that run's config.yaml, too."
            only_name = len(changed) == 1 and changed[0].startswith("model.name ")
            raise _other_configuration(self.path, changed, moved if only_name else "")


def _other_configuration(run: Path, changed: list[str], hint: str) -> UserError:
    return UserError(
        f"{run} belongs to a run with another configuration ({'; '.join(changed[:4])}): choose another `out`, or give "
        f"the configuration it was started with to resume it.{hint}"
    )


def recorded(config: Config) -> dict[str, Any]:
    """What chain.json keeps of a configuration: every key that decides what the links are, `section.key` -> value."""
    return {key: value for key, value in flatten(config_tree.to_dict(config)).items() if key not in UNRECORDED_KEYS}


def _changes(record: Mapping[str, Any], config: Config) -> list[str]:
    """What the configuration says otherwise than the one in the run's record. Nothing for a run of an earlier version,
    which kept none."""
    kept = record.get("about", {}).get(CONFIG_KEY)
    if kept is None:
        return []
    now, defaults = recorded(config), recorded(Config())
    pairs = {
        key: (kept.get(key, defaults.get(key)), now.get(key))
        for key in dict.fromkeys([*now, *kept])
        if key not in UNRECORDED_KEYS
    }
    return [f"{key} was {old!r}, is {new!r}" for key, (old, new) in pairs.items() if old != new]


def date_for(run: Path) -> datetime | None:
    """What the chat template is told of today: when the run in this folder began, or now if there is none yet."""
    started = (run / CHAIN_FILE).exists()
    return begun(read_record(run)) if started else datetime.now().replace(microsecond=0)


def begun(record: Mapping[str, Any]) -> datetime | None:
    """When a run began, which its data's chat template is told of today. None for a run of an earlier version."""
    date = record.get("about", {}).get(DATE_KEY)
    try:
        return None if date is None else datetime.fromisoformat(date)
    except (TypeError, ValueError):
        raise UserError(f"{CHAIN_FILE} is damaged (about.date is {shown(date)}): restore it from a copy.") from None


def read_run(run: Path, *, trust_remote_code: bool = False) -> tuple[dict[str, Any], Config]:
    """A run's record and its configuration, which is checked to be the one it was trained with.

    trust_remote_code: that the user of this process allows it; what somebody has written into config.yaml does not.
    """
    record, config = read_record(run), load_config(run)
    changed = _changes(record, config)
    if changed:
        raise UserError(
            f"{run / CONFIG_FILE} is not what the run was trained with ({'; '.join(changed[:4])}): write that back."
        )
    if config.model.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{run / CONFIG_FILE} asks to run code that comes with the model {config.model.name}, which only you can "
            "allow: if you trust it, add --trust-remote-code."
        )
    return record, replace(config, model=replace(config.model, trust_remote_code=trust_remote_code))


def load_config(run: Path) -> Config:
    """The resolved configuration in a run folder."""
    with store.reading(run / CONFIG_FILE):
        if not (run / CONFIG_FILE).exists():
            raise UserError(f"{run} is not a run folder: it has no {CONFIG_FILE}.")
    return configuration.load(run / CONFIG_FILE)


def flatten(nested: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{path}.{key}" if path else key
        flat |= flatten(value, name) if isinstance(value, dict) else {name: value}
    return flat

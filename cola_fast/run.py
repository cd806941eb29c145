"""A run folder: who may write in it, and which configuration it belongs to.

config.yaml  chain.json  links/  state/  best/  metrics.jsonl  curves.png
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from . import config as configuration
from . import store, tree, world
from .config import Config, ModelConfig
from .errors import UserError
from .models import DTYPES, resolve_device, resolve_dtype
from .record import CHAIN_FILE

CONFIG_FILE = "config.yaml"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Keys that may differ when a run is resumed: they do not change the links. Data is known by its content, wherever it
# lies (the feed's digest). A model is not: the fingerprint does not see another dtype, or another config.json.
FREE_TRAIN_KEYS = ("save_every", "log_every", "loggers", "eval_batch_size", "shard")
FREE_KEYS = {"out", "data.train", "data.eval", "data.test", *(f"train.{key}" for key in FREE_TRAIN_KEYS)}


class Run:
    """`with Run(config) as run`: nothing is written before `claim`, and the folder is let go at the end.

    config: as given, but for a dtype that is `auto`: what it was where the run was started it stays on other machines.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.out)
        self._held = contextlib.ExitStack()
        self._holding = False

    def __enter__(self) -> Run:
        in_use = world.lead(self._in_use)
        self.config = replace(self.config, model=world.lead(self._model))
        if in_use:
            world.lead(self._hold)  # an existing run: refuse at once, not after loading a model
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._held.close()

    @property
    def started(self) -> bool:
        return world.lead((self.path / CHAIN_FILE).exists)

    def claim(self) -> None:
        """Nothing is left to be refused: lock the folder for this process, and write down the configuration."""
        world.lead(self._claim)

    def _in_use(self) -> bool:
        if self.path.is_file():
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
        others = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.exists() else []
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
        old, new = flatten(tree.to_dict(load_config(self.path))), flatten(tree.to_dict(self.config))
        if old["model.dtype"] == "auto":  # a file of the user's own, not one that `claim` has written
            old["model.dtype"] = new["model.dtype"]
        keys = dict.fromkeys([*new, *old])  # of a mapping that is gone, only the old ones tell
        changed = [key for key in keys if key not in FREE_KEYS and new.get(key) != old.get(key)]
        if changed:
            what = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:4])
            moved = " If the model has only moved, write its new name into that run's config.yaml, too."
            raise UserError(
                f"{self.path} belongs to a run with another configuration ({what}): choose another `out`, or give the "
                f"configuration it was started with to resume it.{moved if changed == ['model.name'] else ''}"
            )


def load_config(run: Path) -> Config:
    """The resolved configuration a run was started with."""
    if not (run / CONFIG_FILE).exists():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG_FILE}.")
    return configuration.load(run / CONFIG_FILE)


def flatten(nested: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{path}.{key}" if path else key
        flat |= flatten(value, name) if isinstance(value, dict) else {name: value}
    return flat

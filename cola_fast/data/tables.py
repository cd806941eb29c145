"""Rows from files, folders and the hub, as columns of Python values.

A JSON file is read by `json_file`: each cell is what its line says, whatever other lines say. The others are read by
`datasets`, which gives a column one type, and every struct in it the keys of all rows.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import UserError, listed, near, reason, shown, told
from . import json_file

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Table:
    source: str
    names: list[str]  # of all columns
    rows: Any  # a datasets.Dataset; or, of a JSON file, each row's cells of the columns that may be used
    roles: Mapping[str, str] = field(default_factory=dict)  # role (see `shapes`) -> the column that plays it

    @property
    def as_written(self) -> bool:
        """Whether a struct has the keys that its own row wrote, and no others."""
        return isinstance(self.rows, list)

    def column(self, name: str) -> list[Any]:
        """The cells of a column, or of the one that plays a role."""
        name = self.roles.get(name, name)
        if name not in self.names:
            hint = near(name, self.names)
            raise UserError(f"{self.source} has no column {shown(name)} (it has {listed(self.names)}).{hint}")
        if self.as_written:
            return [row.get(name) for row in self.rows]
        try:
            return list(self.rows[name])
        except UnicodeDecodeError as error:
            raise UserError(f"{self.source} is not UTF-8 text ({error}): convert it.") from None
        except Exception as error:  # a date in the year 10000, an image that is none: decoding raises what it likes
            raise UserError(f"{self.source}: the column {name} cannot be read: {reason(error)}.") from None

    def class_names(self, name: str) -> list[str] | None:
        """Of a hub ClassLabel, where 0 may be "negative"."""
        return None if self.as_written else getattr(self.rows.features.get(name), "names", None)

    def wrong_cell(self, number: int, column: str, cell: Any, wanted: str) -> UserError:
        given = "empty" if cell is None else f"{shown(cell)} ({type(cell).__name__})"
        guessed = isinstance(cell, date) and Path(self.source).is_dir()
        hint = " If it is text in a JSON file of that folder, give the file itself." if guessed else ""
        column = self.roles.get(column, column)
        return UserError(f"Row {number} of {self.source}: {column} is {given}, but must be {wanted}.{hint}")


def read_table(source: str, split: str, config: DataConfig, used: Collection[str]) -> Table:
    """used: the columns that may be asked for, also capitalised."""
    path = Path(source)
    builder = BUILDERS.get(path.suffix.lower())
    if builder and not os.path.isfile(source):
        raise UserError(f"There is no file {source}: check the path (relative paths start from {Path.cwd()}).")
    if os.path.isfile(source) and builder is None:
        raise UserError(f"{source} is a {path.suffix or 'nameless'} file, but data is read from {', '.join(BUILDERS)}.")
    # a path-like name is a mistyped path: say so at once, not after half a minute of asking the hub
    if builder is None and not os.path.isdir(source) and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"{source} is neither a file or folder here nor the name of a hub data set (owner/name).")
    below = (Path(folder) / name for folder, _, names in os.walk(source) for name in names)
    for file in [path] if builder else below:
        if BUILDERS.get(file.suffix.lower()) == "json" and os.path.isfile(file):
            with told(f"{file} cannot be read"):
                why = json_file.refusal(file)
            if why:
                raise UserError(f"{file} cannot be read as {file.suffix[1:]}: {why}.")
    if builder == "json":
        with told(f"{path} cannot be read as {path.suffix[1:]}"):
            rows, names = json_file.read(path, used, config.limit)
        table = Table(source, names, rows)
    else:
        data = _load_file(path, builder) if builder else _load_hub(source, split, config)
        if config.limit is not None:
            data = data.select(range(min(config.limit, len(data))))
        table = Table(source, list(data.column_names), data)
    if not table.names or len(table.rows) == 0:
        raise UserError(f"{source} holds no rows: an empty data set cannot be used.")
    return table


def _load_file(path: Path, builder: str) -> Any:
    import datasets

    # its cache knows a file by its name and time, which a file unpacked or copied over another may share
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"by-content-{_sha256(path)[:16]}"
    try:
        options = _as_text(path) if builder == "csv" else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header")  # pandas drops cells
            return datasets.load_dataset(
                builder, data_files=glob.escape(str(path)), split="train", cache_dir=str(cache), **options
            )
    except Exception as error:  # pyarrow, pandas and datasets each raise their own kinds for a malformed file
        if path.stat().st_size == 0 or "corresponds to no data" in str(error):
            raise UserError(f"{path} holds no rows: an empty data set cannot be used.") from None
        why = reason(error.__cause__ or error)
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {why}.") from None


def _as_text(path: Path) -> dict[str, Any]:
    """Options by which every cell of a CSV file is a string, in the column it stands in. pandas would read NA, null and
    None as missing, 007 as 7, 42 as 42.0 where another row is empty, and where rows have a cell more than the header
    names, shift the names by one."""
    import datasets
    import pandas

    names = pandas.read_csv(path, nrows=0).columns
    text = datasets.Features({name: datasets.Value("string") for name in names})
    return {"keep_default_na": False, "index_col": False, "features": text}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(partial(file.read, 1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _load_hub(source: str, split: str, config: DataConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, config.hub_config, split=split)
    except OSError as error:  # unreachable, offline or not found
        raise UserError(
            f"{source} is not a {', '.join(BUILDERS)} file here, and the hub, which is unreachable or has no such data "
            f"set, does not give it: {reason(error)}."
        ) from None
    except Exception as error:  # an unknown split or configuration, a loading script, a malformed file
        raise UserError(
            f"The data set {source} (configuration {config.hub_config or 'default'}, split {split}) cannot be read: "
            f"{reason(error)}."
        ) from None

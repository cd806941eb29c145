"""Rows from files, folders and the hub, as columns of Python values.

A JSON file is read by `json_file`: each cell is what its line says, whatever other lines say. Text files are read by
`files`, which also finds and unpacks them. The others are read by `datasets`, which gives a column one type, and every
struct in it the keys of all rows.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ..config import DataConfig
from ..errors import UserError, listed, near, reason, shown, told
from . import files, json_file
from .files import Source


@dataclass(frozen=True)
class Table:
    source: Source
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
        guessed = isinstance(cell, date) and Path(str(self.source)).is_dir()
        hint = " If it is text in a JSON file of that folder, give the file itself." if guessed else ""
        column = self.roles.get(column, column)
        return UserError(f"{self.source.row(number)}: {column} is {given}, but must be {wanted}.{hint}")


def named(given: str | Sequence[str]) -> str:
    """A source, or several, as a sentence names it."""
    return given if isinstance(given, str) else listed(given)


def read_table(given: str | Sequence[str], split: str, config: DataConfig, used: Collection[str]) -> Table:
    """All rows of a source or of several. used: the columns that may be asked for, also capitalised."""
    parts: list[Table] = []
    left = config.limit
    for source in (given,) if isinstance(given, str) else given:
        for file in files.expand(source, split):
            if left != 0:
                parts.append(_read(file, split, replace(config, limit=left), used))
                left = None if left is None else left - len(parts[-1].rows)
    table = parts[0] if len(parts) == 1 else _joined(named(given), parts)
    if not table.names or len(table.rows) == 0:
        raise UserError(f"{table.source} holds no rows: an empty data set cannot be used.")
    return table


def _joined(name: str, parts: list[Table]) -> Table:
    """Tables of the same kind, one after the other. Cells of csv files are text, and go with those of JSON."""
    source = Source(name, tuple((str(part.source), len(part.rows)) for part in parts))
    if not any(part.as_written for part in parts):
        import datasets

        with told(f"The files of {name} do not have the same columns"):
            for part in parts[1:]:
                if part.rows.features != parts[0].rows.features:
                    raise UserError(
                        f"{part.source} has the columns {listed(part.names)}, but {parts[0].source} "
                        f"{listed(parts[0].names)}, or of other types: give files that are alike."
                    )
            rows = datasets.concatenate_datasets([part.rows for part in parts])
        return Table(source, parts[0].names, rows)
    names = dict.fromkeys(name for part in parts for name in part.names)
    return Table(source, list(names), [row for part in parts for row in _as_written(part)])


def _as_written(table: Table) -> list[dict[str, Any]]:
    if table.as_written:
        rows: list[dict[str, Any]] = table.rows
        return rows
    if files.kind(str(table.source)) != "csv":
        raise UserError(
            f"{table.source} cannot be joined with JSON or text files, in which cells have no types: give files of one "
            "kind."
        )
    return list(table.rows)


def _read(source: str, split: str, config: DataConfig, used: Collection[str]) -> Table:
    path = Path(source)
    builder = files.kind(path)
    if builder and not os.path.isfile(source) and not os.path.isdir(source):
        raise UserError(f"There is no file {source}: check the path (relative paths start from {Path.cwd()}).")
    if os.path.isfile(source) and builder is None:
        raise UserError(
            f"{source} is a {path.suffix or 'nameless'} file, but data is read from {', '.join(files.BUILDERS)}, also "
            f"packed ({', '.join(files.PACKED)})."
        )
    # a path-like name is a mistyped path: say so at once, not after half a minute of asking the hub
    if builder is None and not os.path.isdir(source) and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"{source} is neither a file or folder here nor the name of a hub data set (owner/name).")
    if builder in ("json", "text") and os.path.isfile(source):
        with files.unpacked(path) as file:
            rows, names = _rows_of(file, builder, config, used)
        return Table(Source(source), names, rows)
    for folder, _, inner in os.walk(source):
        for name in inner:
            if files.kind(name) == "json" and Path(name).suffix.lower() in files.AS_EVER:
                _refuse_unreadable(Path(folder, name))
    if os.path.isfile(source) and builder:
        files.require_unpacker(path)
        data = _load_file(path, builder)
    else:
        data = _load_saved(source, split) if files.saved_to_disk(source) else _load_hub(source, split, config)
    if config.limit is not None:
        data = data.select(range(min(config.limit, len(data))))
    return Table(Source(source), list(data.column_names), data)


def _rows_of(
    path: Path, builder: str, config: DataConfig, used: Collection[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a JSON or text file, and its columns."""
    with told(f"{path} cannot be read as {path.suffix[1:]}"):
        if builder == "text":
            return list(files.texts(path, config.text_unit)[: config.limit]), ["text"]
        _refuse_unreadable(path)
        return json_file.read(path, used, config.limit)


def _refuse_unreadable(path: Path) -> None:
    with told(f"{path} cannot be read"):
        why = json_file.refusal(path)
    if why:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {why}.")


def _load_saved(folder: str, split: str) -> Any:
    import datasets

    with told(f"{folder} cannot be read as a data set that was saved by save_to_disk"):
        data = datasets.load_from_disk(folder)
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise UserError(f"{folder} has no split {split} (it has {listed(data)}): set data.train_split or its like.")
    return data[split]


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
        raise UserError(f"{path} cannot be read as {files.suffix(path)[1:]}: {why}.") from None


def _as_text(path: Path) -> dict[str, Any]:
    """Options by which every cell of a CSV file is a string, in the column it stands in. pandas would read NA, null and
    None as missing, 007 as 7, 42 as 42.0 where another row is empty, and where rows have a cell more than the header
    names, shift the names by one."""
    import datasets
    import pandas

    options: dict[str, Any] = _tabs(path) if files.suffix(path) == ".tsv" else {}
    names = pandas.read_csv(path, nrows=0, **options).columns
    text = datasets.Features({name: datasets.Value("string") for name in names})
    return {"keep_default_na": False, "index_col": False, "features": text, **options}


def _tabs(path: Path) -> dict[str, Any]:
    """Where a quote opens in one line and closes in another, though each line has all cells, it is a character."""
    with files.unpacked(path) as file, file.open("rb") as lines:
        first = next(lines, b"").count(b"\t")
        odd = False
        for line in lines:
            odd = odd or line.count(b'"') % 2 == 1
            if line.strip() and line.count(b"\t") != first:
                return {"sep": "\t"}
    return {"sep": "\t", "quoting": csv.QUOTE_NONE} if odd else {"sep": "\t"}


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
            f"{source} is not a {', '.join(files.BUILDERS)} file here, and the hub, which is unreachable or has no "
            f"such data set, does not give it: {reason(error)}."
        ) from None
    except Exception as error:  # an unknown split or configuration, a loading script, a malformed file
        raise UserError(
            f"The data set {source} (configuration {config.hub_config or 'default'}, split {split}) cannot be read: "
            f"{reason(error)}."
        ) from None

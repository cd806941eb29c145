"""From files to token sequences.

`load_data` reads rows (with `datasets`), turns each into pieces of text that either carry loss or do not, tokenises the
pieces, and fits them into `max_length` (see `encode`). Four kinds of rows: plain text; prompt + completion; chat
messages; classification by verbalisers, where the words that stand for a label compete for the place after the prompt.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import string
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import json_file
from .chat import message_rows, without_none
from .config import DataConfig
from .encode import Encoder, Example, Row
from .errors import UserError, listed, near, reason, shown, told

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Data:
    kind: str  # text, completion, messages or classification
    train: list[Example]
    eval: list[Example]
    test: list[Example]  # the test set, or eval where there is none
    max_length: int  # no example is longer (data.max_length, capped by the model's context)
    labels: tuple[str, ...] = ()  # classification: the labels, in the order of Example.candidates
    vocabulary: int = 0  # tokens that the tokenizer has, up to its largest
    notes: list[str] = field(default_factory=list)  # what was read, cut and dropped; meant to be printed


def load_data(config: DataConfig, tokenizer: Any, *, context: int, seed: int) -> Data:
    """Read, tokenise and split everything `config` names.

    context: the longest sequence the model takes, in tokens. seed: chooses the held-out rows; the choice depends on the
    rows' content, not on their order, and equal rows stay on one side. Raises UserError for every kind of bad input.
    """
    notes = []
    max_length = min(config.max_length, context)
    if max_length < config.max_length:
        notes.append(f"max_length is {context}, the model's context, instead of {config.max_length}.")
    tables = {"train": _read(config.train, config.train_split, config)}
    if config.eval is not None:
        tables["eval"] = _read(config.eval, config.eval_split, config)
    if config.test is not None:
        tables["test"] = _read(config.test, config.test_split, config)
    kind = _kind(config, tables["train"])
    rows = {name: _ROWS[kind](table, config, tokenizer) for name, table in tables.items()}
    if config.eval is None and config.eval_share > 0:
        rows["train"], rows["eval"] = _hold_out(rows["train"], config.eval_share, seed)
        notes.append(
            f"eval: {len(rows['eval'])} rows held out of {config.train}"
            + ("." if rows["eval"] else ": too few different rows, so there is no evaluation set.")
        )
    sets: dict[str, list[Example]] = {}
    for name, part in rows.items():
        source = tables[name if name in tables else "train"].source
        sets[name], note = Encoder(kind, tokenizer, config.too_long, max_length, source)(part)
        if part:
            notes.append(f"{name}: {note}")
        if not sets[name] and name in tables:
            raise UserError(f"None of the {len(part)} rows of {source} leaves a token to learn from ({note}).")
    held = sets.get("eval", [])
    labels = tuple(config.verbalisers or ()) if kind == "classification" else ()
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1)
    return Data(kind, sets["train"], held, sets.get("test", held), max_length, labels, vocabulary, notes)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    source: str
    data: Any  # datasets.Dataset

    def column(self, name: str) -> list[Any]:
        if name not in self.data.column_names:
            has = listed(self.data.column_names)
            hint = near(name, self.data.column_names)
            raise UserError(f"{self.source} has no column {shown(name)} (it has {has}).{hint}")
        try:
            return list(self.data[name])
        except UnicodeDecodeError as error:
            raise UserError(f"{self.source} is not UTF-8 text ({error}): convert it.") from None
        except Exception as error:  # a date in the year 10000, an image that is none: decoding raises what it likes
            raise UserError(f"{self.source}: the column {name} cannot be read: {reason(error)}.") from None


def _read(source: str, split: str, config: DataConfig) -> _Table:
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
    data = _load_file(path, builder) if builder else _load_hub(source, split, config)
    if len(data) == 0:
        raise UserError(f"{source} holds no rows: an empty data set cannot be used.")
    if config.limit is not None:
        data = data.select(range(min(config.limit, len(data))))
    return _Table(source, data)


def _load_file(path: Path, builder: str) -> Any:
    import datasets

    # its cache knows a file by its name and time, which a file unpacked or copied over another may share
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"by-content-{_sha256(path)[:16]}"
    try:
        options = _as_written(path) if builder == "csv" else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header")  # pandas drops cells
            return datasets.load_dataset(
                builder, data_files=glob.escape(str(path)), split="train", cache_dir=str(cache), **options
            )
    except Exception as error:  # pyarrow, pandas and datasets each raise their own kinds for a malformed file
        if path.stat().st_size == 0 or "corresponds to no data" in str(error):
            raise UserError(f"{path} holds no rows: an empty data set cannot be used.") from None
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {_why_unreadable(path, error)}.") from None


def _as_written(path: Path) -> dict[str, Any]:
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


def _why_unreadable(path: Path, error: BaseException) -> str:
    """datasets names neither the file nor the line, so JSON is read again to find it."""
    try:
        if path.suffix.lower() == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        json.loads(line) if line.strip() else {}
                    except json.JSONDecodeError as wrong:
                        return f"line {number}: {wrong.msg}"
        elif path.suffix.lower() == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:  # not JSON, not UTF-8, a number of 5,000 digits
        return reason(wrong)
    return reason(error.__cause__ or error)


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


# --- from columns to pieces of text -----------------------------------------------------------------------------------


def _kind(config: DataConfig, table: _Table) -> str:
    if config.format != "auto":
        return config.format
    names = set(table.data.column_names)
    if config.verbalisers:
        return "classification"
    for kind, needs in (("messages", {"messages"}), ("completion", {"prompt", "completion"}), ("text", {"text"})):
        if needs <= names:
            return kind
    raise UserError(
        f"{table.source} has the columns {listed(sorted(names))}, but needs text, or prompt and completion, or "
        "messages; for classification give data.template, data.label_column and data.verbalisers."
    )


def _texts(table: _Table, column: str) -> list[str]:
    cells = table.column(column)
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, str):
            raise _wrong_cell(table, number, column, cell, "text")
    return cells


def _wrong_cell(table: _Table, number: int, column: str, cell: Any, wanted: str) -> UserError:
    given = "empty" if cell is None else f"{shown(cell)} ({type(cell).__name__})"
    return UserError(f"Row {number} of {table.source}: {column} is {given}, but must be {wanted}.")


def _text_rows(table: _Table, config: DataConfig, tokenizer: Any) -> list[Row]:
    return [Row(number, ((text, True),)) for number, text in enumerate(_texts(table, "text"), 1)]


def _completion_rows(table: _Table, config: DataConfig, tokenizer: Any) -> list[Row]:
    pairs = zip(_texts(table, "prompt"), _texts(table, "completion"), strict=True)
    return [Row(number, ((prompt, False), (rest, True))) for number, (prompt, rest) in enumerate(pairs, 1)]


def _classification_rows(table: _Table, config: DataConfig, tokenizer: Any) -> list[Row]:
    words = config.verbalisers
    if not words or len(words) < 2:
        raise UserError("data.format is classification, but data.verbalisers does not give the words of two labels.")
    try:
        fields = list(string.Formatter().parse(config.template))
    except ValueError as error:
        raise UserError(
            f"data.template {shown(config.template)} is malformed ({error}): write {{{{ for a brace."
        ) from None
    parts = [(literal, name) for literal, name, _, _ in fields]
    if any(form or conversion for _, _, form, conversion in fields):
        raise UserError(
            f"data.template {shown(config.template)} formats a column, but can only name it: write {{name}}."
        )
    has = table.data.column_names
    for unknown in {name for _, name in parts if name is not None} - set(has):
        raise UserError(
            f"data.template names {shown(unknown)}, but {table.source} has {listed(has)}.{near(unknown, has)}"
        )
    cells = {name: table.column(name) for _, name in parts if name is not None}
    if not cells:
        raise UserError(f"data.template {shown(config.template)} names no column: write one in braces, as in {{text}}.")
    names = getattr(
        table.data.features.get(config.label_column), "names", None
    )  # a hub ClassLabel: 0 may be "negative"
    keys = list(words)
    rows = []
    for number, label in enumerate(table.column(config.label_column), 1):
        if not isinstance(label, Hashable):
            raise _wrong_cell(table, number, config.label_column, label, "a label: text, a number or a truth value")
        key = label if label in words else _label_key(label)
        if key not in words and names and isinstance(label, int) and 0 <= label < len(names):
            key = names[label]
        if key not in words:
            raise UserError(
                f"Row {number} of {table.source}: {config.label_column} is {shown(label)}, which is not in "
                f"data.verbalisers ({listed(keys)}): add it there, or correct the row{_quoting(str(label), keys)}."
            )
        prompt = ""
        for literal, name in parts:
            prompt += literal
            if name is not None:
                cell = cells[name][number - 1]
                missing = isinstance(cell, float) and math.isnan(cell)
                if missing or isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
                    raise _wrong_cell(table, number, name, cell, "text or a number")
                prompt += str(cell)
        rows.append(Row(number, ((prompt, False),), tuple(words.values()), keys.index(key)))
    return rows


def _quoting(label: str, keys: list[str]) -> str:
    yes_or_no = label.lower() in ("yes", "no", "on", "off") and not {"true", "false"}.isdisjoint(keys)
    return " (YAML reads yes, no, on and off as truth values: put them in quotes)" if yes_or_no else ""


def _label_key(label: Any) -> str:
    """As config.py reads the keys of data.verbalisers, which YAML may have taken for numbers or truth values."""
    if str(label).lower() in ("true", "false"):
        return str(label).lower()
    try:
        number = float(label)  # of a string, too: a CSV file has nothing else
    except (TypeError, ValueError, OverflowError):
        return str(label)
    return str(int(number)) if number.is_integer() else str(label)


def _message_rows(table: _Table, config: DataConfig, tokenizer: Any) -> list[Row]:
    if not tokenizer.chat_template:
        raise UserError(
            f"{table.source} holds messages, but the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, or write the rows as prompt and completion."
        )
    tools = table.column("tools") if "tools" in table.data.column_names else None
    chats = []
    for number, cell in enumerate(table.column("messages"), 1):
        if not isinstance(cell, list) or not cell or not all(isinstance(message, dict) for message in cell):
            raise _wrong_cell(table, number, "messages", cell, "a list of {role, content}")
        chat = without_none(cell)  # datasets fills the keys that other rows have with None, in arguments of tools too
        for message in chat:
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise _wrong_cell(table, number, "messages", message, "text under role and under content")
        chats.append(chat)
    return message_rows(table.source, chats, tools, tokenizer, enough=config.max_length)


_ROWS = {
    "text": _text_rows,
    "completion": _completion_rows,
    "messages": _message_rows,
    "classification": _classification_rows,
}


def _hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows whose seeded hash is among the lowest `share` of the different hashes, at least one, never all."""
    marks = [_fingerprint(row, seed) for row in rows]
    ranked = sorted(set(marks))
    chosen = set(ranked[: min(max(1, round(len(ranked) * share)), len(ranked) - 1)])
    return (
        [row for row, mark in zip(rows, marks, strict=True) if mark not in chosen],
        [row for row, mark in zip(rows, marks, strict=True) if mark in chosen],
    )


def _fingerprint(row: Row, seed: int) -> bytes:
    content = json.dumps([seed, row.pieces, row.answer, row.marked])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()

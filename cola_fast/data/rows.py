"""From files to token sequences.

`load_data` reads rows (see `tables`), turns each into pieces of text that either carry loss or do not, tokenises the
pieces, and fits them into `max_length` (see `encode`). Four kinds of rows: plain text; prompt + completion; chat
messages (`shapes` tells these three by their columns); classification by verbalisers, where the words that stand for a
label compete for the place after the prompt. For a model with a head that classifies, see `heads`, there are two more:
labelled texts, and labelled words.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..config import DataConfig
from ..errors import UserError, listed, near, shown
from . import messages, shapes
from .chat_template import message_rows, own_names
from .encode import Encoder, Example, Row
from .heads import Head, HeadEncoder
from .tables import Table, named, read_table


@dataclass(frozen=True)
class Data:
    kind: str  # text, completion, messages or classification; labelled or words, for a head
    train: list[Example]
    eval: list[Example]
    test: list[Example]  # the test set, or eval where there is none
    max_length: int  # no example is longer (data.max_length, capped by the model's context)
    labels: tuple[str, ...] = ()  # classification: the labels, in the order of Example.candidates
    vocabulary: int = 0  # tokens that the tokenizer has, up to its largest
    notes: list[str] = field(default_factory=list)  # what was read, cut and dropped; meant to be printed


def load_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    context: int,
    seed: int,
    date: datetime | None = None,
    head: Head | None = None,
) -> Data:
    """Read, tokenise and split everything `config` names.

    context: the longest sequence the model takes, in tokens. seed: chooses the held-out rows; the choice depends on
    what the rows say, neither on their order nor on the tokenizer and its template, and equal rows stay on one side.
    date: what chat templates are told of today, the present one by default. head: what a model with one needs. Raises
    UserError for every kind of bad input.
    """
    date = date or datetime.now()
    notes = []
    max_length = min(config.max_length, context)
    if max_length < config.max_length:
        notes.append(f"max_length is {context}, the model's context, instead of {config.max_length}.")
    kind = head.kind if head else _kind(config)
    used = set(_columns(kind, config)) if kind else shapes.used(config)
    tables = {"train": read_table(config.train, config.train_split, config, used)}
    if config.eval is not None:
        tables["eval"] = read_table(config.eval, config.eval_split, config, used)
    if config.test is not None:
        tables["test"] = read_table(config.test, config.test_split, config, used)
    if config.text_unit != DataConfig.text_unit and not any(table.source.has_text for table in tables.values()):
        raise UserError(
            f"data.text_unit is {config.text_unit}, but {named(config.train)} is no .txt file: leave it out."
        )
    said: list[str] = []
    if not kind:
        tables, kind, said = _recognised(tables, config)
    if kind != "messages" and config.learn != "assistant":
        raise UserError(f"data.learn is {config.learn}, but {named(config.train)} holds no messages: leave it out.")
    rows = {
        name: _OF_HEADS[kind](table, config, head) if head else _ROWS[kind](table, config, tokenizer, date)
        for name, table in tables.items()
    }
    if holds_out(config):
        rows["train"], rows["eval"] = _hold_out(rows["train"], config.eval_share, seed)
        notes.append(
            f"eval: {len(rows['eval'])} rows held out of {named(config.train)}"
            + ("." if rows["eval"] else ": too few different rows, so there is no evaluation set.")
        )
    sets: dict[str, list[Example]] = {}
    for name, part in rows.items():
        source = tables[name if name in tables else "train"].source
        limits = config.too_long, max_length, source
        encoder = HeadEncoder(head, tokenizer, *limits) if head else Encoder(kind, tokenizer, *limits)
        sets[name], note = encoder(part)
        if part:
            notes.append(f"{name}: {note}")
        if not sets[name] and name in tables:
            raise UserError(f"None of the {len(part)} rows of {source} leaves a token to learn from ({note}).")
    for name, table in tables.items():
        using = table.roles.values() if table.roles else _columns(kind, config)
        unused = [column for column in table.names if column not in using]
        notes += [f"{name}: columns that nothing uses: {listed(unused)}"] if unused else []
    notes += said
    held = sets.get("eval", [])
    labels = tuple(config.verbalisers or ()) if kind == "classification" else ()
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1)
    return Data(kind, sets["train"], held, sets.get("test", held), max_length, labels, vocabulary, notes)


# --- from columns to pieces of text -----------------------------------------------------------------------------------


def _kind(config: DataConfig) -> str:
    """Of rows, as far as the configuration says it; "" where the columns do."""
    if config.response is not None:
        return "completion"
    if config.format == "classification" or (config.format == "auto" and config.verbalisers):
        return "classification"
    return ""


def _recognised(tables: dict[str, Table], config: DataConfig) -> tuple[dict[str, Table], str, list[str]]:
    """The tables with their roles, the kind of their rows, and notes."""
    found = {name: shapes.recognise(table, config) for name, table in tables.items()}
    kind = found["train"][1]
    for table, other, _ in found.values():
        if other != kind:
            raise UserError(
                f"{named(config.train)} holds {kind} rows, but {table.source} {other} rows: give both alike."
            )
    notes = [f"{name}: {note}" for name, (_, _, note) in found.items() if note]
    return {name: table for name, (table, _, _) in found.items()}, kind, notes


def _columns(kind: str, config: DataConfig) -> tuple[str, ...]:
    """What rows are made of whose columns the configuration names."""
    if kind == "words":
        return config.words_column, config.label_column
    fields = _template("template", config.template)
    fields += _template("response", config.response or "")
    first = () if kind == "completion" else (config.label_column,)
    return (*first, *(name for _, name in fields if name is not None))


def _texts(table: Table, column: str, *, empty: bool = False) -> list[str]:
    """empty: what is absent is an empty text."""
    cells = ["" if empty and cell is None else cell for cell in table.column(column)]
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, str):
            raise table.wrong_cell(number, column, cell, "text")
    return cells


def _text_rows(table: Table, config: DataConfig, tokenizer: Any, date: datetime) -> list[Row]:
    return [Row(number, ((text, True),)) for number, text in enumerate(_texts(table, "text"), 1)]


def _completion_rows(table: Table, config: DataConfig, tokenizer: Any, date: datetime) -> list[Row]:
    if config.response is not None:
        return _templated_rows(table, config)
    if "instruction" in table.roles:
        return _alpaca_rows(table)
    pairs = zip(_texts(table, "prompt"), _texts(table, "completion"), strict=True)
    return [Row(number, ((prompt, False), (rest, True))) for number, (prompt, rest) in enumerate(pairs, 1)]


def _templated_rows(table: Table, config: DataConfig) -> list[Row]:
    """By data.template and data.response; what is held out depends on the cells, not on the words around them."""
    pairs = zip(_prompts(table, config), _filled(table, "response", config.response or ""), strict=True)
    cells = zip(*map(table.column, dict.fromkeys(_columns("completion", config))), strict=True)
    return [
        Row(number, ((prompt, False), (answer, True)), read=list(read))
        for number, ((prompt, answer), read) in enumerate(zip(pairs, cells, strict=True), 1)
    ]


def _alpaca_rows(table: Table) -> list[Row]:
    instructions, answers = _texts(table, "instruction"), _texts(table, "completion")
    inputs = _texts(table, "input", empty=True) if "input" in table.roles else [""] * len(answers)
    return [
        Row(number, ((shapes.alpaca_prompt(*cells[:2]), False), (cells[2], True)), read=cells)
        for number, cells in enumerate(zip(instructions, inputs, answers, strict=True), 1)
    ]


def _classification_rows(table: Table, config: DataConfig, tokenizer: Any, date: datetime) -> list[Row]:
    words = config.verbalisers
    if not words or len(words) < 2:
        raise UserError("data.format is classification, but data.verbalisers does not give the words of two labels.")
    prompts, names = _prompts(table, config), table.class_names(config.label_column)
    keys = list(words)
    rows = []
    for number, label in enumerate(table.column(config.label_column), 1):
        if not isinstance(label, Hashable):
            raise table.wrong_cell(number, config.label_column, label, "a label: text, a number or a truth value")
        key = label if label in words else _label_key(label)
        if key not in words and names and isinstance(label, int) and 0 <= label < len(names):
            key = names[label]
        if key not in words:
            raise UserError(
                f"{table.source.row(number)}: {config.label_column} is {shown(label)}, which is not in "
                f"data.verbalisers ({listed(keys)}): add it there, or correct the row{_quoting(str(label), keys)}."
            )
        rows.append(Row(number, ((prompts[number - 1], False),), tuple(words.values()), keys.index(key)))
    return rows


def _prompts(table: Table, config: DataConfig) -> list[str]:
    return _filled(table, "template", config.template)


def _filled(table: Table, key: str, template: str) -> list[str]:
    """The template that stands under that key, with the cells of every row."""
    parts = _template(key, template)
    has = table.names
    for unknown in {name for _, name in parts if name is not None} - set(has):
        raise UserError(f"data.{key} names {shown(unknown)}, but {table.source} has {listed(has)}.{near(unknown, has)}")
    cells = {name: table.column(name) for _, name in parts if name is not None}
    if not cells:
        raise UserError(f"data.{key} {shown(template)} names no column: write one in braces, as in {{text}}.")
    prompts = []
    for number in range(1, len(table.rows) + 1):
        prompt = ""
        for literal, name in parts:
            prompt += literal
            if name is not None:
                cell = cells[name][number - 1]
                endless = isinstance(cell, float) and not math.isfinite(cell)  # of a table, NaN: missing
                if endless or isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
                    raise table.wrong_cell(number, name, cell, "text or a number")
                prompt += str(cell)
        prompts.append(prompt)
    return prompts


def _labelled_rows(table: Table, config: DataConfig, head: Head) -> list[Row]:
    """For a head that classifies sequences: the template's text, and its class."""
    texts, names = _prompts(table, config), table.class_names(config.label_column)
    labels = table.column(config.label_column)
    return [
        Row(number, ((text, True),), classes=(_class_of(table, config, head, number, label, names),))
        for number, (text, label) in enumerate(zip(texts, labels, strict=True), 1)
    ]


def _word_rows(table: Table, config: DataConfig, head: Head) -> list[Row]:
    """For a head that classifies tokens: words, and a class for each."""
    rows, names = [], table.class_names(config.label_column)
    pairs = zip(table.column(config.words_column), table.column(config.label_column), strict=True)
    for number, (words, labels) in enumerate(pairs, 1):
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise table.wrong_cell(number, config.words_column, words, "a list of words")
        if not isinstance(labels, list) or len(labels) != len(words):
            raise table.wrong_cell(number, config.label_column, labels, f"a list of {len(words)} labels, one a word")
        classes = tuple(_class_of(table, config, head, number, label, names) for label in labels)
        rows.append(Row(number, tuple((word, True) for word in words), classes=classes))
    return rows


def _class_of(table: Table, config: DataConfig, head: Head, number: int, label: Any, names: list[str] | None) -> int:
    if not isinstance(label, str | int | float):
        raise table.wrong_cell(number, config.label_column, label, "a label: text or a number")
    keys = [_label_key(known) for known in head.labels]
    key = _label_key(label)
    if key not in keys and names and isinstance(label, int) and 0 <= label < len(names):
        key = _label_key(names[label])
    if key not in keys:
        raise UserError(
            f"{table.source.row(number)}: {config.label_column} is {shown(label)}, which is not in model.labels "
            f"({listed(keys)}): add it there, or correct the row."
        )
    return keys.index(key)


def _template(key: str, template: str) -> list[tuple[str, str | None]]:
    """Text, and the column whose cell follows it."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.{key} {shown(template)} is malformed ({error}): write {{{{ for a brace.") from None
    if any(form or conversion for _, _, form, conversion in fields):
        raise UserError(f"data.{key} {shown(template)} formats a column, but can only name it: write {{name}}.")
    return [(literal, name) for literal, name, _, _ in fields]


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
    exact = abs(number) < 2**53  # beyond it, several whole numbers are one float
    return str(int(number)) if exact and number.is_integer() else str(label)


def _message_rows(table: Table, config: DataConfig, tokenizer: Any, date: datetime) -> list[Row]:
    if not tokenizer.chat_template:
        raise UserError(
            f"{table.source} holds messages, but the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, or write the rows as prompt and completion."
        )
    chats = messages.read_chats(table, own_names(tokenizer))
    return message_rows(table.source, chats, tokenizer, enough=config.max_length, date=date, learn=config.learn)


_ROWS = {
    "text": _text_rows,
    "completion": _completion_rows,
    "messages": _message_rows,
    "classification": _classification_rows,
}
_OF_HEADS = {"labelled": _labelled_rows, "words": _word_rows}


def holds_out(config: DataConfig) -> bool:
    """Whether rows of the training file are held out."""
    return config.eval is None and config.eval_share > 0


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
    said = row.pieces if row.read is None else row.read
    content = json.dumps([seed, said, row.answer, row.classes or None], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()

"""The shapes in which people keep their data, told by the names of the columns.

A shape says which column plays which role: `text`; `prompt` and `completion`; `messages`. A name may be capitalised
(Prompt), and `data.columns` names any column for a role. Where several shapes fit, the first of `SHAPES` is taken, and
the note names the others. What could only be trained on wrongly is refused: pairs of answers of which one is the worse,
texts with a label that nothing would learn, questions whose context would be left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import DataConfig
from ..errors import UserError, listed, near, shown
from .tables import Table

_BESIDE = ("tools", "chat_template_kwargs")  # a conversation


@dataclass(frozen=True)
class Shape:
    name: str
    kind: str  # text, completion or messages
    roles: Mapping[str, str]  # role -> the column that plays it
    may: tuple[str, ...] = ()  # columns that may be there, too; each is its own role
    lists: bool = False  # prompts are lists of messages

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.roles.values())

    def __str__(self) -> str:
        names = " and ".join(self.columns)
        return names if self.name == names else f"{self.name} ({names})"


def _pair(prompt: str, completion: str) -> Shape:
    return Shape(f"{prompt} and {completion}", "completion", {"prompt": prompt, "completion": completion})


PLAIN = (
    Shape("messages", "messages", {"messages": "messages"}, _BESIDE),
    Shape("TRL's conversations", "messages", {"prompt": "prompt", "completion": "completion"}, _BESIDE, lists=True),
    _pair("prompt", "completion"),
    Shape("text", "text", {"text": "text"}),
)
SHAPES = (
    *PLAIN,
    Shape("ShareGPT", "messages", {"messages": "conversations"}, ("system", *_BESIDE)),
    Shape("ShareGPT", "messages", {"messages": "conversation"}, ("system", *_BESIDE)),
    Shape("Alpaca", "completion", {"instruction": "instruction", "completion": "output"}, ("input",)),
    Shape("Alpaca", "completion", {"instruction": "instruction", "input": "input", "completion": "response"}),
    _pair("prompt", "response"),
    _pair("question", "answer"),
    _pair("instruction", "response"),
    _pair("input", "output"),
    Shape("content", "text", {"text": "content"}),
)
NAMES = tuple(dict.fromkeys(name for shape in SHAPES for name in (*shape.columns, *shape.may)))


def used(config: DataConfig) -> set[str]:
    """The columns that a shape may ask for."""
    return {*NAMES, *(config.columns or {}).values(), "label"}


def recognise(table: Table, config: DataConfig) -> tuple[Table, str, str | None]:
    """The table with its roles, its kind, and the note that says what it was read as, if that is not plain."""
    columns = _columns(table, config)
    fits = [shape for shape in SHAPES if _fits(shape, table, config, columns)]
    if config.format == "auto" and not config.columns:
        _refuse(table, config, columns, fits[0] if fits else None)
    if not fits:
        if config.format == "auto":
            raise _unknown(table)
        fits = [shape for shape in PLAIN if shape.kind == config.format and not shape.lists]
    shape = fits[0]
    roles = {role: columns.get(name, name) for role, name in shape.roles.items()}
    roles |= {name: columns[name] for name in shape.may if name in columns}
    table = replace(table, roles=roles)
    return table, shape.kind, _note(shape, table, fits[1:])


def _columns(table: Table, config: DataConfig) -> dict[str, str]:
    """Known name -> the column that has it: as data.columns says, as it is written, or capitalised."""
    chosen = config.columns or {}
    for name, column in chosen.items():
        if name not in NAMES:
            raise UserError(f"data.columns has the key {name}, but it maps {listed(NAMES, 20)}.{near(name, NAMES)}")
        if column not in table.names:
            raise UserError(
                f"data.columns maps {name} to {shown(column)}, but {table.source} has {listed(table.names)}."
                f"{near(column, table.names)}"
            )
    by_lower = {column.lower(): column for column in reversed(table.names)}
    found = {name: name if name in table.names else by_lower.get(name, "") for name in NAMES}
    return {name: column for name, column in {**found, **chosen}.items() if column}


def _fits(shape: Shape, table: Table, config: DataConfig, columns: Mapping[str, str]) -> bool:
    known = {*shape.columns, *shape.may}
    by_role = {role: columns.get(name) for role, name in shape.roles.items()}
    if config.format not in ("auto", shape.kind) or not known.issuperset(config.columns or ()):
        return False
    if not all(by_role.values()):
        return False
    prompt = by_role.get("prompt")
    return prompt is None or shape.lists == isinstance(_first(table, prompt), list)


def _first(table: Table, column: str) -> object:
    return next((cell for cell in table.column(column) if cell is not None), None)


def _note(shape: Shape, table: Table, others: list[Shape]) -> str | None:
    roles = table.roles
    known = {*shape.columns, *shape.may}
    also = dict.fromkeys(str(other) for other in others if not known.issuperset(other.columns))
    more = f"; its columns also fit {listed(also)}: data.columns chooses" if also else ""
    if shape in PLAIN and not shape.lists and not more and all(role == column for role, column in roles.items()):
        return None
    if shape not in PLAIN and set(roles) == {"prompt", "completion"}:
        prompt, answer = (str(_first(table, role)) for role in roles)
        if prompt == prompt.rstrip() and answer == answer.lstrip():
            more += f"; {roles['completion']} follows directly: data.template and data.response write what is between"
    return f"read as {shape.name} ({', '.join(roles.values())}){more}"


# --- what is refused --------------------------------------------------------------------------------------------------


def _refuse(table: Table, config: DataConfig, columns: Mapping[str, str], shape: Shape | None) -> None:
    names = {name.lower(): name for name in table.names}
    if {"chosen", "rejected"} <= set(names):
        raise UserError(
            f"{table.source} holds preferences (chosen and rejected answers), which are not for this training: give "
            "them to TRL's DPOTrainer with cola_fast.ChainCallback, or name a column to learn in data.columns."
        )
    if shape is None:
        return
    label = names.get(config.label_column.lower())
    if shape.kind == "text" and label:
        raise UserError(
            f"{table.source} has {columns[shape.columns[0]]} and {label}, and the label would not be learned: to "
            "classify, set data.verbalisers or model.task; to learn the text alone, set data.format to text."
        )
    if "completion" in shape.roles and "label" in names and _rates(_first(table, names["label"])):
        raise UserError(
            f"{table.source} says by label which completions are good, and the bad ones would be learned, too: give it "
            "to TRL's KTOTrainer with cola_fast.ChainCallback, or set data.format to "
            f"{shape.kind} to learn them all."
        )
    if shape.kind == "completion" and shape not in PLAIN and "context" in names:
        prompt, answer = columns[shape.columns[0]], columns[shape.columns[-1]]
        raise UserError(
            f"{table.source} has {names['context']} beside {shape.name}, which would be left out: set data.template to "
            f'"{{{names["context"]}}} {{{prompt}}}" and data.response to "{{{answer}}}", or data.format to completion '
            "to leave it out."
        )


def _rates(label: object) -> bool:
    return isinstance(label, bool) or str(label).lower() in ("true", "false")


def _unknown(table: Table) -> UserError:
    names = sorted(table.names)
    others = listed(dict.fromkeys(str(shape) for shape in SHAPES if shape not in PLAIN), 20)
    return UserError(
        f"{table.source} has the columns {listed(names)}, but needs text, or prompt and completion, or messages, or "
        f"{others}.{_nearest(names[:200])} For classification give data.template, data.label_column and "
        "data.verbalisers."
    )


def _nearest(names: list[str]) -> str:
    """The shape with the names most like these, and the key that maps it."""
    likeness = {
        (name, column): difflib.SequenceMatcher(None, name, column.lower()[:100]).ratio()
        for name in NAMES
        for column in names
    }

    def like(shape: Shape) -> float:
        return sum(max(likeness[name, column] for column in names) for name in shape.columns) / len(shape.columns)

    shape = max((shape for shape in SHAPES if len(shape.columns) <= len(names)), key=like)
    if like(shape) < 0.5:
        return " data.columns maps yours: {prompt: X, completion: Y}."
    chosen: dict[str, str] = {}
    for (name, column), _ in sorted(likeness.items(), key=lambda item: -item[1]):
        if name in shape.columns and name not in chosen and column not in chosen.values():
            chosen[name] = column
    pairs = ", ".join(f"{name}: {chosen[name]}" for name in shape.columns)
    return f" The nearest is {shape}: data.columns={{{pairs}}} reads it so."


# --- Alpaca -----------------------------------------------------------------------------------------------------------

_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def alpaca_prompt(instruction: str, given: str | None) -> str:
    """As the authors of Alpaca wrote it (github.com/tatsu-lab/stanford_alpaca): with an input, and without."""
    template = _WITH_INPUT if given else _ALONE
    return template.format(instruction=instruction, input=given)

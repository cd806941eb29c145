"""What a row of chat messages says: who says what, what the template gets beside it, and which turns are to be learned.

Formats of OpenAI, TRL, Axolotl and ms-swift are followed as far as they say the same thing: text, tool calls, tools,
variables of the template, and turns of the assistant that carry no loss. An instruction that is not followed is
refused; other keys are the template's.

**Null.** A key of a message that is null is as good as absent. Further down, in the arguments of a tool call or in the
description of a tool, a null that the row wrote stays. `datasets` gives every struct the keys of all rows, and null
where a row has none: those are taken away, and with them the nulls of the row's own, which cannot be told from them.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from ..errors import reason
from .sharegpt import as_message
from .tables import Table

TURNS = ("messages", "prompt", "completion")  # roles of columns that hold turns
LEARN = ("weight", "train", "training", "train_on_turn", "loss")  # of a message: 0 and false leave it out of the loss
REFUSED = (
    "train_detail", "training_detail", "train_on_input", "train_on_inputs", "train_on_eos", "loss_scale", "loss_weight",
    "loss_mask", "mask", "masked", "ignore",
)  # fmt: skip
TEXT = 'text under role and under content (or parts {"type": "text", "text": ...} of it)'


@dataclass(frozen=True)
class Chat:
    messages: list[dict[str, Any]]  # role and content, and what else the template may look at
    silent: frozenset[int]  # the assistant's messages that carry no loss
    keys: dict[str, Any]  # what the template gets beside them
    prompt: int = 0  # messages of a prompt that is apart; the assistant's among them carry no loss by default


class _Unfit(Exception):
    """A column, its value, and what it must be."""


def read_chats(table: Table, reserved: Set[str]) -> list[Chat]:
    """reserved: names that chat_template_kwargs cannot have."""
    columns = {name: table.column(name) for name in table.roles}
    chats = []
    for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
        row = dict(zip(columns, cells, strict=True))
        try:
            messages, silent, prompt = _conversation(row, table.as_written)
            keys = _described(row, "chat_template_kwargs", table.as_written) or {}
            if not isinstance(keys, dict) or not reserved.isdisjoint(keys):
                raise _Unfit("chat_template_kwargs", keys, "an object of variables for the chat template")
            if "tools" in columns:
                keys = {**keys, "tools": _described(row, "tools", table.as_written)}
        except _Unfit as unfit:
            raise table.wrong_cell(number, *unfit.args) from None
        chats.append(Chat(messages, silent, keys, prompt))
    return chats


def _conversation(row: dict[str, Any], as_written: bool) -> tuple[list[dict[str, Any]], frozenset[int], int]:
    """The messages of a row, the places of the assistant's that carry no loss, and how many are of a prompt."""
    prompt = 0
    read = [_read("system", {"role": "system", "content": row["system"]})] if row.get("system") else []
    for column in TURNS:
        if column in row:
            read += [_read(column, turn) for turn in _turns(column, row[column], as_written)]
            prompt = len(read) if column == "prompt" else prompt
    if row.get("system") and [message["role"] for message, _ in read[1:2]] == ["system"]:
        raise _Unfit("system", row["system"], "empty where the conversation has a system message of its own")
    silent = frozenset(place for place, (_, learn) in enumerate(read) if not learn)
    return [message for message, _ in read], silent, prompt


def _turns(column: str, cell: Any, as_written: bool) -> list[dict[str, Any]]:
    """A cell's, as a list or as JSON text of one."""
    try:
        turns = json.loads(cell) if isinstance(cell, str) else cell if as_written else without_none(cell)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _Unfit(column, cell, "a list of {role, content}")
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _read(column: str, turn: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    try:
        return _message(as_message(turn))
    except _Unfit as unfit:
        raise _Unfit(column, *unfit.args[1:]) from None
    except ValueError as error:
        raise _Unfit(column, turn, str(error)) from None


def _message(message: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The message for the template, and False if it is the assistant's but is not to be learned."""
    for key in REFUSED:
        if key in message:
            wanted = (
                f"without {key}, which is not followed: weight 0 leaves a whole turn of the assistant out of the loss"
            )
            raise _Unfit("messages", message, wanted)
    learn = {key: value for key, value in message.items() if key in LEARN}
    message = {key: value for key, value in message.items() if key not in LEARN}
    for key, value in learn.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise _Unfit("messages", learn, f"0 or 1, false or true under {key}")
    if len(set(map(bool, learn.values()))) > 1:
        raise _Unfit("messages", learn, f"the same under {' and '.join(learn)}")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = message["content"] = _joined(message)
    called = role == "assistant" and message.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and called)):
        raise _Unfit("messages", message, TEXT)
    if role != "assistant" and any(learn.values()):
        raise _Unfit("messages", {"role": role, **learn}, "without that: only the assistant's turns are learned")
    return message, role != "assistant" or all(learn.values())


def _joined(message: dict[str, Any]) -> str:
    """The text of a content that is given in parts."""
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    for part in parts:
        if set(part) != {"type", "text"} or part["type"] != "text" or not isinstance(part["text"], str):
            raise _Unfit("messages", message, TEXT)
    return "".join(part["text"] for part in parts)


def _described(row: dict[str, Any], column: str, as_written: bool) -> Any:
    """Tools or variables, as JSON text or as they are."""
    cell = row.get(column)
    if not isinstance(cell, str):
        return cell if as_written else without_none(cell)
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise _Unfit(column, cell, f"JSON that can be read ({reason(error)})") from None


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message, with arguments of its calls that are JSON text of an object as that object."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if isinstance(calls, list) else message


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):  # an object already, or no JSON
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value

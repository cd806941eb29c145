"""Conversations to pieces of text, by the tokenizer's chat template.

A template is a program that came with the model. transformers runs it in a sandbox; here it also gets a limit of time
and memory, and whatever it raises is said with the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .encode import Row
from .errors import UserError, reason
from .watch import Exceeded, watching

LONGEST = 1 << 24  # characters of a rendered conversation


def message_rows(
    source: str, chats: list[list[dict[str, Any]]], tools: list[Any] | None, tokenizer: Any, *, enough: int
) -> list[Row]:
    """chats: per row its messages. tools: per row what it describes. enough: tokens of a row that are looked at."""
    _refuse_powers(tokenizer.chat_template)
    marks = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
    rows = []
    with watching() as watch:
        for number, chat in enumerate(chats, 1):
            watch.restart()
            try:
                keys = {} if tools is None else {"tools": _tools(tools[number - 1])}
                found = _marked(chat, tokenizer, keys) if marks else _turns(chat, tokenizer, keys, enough)
            except (_Refused, Exceeded) as error:
                why = reason(error)
                if isinstance(error, Exceeded) and not marks:
                    why += "; give shorter conversations, or add {% generation %} marks to the template"
                raise UserError(f"Row {number} of {source}: the chat template refuses it: {why}.") from None
            rows.append(Row(number, **found))
    return rows


class _Refused(Exception):
    """By the template, or because of it; part of a sentence."""


def _refuse_powers(template: str | Mapping[str, str]) -> None:
    """9**9**9 is one operation that nothing interrupts, and no conversation needs it."""
    import jinja2

    for text in template.values() if isinstance(template, Mapping) else [template]:
        try:
            tokens = [value for _, kind, value in jinja2.Environment().lex(str(text)) if kind == "operator"]
        except jinja2.TemplateError:
            continue  # rendering says it
        if "**" in tokens:
            raise UserError("The tokenizer's chat template raises numbers to powers (**): give it a template without.")


def _render(tokenizer: Any, chat: list[dict[str, Any]], **keys: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, **keys)
    except Exceeded:
        raise
    except Exception as error:  # a template raises whatever it likes
        raise _Refused(reason(error)) from None


def _tools(cell: Any) -> Any:
    """Descriptions of tools, as JSON or as structs, in which datasets has filled the keys of other rows with None."""
    try:
        return without_none(json.loads(cell) if isinstance(cell, str) else cell)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"tools is no JSON that can be read ({reason(error)})") from None


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def _marked(chat: list[dict[str, Any]], tokenizer: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """The template says itself, by {% generation %}, which tokens the assistant writes. keys: for the template."""
    both = _render(tokenizer, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **keys)
    return {"marked": (list(both["input_ids"]), [bool(mark) for mark in both["assistant_masks"]])}


def _turns(chat: list[dict[str, Any]], tokenizer: Any, keys: dict[str, Any], enough: int) -> dict[str, Any]:
    """Without those marks: an assistant turn is what rendering it adds to the prompt that asks for it.

    Exact only if each rendered prefix of the conversation begins the rendering of the whole; some templates rewrite
    earlier turns once later ones follow, and those are refused. Prefix by prefix, a long conversation takes the square
    of its length; turns that begin behind `enough` tokens carry no loss that is looked at, and are left unrendered.
    """

    def render(count: int, ask: bool) -> str:
        text = str(_render(tokenizer, chat[:count], tokenize=False, add_generation_prompt=ask, **keys))
        if len(text) > LONGEST:
            raise _Refused(f"it makes {len(text)} characters of it")
        return text

    if chat[0]["role"] == "assistant":
        raise _Refused("it begins with the assistant, so that what it answers cannot be told; put a user's turn first")
    whole = render(len(chat), False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    look_at = 16  # pieces; twice as many each time, so that looking takes no longer than rendering
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        if len(pieces) >= look_at:
            look_at *= 2
            # twice: pieces may have fewer tokens apart than together, but not half as many
            if len(tokenizer(whole[:done], add_special_tokens=False, verbose=False)["input_ids"]) > 2 * enough:
                break
        before, after = render(turn, True), render(turn + 1, False)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)):
            raise _Refused(
                f"it renders message {turn + 1} or those before it differently once more follows, so the assistant's "
                "part cannot be told; add {% generation %} marks to the template"
            )
        end = len(after.rstrip())  # the line break after the end-of-turn token is not the assistant's to write
        end = end if end > len(before) else len(after)
        pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return {"pieces": (*pieces, (whole[done:], False))}

"""Conversations to pieces of text, by the tokenizer's chat template.

A template is a program that came with the model. transformers runs it in a sandbox; here it also gets a limit of time
and memory, and whatever it raises is said with the row.

**Whose words.** A template may mark by {% generation %} what the assistant writes. transformers makes a mask of tokens
of that (return_assistant_tokens_mask), which is not used here: it gives the assistant a token that is another's, too,
and places the marks wrongly that a macro writes. Here the template writes two characters of ours where its marks are,
and the text between them is what carries loss. Without marks, see `_turns`.

**Which day.** A template may ask for the day by strftime_now. It is told the one that its run began on, always, so that
a run's data is the same tomorrow.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from ..errors import UserError, reason
from .encode import Row
from .files import Source
from .messages import Chat, with_objects
from .time_limit import Exceeded, watching

LONGEST = 1 << 24  # characters of a rendered conversation


def message_rows(
    source: Source, chats: list[Chat], tokenizer: Any, *, enough: int, date: datetime, learn: str
) -> list[Row]:
    """enough: tokens of a row that are looked at. date: today, as far as the template is told. learn: `data.learn`."""
    _refuse_powers_and_chance(tokenizer.chat_template)
    rows = []
    with watching() as watch:
        for number, chat in enumerate(chats, 1):
            watch.restart()
            read = [chat.messages, chat.keys, sorted(chat.silent)]  # as it is, whatever is learned of it
            chat = replace(chat, silent=_silent(chat, learn))
            try:
                template = _dated(_template(tokenizer, chat.keys.get("tools")), date)
                keys = {**chat.keys, "chat_template": template}
                chat, whole = _written(chat, tokenizer, keys)
                marked = _with_marks(template)
                others = learn == "all"
                if others and not chat.silent:
                    pieces = iter([(whole, True)])
                elif marked == template:
                    pieces = _turns(whole, chat, tokenizer, keys, others)
                else:
                    text = _render(tokenizer, chat.messages, {**keys, "chat_template": marked})
                    pieces = _marked(whole, text, chat, others)
                rows.append(Row(number, _looked_at(whole, pieces, others, tokenizer, enough), read=read))
            except (_Refused, Exceeded) as error:
                why = reason(error)
                if isinstance(error, Exceeded):
                    why += "; give shorter conversations, or add {% generation %} marks to a template without"
                raise UserError(f"{source.row(number)}: the chat template refuses it: {why}.") from None
    return rows


def _silent(chat: Chat, learn: str) -> frozenset[int]:
    """The assistant's messages that are not learned."""
    turns = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    earlier = {"all": [], "assistant": [turn for turn in turns if turn < chat.prompt], "last": turns[:-1]}
    return chat.silent.union(earlier[learn])


class _Refused(Exception):
    """By the template, or because of it; part of a sentence."""


def _refuse_powers_and_chance(template: str | Mapping[str, str]) -> None:
    """9**9**9 is one operation that nothing interrupts, and no conversation needs it. Chance would make other data of
    a row in the next process."""
    for text in template.values() if isinstance(template, Mapping) else [template]:
        words = _words(str(text))
        if "**" in words:
            raise UserError("The tokenizer's chat template raises numbers to powers (**): give it a template without.")
        if "lipsum" in words or ("|", "random") in itertools.pairwise(words):
            raise UserError("The tokenizer's chat template writes random text: give it a template without.")


def _words(template: str) -> list[str]:
    """The names and operators of its code; none of one that is malformed, which rendering says."""
    import jinja2

    try:
        return [word for _, kind, word in jinja2.Environment().lex(template) if kind in ("operator", "name")]
    except jinja2.TemplateError:
        return []


_NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?("[^"\\]*"|'[^'\\]*')\s*\)""")


@functools.lru_cache(4)
def _dated(template: str, date: datetime) -> str:
    """The template, with that date where it asks transformers for the present one."""
    try:
        dated = _NOW.sub(lambda call: json.dumps(date.strftime(call[1][1:-1])), template)
    except ValueError as error:  # of a format
        raise _Refused(reason(error)) from None
    if any(word == "strftime_now" and after != "is" for word, after in itertools.pairwise([*_words(dated), ""])):
        raise _Refused("it asks for the date by other means than strftime_now('FORMAT'), so that it cannot be told it")
    return dated


def own_names(tokenizer: Any) -> set[str]:
    """What apply_chat_template takes for itself, and no template sees as a variable."""
    return set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents"}


def _template(tokenizer: Any, tools: Any) -> str:
    """The one of the tokenizer's templates that transformers takes for this row."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except Exception as error:  # several, and none of them by default
        raise _Refused(reason(error)) from None


def _render(tokenizer: Any, chat: list[dict[str, Any]], keys: dict[str, Any], *, ask: bool = False) -> str:
    """keys: what the template gets beside the messages, and `chat_template`. ask: for the assistant's turn."""
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask, **keys))
    except Exceeded:
        raise
    except Exception as error:  # a template raises whatever it likes
        raise _Refused(reason(error)) from None
    if len(text) > LONGEST:
        raise _Refused(f"it makes {len(text)} characters of it")
    return text


def _written(chat: Chat, tokenizer: Any, keys: dict[str, Any]) -> tuple[Chat, str]:
    """The conversation as the template wants it, and what it writes of it. Refuses what would be lost in silence."""
    for key in ("tool_calls", "function_call"):
        if key not in keys["chat_template"] and any(message.get(key) for message in chat.messages):
            raise _Refused(f"it writes no {key}, so that they cannot be learned")
    objects = [with_objects(message) for message in chat.messages]
    if objects == chat.messages:
        whole = _render(tokenizer, chat.messages, keys)
    else:
        chat, whole = _with_arguments(chat, replace(chat, messages=objects), tokenizer, keys)
    said = [m["content"] for m in chat.messages if m["role"] == "assistant" and not m.get("tool_calls")]
    words = [word for text in said for word in text.split(None, 100)[:100] if len(word) > 2]
    if words and not any(word in whole for word in words):  # of one that wants content in parts, say
        raise _Refused("it writes nothing of what the assistant says")
    return chat, whole


def _with_arguments(texts: Chat, objects: Chat, tokenizer: Any, keys: dict[str, Any]) -> tuple[Chat, str]:
    """Arguments of calls are JSON text in OpenAI's format, and objects in transformers'. Objects, unless the template
    cannot take them, or writes them as Python does."""
    try:
        whole = _render(tokenizer, objects.messages, keys)
    except _Refused:
        with suppress(_Refused):
            return texts, _render(tokenizer, texts.messages, keys)
        raise
    with suppress(_Refused):
        other = _render(tokenizer, texts.messages, keys)
        if whole.count("{'") > other.count("{'"):
            return texts, other
    return objects, whole


_BEGIN, _END = "\ufdd0", "\ufdd1"  # no characters of any text


@functools.lru_cache(4)
def _with_marks(template: str) -> str:
    """The template, writing _BEGIN and _END where its generation marks are. They are written by blocks of their own,
    as a block takes away the same white space around it as the mark did."""
    begun = re.sub(r"(\{%[-+]?\s*generation\s*)([-+]?)%\}", rf"\1%}}{{% if true %}}{_BEGIN}{{% endif \2%}}", template)
    return re.sub(r"\{%([-+]?)(\s*endgeneration\s*[-+]?%\})", rf"{{%\1 if true %}}{_END}{{% endif %}}{{%\2", begun)


def _marked(whole: str, marked: str, chat: Chat, others: bool) -> Iterator[tuple[str, bool]]:
    """marked: the same conversation, written by the template `_with_marks`. others: learn the rest, too."""
    parts = re.split(f"([{_BEGIN}{_END}])", marked)
    if "".join(parts[::2]) != whole:
        raise _Refused("it writes another text where its {% generation %} marks are followed")
    turns = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if chat.silent and parts.count(_BEGIN) != len(turns):
        raise _Refused("its {% generation %} marks are not one a turn, so that those not to learn cannot be told")
    learn, count = others, 0
    for part in parts:
        if part in (_BEGIN, _END):
            learn = others if part == _END else not (chat.silent and turns[count] in chat.silent)
            count += part == _END
        elif part:
            yield part, learn


def _turns(whole: str, chat: Chat, tokenizer: Any, keys: dict[str, Any], others: bool) -> Iterator[tuple[str, bool]]:
    """Without those marks: an assistant turn is what rendering it adds to the prompt that asks for it.

    Exact only if each rendered prefix of the conversation begins the rendering of the whole; some templates rewrite
    earlier turns once later ones follow, and those are refused. Prefix by prefix, a long conversation takes the square
    of its length; so a turn is rendered when it is asked for.
    """
    if chat.messages[0]["role"] == "assistant":
        raise _Refused("it begins with the assistant, so that what it answers cannot be told; put a user's turn first")
    done = 0
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, chat.messages[:turn], keys, ask=True)
        after = _render(tokenizer, chat.messages[: turn + 1], keys)
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) <= len(after)):
            raise _Refused(
                f"it renders message {turn + 1} or those before it differently once more follows, so the assistant's "
                "part cannot be told; add {% generation %} marks to the template"
            )
        end = len(after.rstrip())  # the line break after the end-of-turn token is not the assistant's to write
        end = end if end > len(before) else len(after)
        yield whole[done : len(before)], others
        yield whole[len(before) : end], turn not in chat.silent
        done = end


def _looked_at(
    whole: str, pieces: Iterable[tuple[str, bool]], others: bool, tokenizer: Any, enough: int
) -> tuple[tuple[str, bool], ...]:
    """The whole as pieces; what begins behind `enough` tokens is one, as none is looked at there, and telling pieces
    apart takes the square of their number."""
    kept: list[tuple[str, bool]] = []
    done = 0
    look_at = 16  # pieces; twice as many each time, so that looking takes no longer than what it saves
    for text, learn in pieces:
        if len(kept) >= look_at:
            look_at *= 2
            # twice: pieces may have fewer tokens apart than together, but not half as many
            if len(tokenizer(whole[:done], add_special_tokens=False, verbose=False)["input_ids"]) > 2 * enough:
                break
        kept.append((text, learn))
        done += len(text)
    return (*kept, (whole[done:], others))

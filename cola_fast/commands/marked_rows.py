"""Examples as text again, with the tokens marked that carry loss: for a terminal, without one, and as HTML."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from ..console import clean
from ..data.encode import IGNORE, Example
from ..errors import printable

LEARNED, SPECIAL, CLASS, PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[36m", "\x1b[0m"
AROUND = 8  # tokens before a part that are decoded with it: whether it begins with a space depends on them


class Part(NamedTuple):
    text: str
    learned: bool = False
    special: bool = False
    word_class: str = ""  # of a learned word


class MarkedRow(NamedTuple):
    title: str
    parts: list[Part]
    choices: list[tuple[str, bool]]  # what competes, and which of it is right

    def plain(self) -> str:
        """`⟦learned⟧`, and `⟦word|class⟧`."""
        text = ""
        for learned, parts in itertools.groupby(self.parts, key=lambda part: part.learned):
            said = [clean(part.text) + _bar(part.word_class) for part in parts]
            between = "⟧⟦" if any(part.word_class for part in self.parts) else ""
            text += f"⟦{between.join(said)}⟧" if learned else "".join(said)
        return self._page(text)

    def coloured(self) -> str:
        """With ANSI colours; a learned line break is shown."""
        text = ""
        for part in self.parts:
            said, colour = clean(part.text), LEARNED if part.learned else SPECIAL if part.special else ""
            said = said.replace("\n", f"↵{PLAIN}\n{colour}") if part.learned else said
            text += f"{colour}{said}{PLAIN}" if colour else said
            text += f"{CLASS}{_bar(part.word_class)}{PLAIN}" if part.word_class else ""
        return self._page(text)

    def html(self) -> str:
        text = ""
        for part in self.parts:
            said = _escaped(part.text)
            said = f"<b>{said}</b>" if part.special else said
            name = f"<i>{_escaped(part.word_class)}</i>" if part.word_class else ""
            text += f"<mark>{said.replace(chr(10), '↵' + chr(10))}{name}</mark>" if part.learned else said
        choices = (
            f"<li>{f'<mark>{_escaped(said)}</mark>, the right one' if right else _escaped(said)}</li>"
            for said, right in self.choices
        )
        below = f"<ul>{''.join(choices)}</ul>" if self.choices else ""
        return f"<h2>{_escaped(self.title)}</h2>\n<pre>{text}</pre>\n{below}\n"

    def _page(self, text: str) -> str:
        """Indented: what a row says cannot be taken for what is said about it."""
        choices = [f"  {'*' if right else '-'} {printable(said)}" for said, right in self.choices]
        return "\n".join([printable(self.title), *(f"  | {line}" for line in text.split("\n")), *choices])


def mark(example: Example, kind: str, tokenizer: Any, *, title: str, labels: Sequence[str | int]) -> MarkedRow:
    """kind: of `Data`. labels: what the candidates, or the classes of a head, stand for."""
    ids, names, learned = example.input_ids, special_tokens(tokenizer), set(learned_places(example, kind))
    classes = {i: str(labels[example.labels[i]]) for i in learned} if kind == "words" else {}

    def alone(i: int) -> tuple[bool, int]:  # special tokens and labelled words stand alone
        return i in learned, i if ids[i] in names or i in classes else -1

    parts = []
    for _, run in itertools.groupby(range(len(ids)), key=alone):
        places = list(run)
        start, name = places[0], names.get(ids[places[0]])
        text = _decoded(ids, start, places[-1] + 1, tokenizer)
        if name is not None and text.strip() != name:
            text = name
        parts.append(Part(text, start in learned, name is not None, classes.get(start, "")))
    choices = []
    if kind == "labelled":
        choices = [(str(label), i == example.labels[0]) for i, label in enumerate(labels)]
    for i, (label, tokens) in enumerate(zip(labels, example.candidates, strict=False)):
        choices.append((f"{label}: {tokenizer.decode(list(tokens))!r}", i == example.answer))
    return MarkedRow(title, parts, choices)


def learned_places(example: Example, kind: str) -> list[int]:
    """The tokens of an example that carry loss. A class of the whole text is no token's."""
    if kind == "labelled":
        return []
    first = 0 if example.head else 1  # of a text, nothing comes before it from which it could be predicted
    return [i for i, label in enumerate(example.labels) if label != IGNORE and i >= first]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Their names."""
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return {i: str(tokenizer.convert_ids_to_tokens(i)) for i in {*tokenizer.all_special_ids, *added}}


def page(title: str, facts: Iterable[tuple[str, str]], rows: Iterable[MarkedRow]) -> str:
    """One HTML page on its own. It runs nothing and fetches nothing."""
    table = "".join(f"<tr><th>{_escaped(name)}</th><td>{_escaped(fact)}</td></tr>\n" for name, fact in facts)
    return _PAGE.format(made_by=MADE_BY, title=_escaped(title), table=table, rows="".join(row.html() for row in rows))


MADE_BY = "<!doctype html>\n<!-- written by cola data -->\n"
_PAGE = """{made_by}<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
h2 {{ font-size: 1em; margin: 2em 0 .3em }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; margin: 0 }}
mark {{ background: #b6e8b6; color: inherit }}
b {{ font-weight: normal; color: #777 }}
i {{ color: #06c; font-size: .8em; padding-left: .2em }}
th {{ text-align: left; vertical-align: top; padding-right: 1em; font-weight: normal; color: #777 }}
td {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
<table>
{table}</table>
<p>What is <mark>marked</mark> carries loss; <b>special tokens</b> are grey.</p>
{rows}</body></html>
"""


def _decoded(ids: list[int], start: int, end: int, tokenizer: Any) -> str:
    """The text of the tokens from start to end, with the spaces that it has where it stands."""
    first = max(0, start - AROUND)
    before, whole = (_text(ids[first:stop], tokenizer) for stop in (start, end))
    return whole[len(before) :] if whole.startswith(before) else _text(ids[start:end], tokenizer)


def _text(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _bar(name: str) -> str:
    return f"|{clean(name)}" if name else ""


def _escaped(text: str) -> str:
    return escape(clean(text))

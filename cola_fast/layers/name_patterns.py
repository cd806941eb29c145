"""Regular expressions for module names, matched in bounded time.

Python's `re` tries one path after another, so that `(a+)+b` against thirty letters takes minutes, and nothing
interrupts it. Here all paths advance together: a step maps the set of places reached in the name to the next set
(Thompson 1968). The answer, whether the whole name matches, is that of `re.fullmatch`. A back reference would need
single paths: refused. `re` itself matches what neither repeats nor branches.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ..errors import reason

if sys.version_info >= (3, 11):
    from re import _parser as _sre  # type: ignore[attr-defined]
else:
    import sre_parse as _sre

LONGEST = 20_000  # characters of a pattern
STEPS = 5_000  # for one name; patterns as people write them need tens


class PatternError(ValueError):
    """Why this is no pattern; part of a sentence."""


def compile(pattern: str) -> Callable[[str], bool]:
    """`re.compile(pattern).fullmatch`, as yes or no. Both raise PatternError."""
    return _compile(pattern, pattern)


def compile_end(pattern: str) -> Callable[[str], bool]:
    """The same for a whole name or its end behind a full stop, as PEFT looks modules up."""
    _compile(pattern, pattern)  # a group that it closes is its own
    return _compile(rf"(.*\.)?({pattern})", pattern)


def _compile(whole: str, pattern: str) -> Callable[[str], bool]:
    if len(pattern) > LONGEST:
        raise PatternError(f"it has more than {LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sets like [[a] may mean something else one day
            if not set(pattern) & set("*+?{(|"):
                matches = re.compile(whole).fullmatch
                return lambda name: matches(name) is not None
            tree = _sre.parse(whole)
    except (re.error, OverflowError) as error:
        raise PatternError(reason(error)) from None
    except RecursionError:
        raise PatternError("its groups are too deep in each other") from None
    return lambda name: len(name) in _Match(name).after(tree, {0}, tree.state.flags)


class _Match:
    """One name. A set of places is where the next character may be matched."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, 0

    def after(self, items: Any, places: set[int], flags: int) -> set[int]:
        """The places after `items`, one following the other."""
        for op, argument in items:
            if places:
                self._count(1 + len(places) // 64)
                places = self._after_one(str(op), argument, places, flags)
        return places

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > STEPS:
            raise PatternError("it repeats repetitions, which takes too long")

    def _after_one(self, op: str, argument: Any, places: set[int], flags: int) -> set[int]:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return {p + 1 for p in places if p < len(self.name) and _is(op, argument, self.name[p], flags)}
        if op == "BRANCH":
            return set().union(*(self.after(branch, places, flags) for branch in argument[1]))
        if op == "SUBPATTERN":
            _, added, removed, inner = argument
            return self.after(inner, places, (flags | added) & ~removed)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            return self._repeat(int(least), int(most), inner, places, flags)
        if op == "AT":
            return {p for p in places if self._at(str(argument), p, flags)}
        if op in ("ASSERT", "ASSERT_NOT"):
            return {p for p in places if self._looks(argument, p, flags) == (op == "ASSERT")}
        raise PatternError(f"it uses {op.lower().replace('_', ' ')}, which is not supported here")

    def _repeat(self, least: int, most: int, inner: Any, places: set[int], flags: int) -> set[int]:
        # once more than there are characters, only empty repetitions are left, and the set stays as it is
        for _ in range(min(least, len(self.name) + 1)):
            places = self.after(inner, places, flags)
        reached, new = places, places
        for _ in range(min(most - least, len(self.name) + 1)):
            new = self.after(inner, new, flags) - reached
            if not new:
                break
            reached = reached | new
        return reached

    def _looks(self, argument: Any, place: int, flags: int) -> bool:
        direction, inner = argument
        if direction > 0:
            return bool(self.after(inner, {place}, flags))
        start = place - inner.getwidth()[0]  # `re` takes only what has one width
        return start >= 0 and place in self.after(inner, {start}, flags)

    def _at(self, where: str, place: int, flags: int) -> bool:
        name = self.name
        end = place == len(name)
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return place == 0 or bool(where == "AT_BEGINNING" and flags & re.MULTILINE and name[place - 1] == "\n")
        if where == "AT_END_STRING":
            return end
        if where == "AT_END":
            line = name[place : place + 1] == "\n"
            return end or (line and (place + 1 == len(name) or bool(flags & re.MULTILINE)))
        before, after = name[place - 1 : place] if place else "", name[place : place + 1]
        return (_category("WORD", before, flags) != _category("WORD", after, flags)) == (where == "AT_BOUNDARY")


def _is(op: str, argument: Any, c: str, flags: int) -> bool:
    """Whether the character is what one position of a pattern asks for."""
    if op == "ANY":
        return c != "\n" or bool(flags & re.DOTALL)
    variants = {c, c.lower(), c.upper()} if flags & re.IGNORECASE else {c}
    variants = {v for v in variants if len(v) == 1}
    if op != "IN":
        return (argument in map(ord, variants)) == (op == "LITERAL")
    negated = str(argument[0][0]) == "NEGATE"
    return any(_in(str(kind), value, v, flags) for kind, value in argument for v in variants) != negated


def _in(kind: str, value: Any, c: str, flags: int) -> bool:
    if kind == "LITERAL":
        return bool(ord(c) == value)
    if kind == "RANGE":
        return bool(value[0] <= ord(c) <= value[1])
    if kind == "CATEGORY":
        name = str(value).removeprefix("CATEGORY_")
        return _category(name.removeprefix("NOT_"), c, flags) != name.startswith("NOT_")
    return False  # NEGATE


def _category(name: str, c: str, flags: int) -> bool:
    if flags & re.ASCII and not c.isascii():
        return False
    if name == "DIGIT":
        return c.isdecimal()
    return c.isspace() if name == "SPACE" else c.isalnum() or c == "_"

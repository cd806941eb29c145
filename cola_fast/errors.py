"""The one exception meant for users: a sentence that says what was given, what was expected and what to do.

A sentence often quotes what is wrong, and that may be anything: endless, cyclic, full of terminal escape sequences.
`shown` quotes a value, `listed` several names, `reason` what a library said; `UserError` lets nothing through that a
terminal would obey.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

LONGEST = 2000  # characters of a sentence
WORD = 120  # characters of one quoted value


class UserError(ValueError):
    """Bad input. The CLI prints the sentence and exits with code 2; a traceback would mean a bug of ours."""

    def __init__(self, sentence: object) -> None:
        super().__init__(cut(printable(cut(str(sentence), LONGEST)), LONGEST))


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey and not show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, length: int) -> str:
    """At most `length` characters of it, its start and its end."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


class _Short(reprlib.Repr):
    """repr, of bounded time and length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = WORD
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 6

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a whole number of {x.bit_length()} bits"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: self.maxstring])


def shown(value: Any) -> str:
    """The value as a sentence quotes it: its repr, cut before it is written out."""
    return cut(_Short().repr(value), WORD)


def listed(names: Iterable[Any], count: int = 12) -> str:
    """`a, b, c`, the first `count` of them."""
    names = iter(names)
    first = [cut(str(name), WORD) for name in itertools.islice(names, count)]
    return ", ".join(first) + (", ..." if next(names, None) is not None else "")


def reason(error: BaseException) -> str:
    """What an exception of a library says, as part of a sentence: one line, no full stop."""
    text = " ".join(cut(str(error), LONGEST).split()).rstrip(".")
    name = type(error).__name__
    return cut(f"{name}: {text}" if text and isinstance(error, LookupError) else text or name, 400)


@contextlib.contextmanager
def told(sentence: str) -> Iterator[None]:
    """Around one call of a library on a user's file: whatever it raises becomes `sentence: reason.`"""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of a library in Rust; it is no Exception
        if not isinstance(error, Exception) and not panic:
            raise
        raise UserError(f"{sentence}: {reason(error)}.") from error


class Note(UserWarning):
    """What a user should know, and may ignore. The CLI prints the sentence."""


def note(sentence: str) -> None:
    warnings.warn(sentence, Note, stacklevel=3)


def near(word: str, options: Iterable[str], count: int = 3) -> str:
    """`" Did you mean a, b?"`, or `""` when nothing is close."""
    if len(word) > WORD:
        return ""
    matches = difflib.get_close_matches(
        word, [option for option in options if len(option) <= WORD], n=count, cutoff=0.5
    )
    return f" Did you mean {', '.join(matches)}?" if matches else ""

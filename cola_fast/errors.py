"""The one exception meant for users: a sentence that says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The CLI prints the sentence and exits with code 2; a traceback would mean a bug of ours."""


class Note(UserWarning):
    """What a user should know, and may ignore. The CLI prints the sentence."""


def note(sentence: str) -> None:
    warnings.warn(sentence, Note, stacklevel=3)


def near(word: str, options: Iterable[str], count: int = 3) -> str:
    """`" Did you mean a, b?"`, or `""` when nothing is close."""
    matches = difflib.get_close_matches(word, list(options), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(matches)}?" if matches else ""

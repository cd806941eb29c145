"""What is written to a terminal. It must not stop a run, and what comes out of files must not steer the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from .errors import UserError

# C0 controls but for line breaks and tabs, DEL, C1 controls, and those that change the direction of text
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]")


def clean(text: object) -> str:
    """With control characters spelled out: `\\x1b` instead of an escape sequence that the terminal would obey."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class Sturdy:
    """A text stream that goes on when it is closed or full: what is written then is lost."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream: Any = stream  # None: Python was started with it closed

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (ValueError, AttributeError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def errors() -> Any:
    """sys.stderr, which cannot fail."""
    return sys.stderr if isinstance(sys.stderr, Sturdy) else Sturdy(sys.stderr)


def tell(text: object) -> None:
    """A line for the user, beside the results."""
    print(clean(text), file=errors(), flush=True)


def show(text: object, *, cleaned: bool = False) -> None:
    """A result. Raises UserError if it cannot be written, and BrokenPipeError if nobody reads it.

    cleaned: what came out of files has been, and what a terminal would obey is ours.
    """
    said = str(text) if cleaned else clean(text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with _written():
        print(said.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def in_colour() -> bool:
    """Whether results go to a terminal, and NO_COLOR (no-color.org) does not speak against colours."""
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def flush() -> None:
    """Write what of the results is still waiting, see `show`."""
    with _written():
        if sys.stdout is not None:
            sys.stdout.flush()


def drop_output() -> None:
    """Forget what could not be written: Python would try it once more at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise UserError(f"The result could not be written ({error.strerror}): send it elsewhere.") from None

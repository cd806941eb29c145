"""JSON files: objects, one after the other or in one list, each of which is a row.

`refusal` looks at a file before anything parses it. pyarrow's reader, which `datasets` calls for the files of a folder,
dies (SIGSEGV) where a value is null instead of an object, or some thousand deep; so the brackets are counted first.
Where each line is an object, a GB takes about a second.

`read` parses with Python's json, which knows no types of columns: "2024-01-10" is text, 7 is 7 where another row has
7.5, and a struct has the keys that its own row wrote. Only the cells of columns that are used are kept.
"""

from __future__ import annotations

import itertools
import json
import mmap
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, reason, shown

DEPTH = 50  # of lists and objects in each other
_MARK = re.compile(rb'["\[\]{}]')
_BETWEEN = b" \t\r\n,"
_BOM = b"\xef\xbb\xbf"


def refusal(path: Path) -> str | None:
    """Why the file cannot be read, as part of a sentence; None if nothing speaks against it."""
    if path.stat().st_size == 0:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _refusal(data)


def _refusal(data: mmap.mmap) -> str | None:
    place = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    opening = re.compile(rb"\s*\[").match(data, place)  # a list of rows
    rows = depth = 1 if opening else 0  # rows: how deep they are
    place = opening.end() if opening else place
    while True:
        if depth == rows == 0:
            place = _skip_plain_lines(data, place)
        found = _MARK.search(data, place)
        here, mark = (found.start(), found[0]) if found else (len(data), b"")
        if depth <= rows:
            if data[place:here].strip(_BETWEEN):
                return _no_object(data, place)
            if mark in (b'"', b"[") or (mark == b"{" and depth < rows):
                return _no_object(data, here)
        if not mark:
            return None  # brackets that are not closed are for the reader to find
        place = here + 1
        if mark == b'"':
            place = _end_of_string(data, place)
        else:
            depth = depth + 1 if mark in b"[{" else max(0, depth - 1)
        if depth > DEPTH:
            return f"line {_line(data, here)} has more than {DEPTH} lists and objects in each other"


def _skip_plain_lines(data: mmap.mmap, place: int) -> int:
    """Behind the lines that are an object each, and have too few brackets to be deep."""
    while (end := data.find(b"\n", place)) >= 0:
        line = data[place:end].strip()
        plain = line.startswith(b"{") and line.endswith(b"}") and line.count(b"{") + line.count(b"[") <= DEPTH
        if line and not plain:
            break
        place = end + 1
    return place


def _end_of_string(data: mmap.mmap, place: int) -> int:
    """Behind the quote that closes it: one with an even number of backslashes before it."""
    while (quote := data.find(b'"', place)) >= 0:
        back = quote
        while back > place and data[back - 1] == ord("\\"):
            back -= 1
        place = quote + 1
        if (quote - back) % 2 == 0:
            return place
    return len(data)


def _no_object(data: mmap.mmap, place: int) -> str:
    while data[place : place + 1] in (b" ", b"\t", b"\r", b"\n", b","):
        place += 1
    text = data[place : place + 40].split(b"\n")[0].decode(errors="replace").strip()
    return f"line {_line(data, place)} is {text}, but must be an object with columns as keys"


def _line(data: mmap.mmap, place: int) -> int:
    return 1 + sum(data[start : min(start + (1 << 20), place)].count(b"\n") for start in range(0, place, 1 << 20))


# --- reading ----------------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair


def read(path: Path, used: Collection[str], limit: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The first `limit` rows, with their cells of columns `used`, also capitalised; and the names of all columns."""
    names: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for row, half in itertools.islice(_rows(path), limit):
        if not isinstance(row, dict):
            raise UserError(f"Row {len(rows) + 1} of {path} is {shown(row)}, but must be an object.")
        names |= dict.fromkeys(row)
        rows.append({name: cell for name, cell in row.items() if name in used or name.lower() in used})
        if half and not _is_text(rows[-1]):
            raise UserError(
                f"Row {len(rows)} of {path} has half of a surrogate pair (such as \\ud83d), which is no character: "
                "write the whole pair, or the character itself."
            )
    return rows, list(names)


def _rows(path: Path) -> Iterator[tuple[Any, bool]]:
    """Each row, and whether its text may have half a surrogate pair. Line by line, but for a list and for objects over
    several lines, of which the whole text is held in memory."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                values: Iterable[Any]
                if text.lstrip(" \t\r\n").startswith("["):
                    text += file.read().decode()
                    values = _items(text)
                else:
                    try:
                        values = list(_values(text))
                    except json.JSONDecodeError as error:
                        if error.pos < len(text.rstrip()):
                            raise
                        text += file.read().decode()  # the line ends within an object
                        values = _values(text)
                half = _HALF.search(text) is not None
                yield from ((value, half) for value in values)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (line {number} or later: {error.reason}): convert it.") from None
    except json.JSONDecodeError as error:
        line_number = number + error.lineno - 1
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: line {line_number}: {error.msg}.") from None


def _values(text: str) -> Iterator[Any]:
    place = _skip(text, 0)
    while place < len(text):
        value, place = _value(text, place)
        yield value
        place = _skip(text, place)


def _items(text: str) -> Iterator[Any]:
    place = _skip(text, text.index("[") + 1)
    more = not text.startswith("]", place)
    while more:
        value, place = _value(text, place)
        yield value
        place = _skip(text, place)
        more = text.startswith(",", place)
        if not more and not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        place = _skip(text, place + 1) if more else place
    if _skip(text, place + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, place + 1)


def _skip(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {shown(next(key for key in made if keys.count(key) > 1))} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _value(text: str, place: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, place)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a key that is there twice, a number of 5,000 digits
        raise json.JSONDecodeError(reason(error), text, place) from None


def _is_text(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True

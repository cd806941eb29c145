"""Is a file what a JSON reader may be given: objects, one after the other or in one list, and not too deep?

pyarrow's reader, which `datasets` calls, dies (SIGSEGV) where a value is null instead of an object, or some thousand
deep. So the brackets are counted first. Nothing is parsed: where each line is an object, a GB takes about a second.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

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

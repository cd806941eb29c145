"""What a disk, a careless hand or somebody else's program does to a file: drawn from a seeded source."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
STRANGE = [
    None, True, -1, 0, 10**400, 1e308, -0.5, float("nan"), float("inf"), "", "x", "\x1b[2J", "../..", "9" * 5000,
    "(a+)+$", "{{ 1/0 }}", [], {}, [None], {"a": {}}, DEEP,
]  # fmt: skip


def flip(source: random.Random, data: bytes) -> bytes:
    place = source.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << source.randrange(8))]) + data[place + 1 :]


def cut(source: random.Random, data: bytes) -> bytes:
    return data[: source.randrange(len(data))]


def zeros(source: random.Random, data: bytes) -> bytes:
    """A block that never reached the disk."""
    start = source.randrange(len(data))
    end = min(len(data), start + source.choice((1, 64, 512, 4096)))
    return data[:start] + bytes(end - start) + data[end:]


def noise(source: random.Random, data: bytes) -> bytes:
    start = source.randrange(len(data))
    return data[:start] + source.randbytes(source.choice((1, 8, 64))) + data[start:]


def twice(source: random.Random, data: bytes) -> bytes:
    return data + data


BYTES: list[Callable[[random.Random, bytes], bytes]] = [flip, flip, flip, cut, zeros, noise, twice]


def of_bytes(source: random.Random, path: Path) -> str:
    change = source.choice(BYTES)
    path.write_bytes(change(source, path.read_bytes() or b"\n"))
    return f"{change.__name__} in {path.name}"


def of_values(source: random.Random, path: Path) -> str:
    """A JSON file whose form is right, and one of whose values is strange, or gone."""
    value = json.loads(path.read_bytes())
    places = list(_places(value))
    if not places:
        return of_bytes(source, path)
    holder, key = source.choice(places)
    strange = source.choice([*STRANGE, "gone"])
    if strange == "gone":
        del holder[key]
    else:
        holder[key] = strange
    path.write_text(json.dumps(value))
    return f"{key!r} of {path.name} is {str(strange)[:40]!r}"


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def of_place(source: random.Random, path: Path) -> str:
    """Something else lies where the file was."""
    kind = source.choice(("nothing", "a folder", "an empty file", "a loop of links", "a neighbour"))
    neighbours = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    content = source.choice(neighbours).read_bytes() if neighbours else b""
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "an empty file":
        path.touch()
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    elif kind == "a neighbour":
        path.write_bytes(content)
    return f"{kind} in place of {path.name}"


def of_file(source: random.Random, path: Path) -> str:
    kinds = [of_bytes, of_bytes, of_bytes, of_place]
    kinds += [of_values] * 3 if path.suffix == ".json" and path.stat().st_size else []
    return source.choice(kinds)(source, path)


def fresh(source: Path, target: Path) -> Path:
    """A copy to be damaged."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target

"""Trees of dataclasses from plain mappings, and back. Knows of no key; a wrong one gets the nearest right one named."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .errors import WORD, UserError, cut, near, shown

LARGEST = 2**63  # what a whole number of a configuration is below


def build(cls: Any, raw: Any) -> Any:
    """A `cls` from a mapping. Raises UserError for an unknown key or a value of another type."""
    return _build(cls, raw, "", keys(cls))


def _build(cls: Any, raw: Any, path: str, known: Sequence[str]) -> Any:
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} is {shown(raw)}, but it is a section: a mapping of keys to values.")
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            name = key if isinstance(key, str) else shown(key)
            raise UserError(f"Unknown key {_join(path, cut(name, WORD))}.{_nearest_key(name, path, hints, known)}")
    return cls(**{key: _convert(hints[key], value, _join(path, key), known) for key, value in raw.items()})


def _convert(hint: Any, value: Any, path: str, known: Sequence[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, known)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options:
            try:
                return _convert(option, value, path, known)
            except UserError:
                if option is options[-1]:
                    raise
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(
            f"{path} is {shown(value)}, but must be one of {', '.join(map(str, args))}.{_near(value, args)}"
        )
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(
                _convert(kind, item, f"{path}[{i}]", known)
                for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
            )
    if origin is dict and isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, inner in value.items():
            name = _convert(args[0], _word(key), path, known)
            if name in found:
                raise UserError(f"{path} gives {shown(name)} twice: leave one out.")
            found[name] = _convert(args[1], inner, f"{path}.{cut(name, WORD)}", known)
        return found
    if hint is float:
        number = _number(value)
        if number is not None:
            return number
    elif hint is int and type(value) is int and abs(value) >= LARGEST:
        raise UserError(f"{path} is {shown(value)}, but a number of 64 bits is expected.")
    elif hint is str and isinstance(value, str) and not _is_text(value):
        raise UserError(f"{path} is {shown(value)}, which holds a character that no file name or text can have.")
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise UserError(f"{path} is {shown(value)} ({type(value).__name__}), but must be {_spell(hint)}.")


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 1e-3 (no dot) as a string, which nobody means."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_text(value: str) -> bool:
    """Whether it can be written to a file, and name one."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _near(value: Any, options: Iterable[str]) -> str:
    return near(value, options) if isinstance(value, str) else ""


def _word(key: Any) -> Any:
    """Labels such as 0, 1 or true are keys that people leave unquoted."""
    if isinstance(key, bool):
        return str(key).lower()
    return str(key) if isinstance(key, int) and abs(key) < LARGEST else key


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in args)
    if origin is tuple:
        return f"a list of {_spell(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)} values"
    if origin is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def keys(cls: Any, path: str = "") -> list[str]:
    """Every leaf's full name, `section.key`."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        found += keys(hint, _join(path, name)) if dataclasses.is_dataclass(hint) else [_join(path, name)]
    return found


def full_key(cls: Any, key: str) -> str:
    """An override may leave out the section where the last part is unique: `lr=1e-3`."""
    known = keys(cls)
    if key in known or any(key.startswith(k + ".") for k in known):  # the latter: a key of a mapping
        return key
    found = [k for k in known if k.endswith("." + key)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{key} could be {' or '.join(found)}: write the whole key.")
    raise UserError(f"Unknown key {key}.{_nearest_key(key, '', (), known)}")


def _nearest_key(key: str, path: str, siblings: Iterable[str], known: Sequence[str]) -> str:
    """The same word in another section, else a near sibling, else a near key anywhere."""
    leaves = {k.split(".")[-1]: k for k in known}
    last = key.split(".")[-1]
    if last in leaves and last not in siblings:
        return f" Did you mean {', '.join(k for k in known if k.split('.')[-1] == last)}?"
    hint = near(key, [str(s) for s in siblings]) or near(_join(path, key), known)
    if hint or not (found := near(last, leaves, count=1)):
        return hint
    return found.replace(word := found.split()[-1].rstrip("?"), leaves[word])


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """tree[a][b] = value for the key `a.b`; a section that is missing is made."""
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            inner = tree[section] = {}
        tree = inner
    tree[last] = value


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merge; anything else in `over` wins."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(typing.cast(Mapping[str, Any], below), value) if both else value
    return merged


def to_dict(tree: Any) -> dict[str, Any]:
    """Plain mappings and lists, ready for YAML."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(tree)
        for value in [getattr(tree, f.name)]
    }

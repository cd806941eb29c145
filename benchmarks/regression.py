"""Has something become slower than in the last committed result of the same suite on the same device?

Two things have to be true of a measurement, each beyond the spread: three quarters of our new times lie above the
slowest of the old ones, and so do our new ratios to every side that both results have. A machine that is slower today
raises the times and leaves the ratios; a peer that has become faster raises the ratio and leaves the times. Only what
we have made slower raises both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import harness


class Slower(NamedTuple):
    where: str
    before: float  # median, seconds
    now: float

    def __str__(self) -> str:
        return f"{self.where}: {self.now:.4g} s, and {self.before:.4g} s in the last committed result"


def last_committed(suite: str, env: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of this suite and device in git's HEAD; None where there is none, or no git."""
    path = harness.result_path(suite, env).relative_to(harness.ROOT)
    text = harness.git("show", f"HEAD:{path.as_posix()}")
    return None if text is None else json.loads(text)


def slower(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[Slower]:
    """What has become slower; measurements that only one of them has are passed over."""
    before = dict(_measurements(old))
    found = []
    for where, now in _measurements(new):
        then = before.get(where)
        if then is not None and _worse(now["seconds"]["ours"], then["seconds"]["ours"]):
            shared = now.get("ratio", {}).keys() & then.get("ratio", {}).keys()
            if all(_worse(now["ratio"][side], then["ratio"][side]) for side in shared):
                medians = (each["seconds"]["ours"]["median"] for each in (then, now))
                found.append(Slower(where, *medians))
    return found


def _worse(now: Mapping[str, float], then: Mapping[str, float]) -> bool:
    return now["q1"] > then["high"]


def _measurements(node: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Everything with our seconds in it, by its place: keys, and in lists what a row says it is the case of."""
    if isinstance(node, list):
        for i, each in enumerate(node):
            name = each.get("case", i) if isinstance(each, Mapping) else i
            yield from _measurements(each, f"{where} / {name}" if where else str(name))
    elif isinstance(node, Mapping):
        seconds = node.get("seconds")
        if isinstance(seconds, Mapping) and isinstance(seconds.get("ours"), Mapping):
            yield where, node
        for key, each in node.items():
            yield from _measurements(each, f"{where} / {key}" if where else key)

"""The registry of chain methods. A method is data: defaults for the configuration's slots, never a branch in a loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    name: str
    paper: str
    summary: str
    defaults: Mapping[str, Any]  # of the configuration's shape; whatever the user writes wins


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "cola",
            "arXiv 2401.04151",
            "train a link, tie it into the base, reset A, B and the optimizer, repeat",
            {"schedule": {"links": 3, "optimizer_state": "reset"}},
        ),
        Method("lora", "arXiv 2106.09685", "one link", {"schedule": {"links": 1}}),
    )
}

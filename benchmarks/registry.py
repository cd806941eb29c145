"""The suites: one file a question. Importing this loads none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast


class Suite(Protocol):
    """What a suite's module offers."""

    def run(self, *, quick: bool) -> dict[str, Any]:
        """Check parity, then measure. Everything returned is JSON. Raises ParityError."""
        ...

    def tables(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Name of a README block -> Markdown, from a result as `python -m benchmarks run` writes it."""
        ...


@dataclass(frozen=True)
class Entry:
    question: str
    module: str

    def load(self) -> Suite:
        return cast(Suite, importlib.import_module(self.module))


SUITES = {
    "demo": Entry("What does the demo reach, and how long does it take?", "benchmarks.demo"),
    "gelora": Entry("How does the intrinsic dimension change with depth, and which ranks follow?", "benchmarks.gelora"),
    "knot": Entry("What does a knot cost, and what does it keep, in 16 and in 4 bits?", "benchmarks.knot"),
    "step_time": Entry(
        "How long do a LoRA linear and a whole training step take, beside PEFT and transformers' Trainer?",
        "benchmarks.step_time",
    ),
}

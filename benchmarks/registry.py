"""The suites: one file a question. Importing this loads none of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast


@dataclass(frozen=True)
class Options:
    """How much to measure. A suite for which one of these means nothing ignores it."""

    quick: bool = False  # a minute's look; for a GPU suite a rehearsal in small, on a CPU if need be
    full: bool = False  # every combination
    seconds: float = math.inf  # start nothing after that, and return what there is
    keep: Callable[[Mapping[str, Any]], None] = lambda measured: None  # takes what has been measured so far


class Suite(Protocol):
    """What a suite's module offers."""

    def run(self, options: Options) -> dict[str, Any]:
        """Check parity, then measure. Everything returned is JSON. Raises ParityError."""
        ...

    def tables(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Name of a README block -> Markdown, from a result as `python -m benchmarks run` writes it."""
        ...


class Plotted(Protocol):
    """A suite that draws, too."""

    def plot(self, result: Mapping[str, Any], path: Path) -> None:
        """Write one picture of a result, as PNG."""
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
    "quality": Entry("Does a chain learn more than LoRA at the same cost?", "benchmarks.quality"),
    "quality_cost": Entry("What does a step of the arms of `quality` cost?", "benchmarks.quality_cost"),
    "knot": Entry("What does a knot cost, and what does it keep, in 16 and in 4 bits?", "benchmarks.knot"),
    "lora_linear": Entry(
        "What does a LoRA linear cost above its frozen linear on a GPU, here and elsewhere?", "benchmarks.lora_linear"
    ),
    "kernels": Entry("How near is each kernel to the speed of memory or of the plain product?", "benchmarks.kernels"),
    "convergence": Entry(
        "Do the Triton kernels train, compile and replay like the reference?", "benchmarks.convergence"
    ),
    "step_time": Entry(
        "How long do a LoRA linear and a whole training step take, beside PEFT and transformers' Trainer?",
        "benchmarks.step_time",
    ),
}

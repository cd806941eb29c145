"""The suites: one file a question. Importing this loads none of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from .charts import Chart
    from .report import Quoted


UNFINISHED = 3  # exit code: the time was up; the same command goes on


@dataclass(frozen=True)
class Options:
    """How much to measure. A suite for which one of these means nothing ignores it."""

    quick: bool = False  # a minute's look; for a GPU suite a rehearsal in small, on a CPU if need be
    full: bool = False  # every combination
    seconds: float = math.inf  # start nothing after that, and return what there is
    found: Mapping[str, Any] = field(default_factory=dict)  # what an unfinished run has kept, to go on from
    keep: Callable[[Mapping[str, Any]], None] = lambda measured: None  # takes what has been measured so far


class Suite(Protocol):
    """What a suite's module offers."""

    def run(self, options: Options) -> dict[str, Any]:
        """Check parity, then measure. Everything returned is JSON. Raises ParityError."""
        ...

    def tables(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Name of a block -> Markdown, from a result as `python -m benchmarks run` writes it."""
        ...


class Plotted(Protocol):
    """A suite that draws, too."""

    def plot(self, result: Mapping[str, Any], path: Path) -> None:
        """Write one picture of a result, as PNG."""
        ...


class Charted(Protocol):
    """A suite whose results are bars on the page of `python -m benchmarks report`."""

    def charts(self, result: Mapping[str, Any]) -> list[Chart]: ...


class Compared(Protocol):
    """A suite with ratios that can be quoted, of one kind of machine beside another."""

    def quoted(self, result: Mapping[str, Any]) -> dict[str, Quoted]:
        """Name of a block -> its ratios."""
        ...


class Joined(Protocol):
    """A suite with blocks that are made of all its results."""

    def together(self, results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Name of a block -> Markdown, from the results of every kind of machine."""
        ...


@dataclass(frozen=True)
class Entry:
    question: str
    module: str

    def load(self) -> Suite:
        return cast(Suite, importlib.import_module(self.module))


SUITES = {
    "demo": Entry("What does the demo reach, and how long does it take?", "benchmarks.demo"),
    "drop_in": Entry("What does accelerate_peft take off a training step of a PEFT model?", "benchmarks.drop_in"),
    "gelora": Entry("How does the intrinsic dimension change with depth, and which ranks follow?", "benchmarks.gelora"),
    "methods": Entry("Does every method of the family learn the demo's task?", "benchmarks.methods"),
    "quality": Entry("Does a chain learn more than LoRA at the same cost?", "benchmarks.quality"),
    "quality_cost": Entry("What does a step of the arms of `quality` cost?", "benchmarks.quality_cost"),
    "knot": Entry("What does a knot in 4 bits keep?", "benchmarks.knot"),
    "knot_time": Entry("What does a knot in 16 bits cost?", "benchmarks.knot_time"),
    "four_bit": Entry("Does a chain on 4-bit weights keep what its links learn?", "benchmarks.four_bit"),
    "lora_linear": Entry(
        "What does a LoRA linear cost above its frozen linear on a GPU, here and elsewhere?", "benchmarks.lora_linear"
    ),
    "kernels": Entry("How near is each kernel to the speed of memory or of the plain product?", "benchmarks.kernels"),
    "loops": Entry("What share of the speed of memory does the machine code of each kernel allow?", "benchmarks.loops"),
    "convergence": Entry(
        "Do the Triton kernels train, compile and replay like the reference?", "benchmarks.convergence"
    ),
    "memory": Entry(
        "How much memory does a step need, here and in PEFT, and does --dry-run say so?", "benchmarks.memory"
    ),
    "overhead": Entry(
        "What does a chain cost above plain LoRA, and the trainer above a bare loop?", "benchmarks.overhead"
    ),
    "linears": Entry(
        "How long do the LoRA linears of a small model take on a CPU, beside PEFT's?", "benchmarks.linears"
    ),
    "rounding": Entry("How much of a young link reaches the outputs of 16-bit layers?", "benchmarks.rounding"),
    "profile": Entry("Where does the time of one training step go?", "benchmarks.profile"),
    "train": Entry("How fast is a whole training step, beside other trainers?", "benchmarks.train"),
}

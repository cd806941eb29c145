"""What does a step of the arms of `quality` cost, in time and in memory?

Every arm, or one of those that take the same steps, in a process of its own, one after the other, on the evaluation's
own batches. Time: the median of ten steps, after three, with clipping and the optimizers; a knot is what the steps in
which one falls take above that. Memory: on a GPU the allocator's peak; on a CPU the most the process has resident
during the steps, knots included, above what it had before the model was loaded.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import harness
from .quality import FOLDER, gelora_pattern
from .quality_arms import ARMS, BATCH, Training
from .quality_problems import MODELS
from .quality_tables import NAMES
from .registry import Options
from .report import describe, markdown

WARMUP, STEPS, LR = 3, 10, 1e-4
SIDES = {  # whose steps differ: those of lora-restarts and cola-2, say, are among them
    "minilm": ("lora", "lora-24", "cola-3", "rac-lora", "gelora", "full"),
    "smollm2": ("lora", "lora-24", "cola-3", "rac-lora", "full"),
}
MIB = 2**20


def run(options: Options) -> dict[str, Any]:
    sides = {"minilm": ("lora", "cola-3")} if options.quick else SIDES
    chosen = [(model, arm) for model, arms in sides.items() for arm in arms]
    began, rows = time.perf_counter(), []
    for model, arm in chosen:
        if time.perf_counter() - began > options.seconds:
            break
        harness.say(f"{model}: {arm}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            rows.append(alone.submit(measure, model, arm).result())
        options.keep({"rows": rows})
    return {"rows": rows, "complete": len(rows) == len(chosen)}


def measure(model: str, arm: str) -> dict[str, Any]:
    """For a process that has not loaded a model yet."""
    import transformers  # noqa: F401  so that its own size is nobody's

    before = _resident("VmRSS")
    problem = MODELS[model]("movie", 0, full=ARMS[arm].full, items=1, extra=1)
    ranks = gelora_pattern(f"{model}-movie", arm, problem, harness.RESULTS / FOLDER)
    training = Training(problem, ARMS[arm], WARMUP + STEPS, LR, 0, ranks)
    steps = iter(training)
    seconds = []
    for step in range(WARMUP + STEPS):
        if step == 1:
            _forget_peak()
        seconds.append(harness.timed(lambda: next(steps)))
    spans = max(1, len(ARMS[arm].ranks))
    knots = [round((WARMUP + STEPS) * i / spans) for i in range(1, spans)] if ARMS[arm].merge else []
    median = statistics.median(s for i, s in enumerate(seconds) if i >= WARMUP and i not in knots)
    knot = statistics.mean(seconds[i] for i in knots) - median if knots else None
    found: dict[str, Any] = {"model": model, "arm": arm, "trained": training.trained, "peak": _peak() - before}
    return {**found, "step": median, "knot": knot, "seconds": seconds}


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def _resident(field: str) -> int:
    """Bytes, as Linux counts them for this process; 0 where the memory in question is a GPU's."""
    if torch.cuda.is_available():
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lora = {row["model"]: row for row in result["rows"] if row["arm"] == "lora"}
    lines = [
        [
            f"{NAMES[row['model']]}, {ARMS[row['arm']].label}",
            f"{row['trained']:,}",
            f"{1000 * row['step']:.0f}",
            f"{row['step'] / lora[row['model']]['step']:.2f}",
            "" if row["knot"] is None else f"{1000 * row['knot']:.0f}",
            f"{row['peak'] / MIB:.0f}",
        ]
        for row in result["rows"]
    ]
    note = f"Movie sentences in batches of {BATCH}; trained: numbers in one link, the first, without the head."
    table = markdown(["", "trained", "step, ms", "over LoRA's", "a knot, ms", "peak memory, MiB"], lines)
    return {"quality_cost-steps": f"{table}\n\n{note} {describe(result)}"}

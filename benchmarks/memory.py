"""How much memory does a training step need at its highest, and does `cola train --dry-run` say so beforehand?

**Peaks**: the same training in this library and in transformers' Trainer on a PEFT model, both in the settings of
`trainers`; what is counted stands in `peak`. Losses must agree before a figure is kept.

**Model**: what `cola_fast.training.memory.estimate` expects of each configuration, counted on fake tensors, beside what
was then measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from cola_fast.training.plan import plan_run

from . import harness, legs
from .charts import Bar, Chart
from .legs import Leg
from .registry import Options
from .report import Quoted, describe, markdown
from .workloads import Workload

STEPS = 2  # the first allocates the optimizer's state; from the second on all are alike
ALLOWED = 0.1  # of the measured peak, for the memory model
MIB = 2**20
COMPARED = ("ours", "peft")


def cases(kind: str, *, quick: bool) -> list[tuple[Workload, tuple[str, ...]]]:
    """Workloads with the sides to measure: those to compare first, then those that only try the model."""
    if quick:
        return [(Workload("tiny", 64, 2), COMPARED)]
    base = Workload("Llama-8B", 2048, 4) if kind == "cuda" else Workload("SmolLM2-135M", 512, 1)
    compared = [
        (replace(base, in_4bit=four, checkpointing=checkpointing, dropout=dropout), COMPARED)
        for four, checkpointing, dropout in product((False, True), (False, True), (0.0, 0.05))
    ]
    small = replace(base, model="Llama-1B") if kind == "cuda" else base
    tried = [
        replace(small, batch=2 * small.batch),
        replace(small, length=2 * small.length),
        replace(small, rank=128),
        replace(small, targets=("q_proj", "v_proj")),
        replace(small, packing=True),
        replace(small, dtype="fp32", length=small.length // 2),
    ]
    chosen = [*compared, *((workload, ("ours",)) for workload in tried)]
    return [(workload, sides) for workload, sides in chosen if workload.possible]


def run(options: Options) -> dict[str, Any]:
    began = time.monotonic()
    chosen = cases(harness.device().type, quick=options.quick)
    rows: list[dict[str, Any]] = list(options.found.get("rows", []))
    refused: list[str] = []
    done = {row["case"] for row in rows}
    for number, (workload, sides) in enumerate(chosen, 1):
        if str(workload) in done or time.monotonic() - began > options.seconds:
            continue
        harness.say(f"memory {number} of {len(chosen)}: {workload}")
        try:
            rows.append(_measure(workload, sides))
        except (harness.ParityError, legs.LegError) as error:
            refused.append(f"{workload}: {error}")
        options.keep({"rows": rows})
    return {"rows": rows, "refused": refused, "left": len(chosen) - len(rows) - len(refused)}


def _measure(workload: Workload, sides: Sequence[str]) -> dict[str, Any]:
    need = plan_run(workload.config(STEPS)).need
    found = {side: legs.measure(Leg(workload, side, STEPS, STEPS, memory=True)) for side in sides}
    difference = legs.require_same_training(workload, found)
    return {
        "case": str(workload),
        "workload": asdict(workload),
        "predicted_bytes": need.peak,
        "peak_bytes": {side: leg["peak_bytes"] for side, leg in found.items()},
        "weight_bytes": found["ours"]["weight_bytes"],
        "difference": difference,
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    rows = result["rows"]
    counted = "torch.cuda.max_memory_allocated" if _on_gpu(result) else "every allocation of PyTorch's CPU allocator"
    note = (
        f"Most bytes held at once in {STEPS} steps, by {counted}, with the model's weights. All linears, fp32 factors "
        "and AdamW, sdpa attention on both sides; PEFT without prepare_model_for_kbit_training. Random weights."
    )
    return {
        "memory-peak": f"{_peak_table(_compared(rows))}\n\n{note} {describe(result)}",
        "memory-model": f"{_model_table(rows)}\n\nThe same count. {describe(result)}",
    }


def quoted(result: Mapping[str, Any]) -> dict[str, Quoted]:
    peaks = [row["peak_bytes"] for row in _compared(result["rows"])]
    return {"memory-peak": Quoted("cola_fast / PEFT, at the peak", [peak["ours"] / peak["peft"] for peak in peaks])}


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if "peft" in row["peak_bytes"]]


def charts(result: Mapping[str, Any]) -> list[Chart]:
    titles = {"ours": "cola_fast", "peft": "transformers Trainer + PEFT"}
    rows = []
    for row in result["rows"]:
        bars = [Bar(titles[side], peak / MIB) for side, peak in row["peak_bytes"].items()]
        rows.append((row["case"], [*bars, Bar("expected by --dry-run", row["predicted_bytes"] / MIB)]))
    title = "Peak memory of a training step, the model's weights with it"
    return [Chart(title, "MiB (lower is better)", rows, digits=0)]


def _on_gpu(result: Mapping[str, Any]) -> bool:
    return bool(result["environment"].get("gpu"))


def _peak_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        ours, theirs = (row["peak_bytes"][side] for side in COMPARED)
        mib = (f"{n / MIB:,.0f}" for n in (row["weight_bytes"], ours, theirs))
        beside = (ours - row["weight_bytes"]) / (theirs - row["weight_bytes"])
        lines.append([row["case"], *mib, f"**{ours / theirs:.2f}**", f"{beside:.2f}"])
    header = ["", "weights, MiB", "cola_fast, MiB", "Trainer + PEFT, MiB", "cola_fast / PEFT", "without the weights"]
    return markdown(header, lines)


def _model_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["case"],
            *(f"{n / MIB:,.1f}" for n in (row["predicted_bytes"], row["peak_bytes"]["ours"])),
            f"{row['predicted_bytes'] / row['peak_bytes']['ours'] - 1:+.1%}",
        ]
        for row in rows
    ]
    return markdown(["", "--dry-run, MiB", "measured, MiB", "off by"], lines)

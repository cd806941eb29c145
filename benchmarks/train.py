"""How fast is a whole training step, and how much memory does it hold, beside other trainers?

Sides and settings stand in `trainers`, workloads in `workloads`: random weights, fixed tokens, the same batches. Sides
run in turn, A B C, C B A, ...; on a GPU each run is a process of its own and its peak memory is counted with it.
Losses have to agree before a time is shown. A run that is out of time keeps its legs, and goes on from them.

`demo` is the real thing on a CPU: `cola demo`'s model and sentences, whose losses must agree in fp32, and in bf16 where
the CPU has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from cola_fast.training.models import DTYPES, resolve_dtype

from . import harness, legs, trainers, workloads
from .charts import Bar, Chart
from .legs import Leg
from .registry import Options
from .report import Quoted, describe, kind, markdown, spread
from .trainers import TITLES, Problem
from .workloads import Workload

PEERS = ("ours", "peft", "liger", "trl", "unsloth")
DEMO_SIDES = ("ours", "ours_all_logits", "peft")
# dense bf16 FLOP/s, from the data sheets
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100": 312e12, "NVIDIA B200": 2250e12}

# relative, of the loss of each of the first steps: from the second on it tells of the gradients, too. Both are measured
# from PEFT's in fp32: in bf16 it rounds most of a young link's term away, and its own losses are 8 % off by the second.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}


class Size(NamedTuple):
    rounds: int
    steps: int
    span: int


def cases(kind: str, *, quick: bool, full: bool = False) -> list[tuple[Workload, tuple[str, ...]]]:
    """Workloads and their sides, the most telling first, since time may run out."""
    return [(workload, sides) for workload, sides in _cases(kind, quick, full) if workload.possible]


def _cases(kind: str, quick: bool, full: bool) -> list[tuple[Workload, tuple[str, ...]]]:
    if quick:
        tiny = Workload("tiny", 64, 2)
        return [(tiny, (*PEERS, "full")), (replace(tiny, packing=True, checkpointing=True), ("ours", "peft"))]
    if kind == "cpu":
        small = Workload("SmolLM2-135M", 512, 1)
        return [
            (small, (*PEERS, "full")),
            (replace(small, in_4bit=True), ("ours", "peft")),
            (replace(small, checkpointing=True), ("ours", "peft")),
            (replace(small, packing=True), ("ours", "peft", "trl")),
            (replace(small, length=1024), ("ours", "peft")),
        ]
    big, middle, small = (
        Workload(*shape) for shape in (("Llama-8B", 2048, 4), ("Llama-1B", 2048, 8), ("SmolLM2-135M", 2048, 8))
    )
    chosen = [
        (big, (*PEERS, "full")),
        (replace(big, in_4bit=True), PEERS),
        (middle, (*PEERS, "full")),
        (replace(middle, in_4bit=True), PEERS),
        (small, (*PEERS, "full")),
    ]
    for base in (big, replace(big, in_4bit=True), middle) if full else ():
        chosen += [
            (replace(base, checkpointing=True, batch=2 * base.batch), PEERS),
            (replace(base, packing=True), PEERS),
            (replace(base, length=512, batch=4 * base.batch), PEERS),
            (replace(base, length=8192, batch=base.batch // 4), PEERS),
        ]
    return chosen


def run(options: Options) -> dict[str, Any]:
    began, kind = time.monotonic(), harness.device().type
    size = Size(1, 3, 1) if options.quick else Size(2, 4, 1) if kind == "cpu" else Size(2, 15, 5)
    found = dict(options.found)
    measured: dict[str, Any] = {"demo": found.get("demo"), "legs": found.get("legs", {}), "rows": [], "refused": []}
    measured["peak_flops"] = found.get("peak_flops") or _peak_flops(256 if options.quick else 2048)
    if measured["demo"] is None and kind == "cpu" and not options.quick:
        measured["demo"] = _demo()
    left = 0
    for workload, sides in cases(kind, quick=options.quick, full=options.full):
        results = measured["legs"].setdefault(str(workload), {"workload": asdict(workload), "sides": {}, "skipped": {}})
        results["skipped"].pop("ours", None)  # whatever it was, without ours there is no row
        for turn in range(size.rounds):
            for side in sides if turn % 2 == 0 else reversed(sides):
                done = results["sides"].setdefault(side, [])
                if len(done) > turn or side in results["skipped"]:
                    continue
                if time.monotonic() - began > options.seconds:
                    left += 1
                    continue
                harness.say(f"{workload}: {side}, round {turn + 1} of {size.rounds}")
                try:
                    done.append(legs.measure(Leg(workload, side, size.steps, size.span, memory=kind == "cuda")))
                except legs.LegError as error:
                    results["skipped"][side] = str(error)
                options.keep(measured)
    _summarise(measured, size.rounds)
    return {**measured, "left": left}


def _summarise(measured: dict[str, Any], rounds: int) -> None:
    for case, results in measured["legs"].items():
        finished = {side: done for side, done in results["sides"].items() if len(done) == rounds}
        if "ours" not in finished:
            if "ours" in results["skipped"]:
                measured["refused"].append(f"{case}: {results['skipped']['ours']}")
            continue
        workload = Workload(**results["workload"])
        try:
            for turn in range(rounds):
                legs.require_same_training(workload, {side: done[turn] for side, done in finished.items()})
        except harness.ParityError as error:
            measured["refused"].append(str(error))
            continue
        samples = {side: [s for leg in done for s in leg["samples"]] for side, done in finished.items()}
        measured["rows"].append(
            {
                "case": case,
                "workload": results["workload"],
                "tokens_per_step": finished["ours"][0]["tokens_per_step"],
                "attention": finished["ours"][0]["attention"],
                "peak_bytes": {side: max(leg.get("peak_bytes", 0) for leg in done) for side, done in finished.items()},
                "skipped": results["skipped"],
                **harness.summarise(samples, "ours"),
            }
        )


def _peak_flops(size: int) -> dict[str, Any]:
    """What utilisation is a share of: the data sheet's, or where there is none, what a large plain product reaches."""
    name = harness.environment()["device"]
    for known, flops in PEAK_FLOPS.items():
        if name.startswith(known):
            return {"flops": flops, "source": "data sheet"}
    dtype = harness.native_dtype()
    a = torch.randn(size, size, device=harness.device(), dtype=DTYPES[dtype])
    seconds = min(harness.timed(lambda: a @ a, 3) for _ in range(5))
    return {"flops": 2 * size**3 / seconds, "source": f"a plain {dtype} product of {size}^3 on this machine"}


# --- the demo ---------------------------------------------------------------------------------------------------------


def _demo(rounds: int = 5, steps: int = 6) -> dict[str, Any]:
    harness.say("the losses of both trainers on the demo")
    parity, exact = {}, None
    for dtype in dict.fromkeys(("fp32", harness.native_dtype())):
        tolerance = TOLERANCES[dtype]
        problem = Problem(workloads.demo(4, dtype), span=1)
        ours, peft = (trainers.SIDES[name](problem, _unwatched).losses for name in ("ours", "peft"))
        exact = exact or peft  # of the first dtype
        what = f"The losses of the first steps in {dtype}"
        worst = harness.require_close(what, ours, exact, tolerance=tolerance)
        theirs = harness.largest_difference(peft, exact)
        parity[dtype] = {"ours": ours, "peft": peft, "difference": worst, "of_peft": theirs, "allowed": tolerance}
    problem = Problem(workloads.demo(steps, "auto"))
    harness.say("both trainers on the demo, timed")

    def seconds(side: str) -> float:
        return trainers.SIDES[side](problem, _unwatched).samples[0]

    samples = harness.interleave({side: partial(seconds, side) for side in DEMO_SIDES}, rounds=rounds, warmup=0)
    return {
        "case": "demo",
        "dtype": str(resolve_dtype(problem.config.model.dtype, harness.device())).removeprefix("torch."),
        "attention": problem.attention,
        "parity": parity,
        "tokens_per_step": problem.tokens_per_step,
        "timed_steps": steps - 1,
        **harness.summarise(samples, "ours"),
    }


def _unwatched(model: torch.nn.Module) -> torch.nn.Module:
    return model


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    found = {"train-step": f"{_table(result)}\n\n{_note(result)} {describe(result)}"}
    if result["demo"] is not None:
        found["train-demo"] = f"{_demo_table(result['demo'])}\n\n{_demo_note(result['demo'])} {describe(result)}"
    return found


def together(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The demo's step in one row a kind of machine, the worst ratio first: the README's table."""
    results = [result for result in results if result["demo"] is not None]
    if not results:
        return {}
    results = sorted(results, key=lambda result: -result["demo"]["ratio"]["peft"]["median"])
    lines = []
    for demo, machine in ((result["demo"], kind(result)) for result in results):
        ours, peft = (demo["seconds"][side]["median"] for side in ("ours", "peft"))
        lines.append([machine, f"{ours:.3f}", f"{peft:.3f}", f"**{spread(demo['ratio']['peft'])}**"])

    def shared(what: Callable[[Mapping[str, Any]], object]) -> str:
        return " or ".join(sorted({str(what(result["demo"])) for result in results}))

    note = (
        f"Median seconds of a step: SmolLM2-135M on the demo's sentences, in the dtype that the machine multiplies "
        f"natively, fp32 adapters on all linears, {shared(lambda demo: demo['attention'])} attention, "
        f"{shared(lambda demo: round(demo['tokens_per_step']))} tokens, "
        f"{shared(lambda demo: len(demo['samples']['ours']))} interleaved runs of "
        f"{shared(lambda demo: demo['timed_steps'])} steps; the ratio with quartiles."
    )
    header = ["", "cola_fast, s / step", "Trainer + PEFT, s / step", "cola_fast / PEFT"]
    return {"train-machines": f"{markdown(header, lines)}\n\n{note}"}


def quoted(result: Mapping[str, Any]) -> dict[str, Quoted]:
    what, demo = "cola_fast / transformers Trainer + PEFT", result["demo"]
    steps = [row["ratio"]["peft"]["median"] for row in result["rows"] if "peft" in row["ratio"]]
    return {
        "train-step": Quoted(what, steps),
        "train-demo": Quoted(what, [] if demo is None else [demo["ratio"]["peft"]["median"]]),
    }


def _table(result: Mapping[str, Any]) -> str:
    with_memory = result["environment"].get("gpu")
    lines = []
    for row in result["rows"]:
        workload = Workload(**row["workload"])
        for side in row["seconds"]:
            taken = harness.Spread(**row["seconds"][side])
            flops = workload.flops(row["tokens_per_step"], full=side == "full") / taken.median
            lines.append(
                [
                    f"{row['case']}: {TITLES[side]}",
                    f"{taken.median:.3f} ({taken.q1:.3f} to {taken.q3:.3f})",
                    f"{row['tokens_per_step'] / taken.median:,.0f}",
                    f"{flops / result['peak_flops']['flops']:.0%}",
                    *([f"{row['peak_bytes'][side] / 2**30:.1f}"] if with_memory else []),
                    "" if side == "ours" else f"**{spread(row['ratio'][side])}**",
                ]
            )
    header = ["", "s / step", "tokens / s", "FLOP utilisation", *(["peak, GiB"] if with_memory else [])]
    return markdown([*header, "cola_fast / this"], lines)


def _note(result: Mapping[str, Any]) -> str:
    peak, rows = result["peak_flops"], result["rows"]
    skipped = {f"{TITLES[side]}: {why}" for row in rows for side, why in row["skipped"].items()}
    samples = len(next(iter(rows[0]["samples"].values()))) if rows else 0
    attention = ", ".join(sorted({row["attention"] for row in rows}))
    parts = [
        f"Random weights, fp32 factors and AdamW on all linears, {attention} attention on all sides, Liger only where "
        f"it says so. Medians of {samples} interleaved samples with quartiles. Utilisation: FLOPs of the model itself "
        f"over {peak['flops'] / 1e12:,.1f} TFLOP/s ({peak['source']})."
    ]
    parts += [f"Not measured: {'; '.join(sorted(skipped))}."] if skipped else []
    return " ".join(parts)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    rows = [*([result["demo"]] if result["demo"] else []), *result["rows"]]
    speeds = [(r["case"], [_speed(r, side) for side in r["seconds"] if side != "ours_all_logits"]) for r in rows]
    found = [Chart("Whole training steps", "tokens / s (higher is better), median and quartiles", speeds, digits=0)]
    peaks = [
        (row["case"], [Bar(TITLES[side], peak / 2**30) for side, peak in row["peak_bytes"].items()])
        for row in result["rows"]
        if all(row["peak_bytes"].values())
    ]
    return [*found, Chart("Peak memory of the same", "GiB (lower is better)", peaks, digits=1)]


def _speed(row: Mapping[str, Any], side: str) -> Bar:
    tokens, taken = row["tokens_per_step"], harness.Spread(**row["seconds"][side])
    return Bar(TITLES[side], tokens / taken.median, tokens / taken.q3, tokens / taken.q1)


def _demo_table(demo: Mapping[str, Any]) -> str:
    lines = []
    for side in DEMO_SIDES:
        seconds = harness.Spread(**demo["seconds"][side])
        lines.append(
            [
                TITLES[side],
                f"{seconds.median:.3f} ({seconds.q1:.3f} to {seconds.q3:.3f})",
                f"{demo['tokens_per_step'] / seconds.median:,.0f}",
                "" if side == "ours" else f"**{spread(demo['ratio'][side])}**",
            ]
        )
    return markdown(["", "s / step", "tokens / s", "cola_fast / this"], lines)


def _demo_note(demo: Mapping[str, Any]) -> str:
    fp32, bf16 = demo["parity"]["fp32"], demo["parity"].get("bf16")
    in_16 = "; the CPU has no instructions for bf16."
    if bf16:
        in_16 = f"; in bf16 ours came within {bf16['difference']:.1%} of those, PEFT's within {bf16['of_peft']:.1%}."
    return (
        f"SmolLM2-135M on the demo's sentences, {demo['dtype']} with fp32 adapters on all linears, "
        f"{demo['attention']} attention, {demo['tokens_per_step']:.0f} tokens a step, the same batches, optimizer and "
        f"clipping in all; {len(demo['samples']['ours'])} interleaved runs of {demo['timed_steps']} timed steps. "
        f"Before any timing, the losses of the first {len(fp32['ours'])} steps agreed to {fp32['difference']:.0e} in "
        f"fp32{in_16}"
    )

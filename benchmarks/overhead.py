"""What does a chain cost above plain LoRA, and the trainer above a bare loop?

**Trainer**: steps of `cola_fast.train` in turn with steps of a loop that is nothing but forward, loss, backward,
clipping and AdamW, on the same model, link, optimizer and batch, A B, B A, A B, ... What the trainer adds is the making
of batches, the schedule, and the log at its default interval. Writing a checkpoint is timed apart.

**Knot**: everything between the last step of a link and the first of the next, in a run with three links: saving,
sealing, folding, opening the next link, its new optimizer. Its share of training is that of a knot every 500 steps; a
ledger also makes the steps after it dearer, which stands beside it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial, wraps
from itertools import pairwise
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from torch import nn

from cola_fast.chain.chain import Chain
from cola_fast.config import Config
from cola_fast.data.batches import Batch, Feed
from cola_fast.data.loss import batch_loss, needed_logits
from cola_fast.training import plot as curves
from cola_fast.training import prepare, trainer

from . import harness
from .charts import Bar, Chart
from .registry import Options
from .report import Quoted, describe, markdown
from .workloads import Workload

BETWEEN_KNOTS = 500  # steps
LINKS, STEPS = 3, 4  # of the run whose knots are timed, and the steps of each link
BASES = {"dense": False, "ledger": True, "nf4": True}  # kind of base -> 4-bit weights
Samples = dict[str, list[float]]


def run(options: Options) -> dict[str, Any]:
    on_gpu = harness.device().type == "cuda"
    base = Workload("Llama-8B", 2048, 4) if on_gpu else Workload("SmolLM2-135M", 512, 1)
    base = Workload("tiny", 64, 2) if options.quick else base
    rounds = {"tiny": 6 if options.quick else 200, base.model: 6 if options.quick else 16}
    measured: dict[str, Any] = {"workload": asdict(base)}
    measured |= {key: list(options.found.get(key, [])) for key in ("trainer", "knots")}
    loops = list(dict.fromkeys((replace(base, model="tiny", length=64, batch=2), base)))
    kinds = {kind: replace(base, in_4bit=in_4bit) for kind, in_4bit in BASES.items()}
    kinds = {kind: w for kind, w in kinds.items() if w.possible and (kind == "dense" or not options.quick)}
    left, began = 0, time.monotonic()

    def measure(key: str, case: str, work: Callable[[], dict[str, Any]]) -> None:
        nonlocal left
        if any(row["case"] == case for row in measured[key]):
            return
        if time.monotonic() - began > options.seconds:
            left += 1
            return
        harness.say(f"{key}: {case}")
        measured[key].append({"case": case, **work()})
        options.keep(measured)

    for workload in loops:
        measure("trainer", str(workload), partial(_beside, workload, rounds[workload.model]))
    for kind, workload in kinds.items():
        measure("knots", f"{workload}, {kind}", partial(_knots, workload, kind))
    return {**measured, "left": left}


# --- the trainer ------------------------------------------------------------------------------------------------------


def _beside(workload: Workload, rounds: int) -> dict[str, Any]:
    """Steps of the trainer, and as many of the bare loop."""
    samples: Samples = {"ours": [], "bare": []}
    step = trainer._Loop._step
    config = workload.config(rounds + 2)
    batches: list[Batch] = []

    def both(loop: Any) -> None:
        sides = {"ours": lambda: step(loop), "bare": lambda: _bare_step(loop, batches[0])}
        for name in sides if loop.at.step % 2 else reversed(sides):
            seconds = harness.timed(sides[name])
            if loop.at.step > 2:  # the first allocate
                samples[name].append(seconds)

    def feed(*arguments: Any, **options: Any) -> Feed:
        made = Feed(*arguments, **options)
        batches.append(next(Feed(*arguments, **options)))
        return made

    with patch.object(trainer._Loop, "_step", both), patch.object(prepare, "Feed", feed):
        _train(config)
    size = min(map(len, samples.values()))
    return harness.summarise({name: values[:size] for name, values in samples.items()}, "ours")


def _bare_step(loop: Any, batch: Batch) -> None:
    batch = batch.to(loop.device)
    loss = batch_loss(needed_logits(loop.model, batch), batch)[0] / batch.labelled
    loss.backward()
    nn.utils.clip_grad_norm_(loop.chain.parameters(), 1.0)
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none=True)


# --- knots ------------------------------------------------------------------------------------------------------------


def _knots(workload: Workload, kind: str) -> dict[str, Any]:
    """Medians, in seconds: of a knot and its parts, and of a step of each link."""
    config = workload.config(LINKS * STEPS)
    base: Any = kind
    chain = replace(config.chain, base=base, rounding="auto")
    config = replace(config, chain=chain, schedule=replace(config.schedule, links=LINKS))
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)  # when it began, and ended
    with ExitStack() as stack:
        for owner, name in (
            (trainer._Loop, "_step"),
            (trainer._Loop, "_knot"),
            (trainer._Loop, "_save"),
            (Chain, "tie"),
            (Chain, "extend"),
            (trainer, "make_optimizer"),
            (curves, "draw"),
        ):
            stack.enter_context(_clocked(owner, name, spent[name]))
        _train(config)
    steps = spent["_step"]
    gaps = [
        (end, begin) for (_, end), (begin, _) in pairwise(steps) if any(end <= t[0] <= begin for t in spent["_knot"])
    ]
    parts = {
        "save": "_save",
        "seal and fold": "tie",
        "next link": "extend",
        "optimizer": "make_optimizer",
        "plot": "draw",
    }
    within = {
        part: [sum(b - a for a, b in spent[name] if start <= a <= stop) for start, stop in gaps]
        for part, name in parts.items()
    }
    whole = [stop - start for start, stop in gaps]
    plain = median(b - a for a, b in steps[1:STEPS])
    last = median(b - a for a, b in steps[-STEPS + 1 :])
    return {
        "base": kind,
        "seconds": {"ours": asdict(harness.Spread.of(whole))},
        "parts": {part: median(seconds) for part, seconds in within.items()},
        "step_seconds": {"first link": plain, "last link": last},
        "share": median(whole) / (BETWEEN_KNOTS * plain),
    }


@contextmanager
def _clocked(owner: Any, name: str, spent: list[tuple[float, float]]) -> Iterator[None]:
    work: Callable[..., Any] = getattr(owner, name)

    @wraps(work)
    def clocked(*arguments: Any, **options: Any) -> Any:
        harness.synchronize()
        began = time.perf_counter()
        result = work(*arguments, **options)
        harness.synchronize()
        spent.append((began, time.perf_counter()))
        return result

    with patch.object(owner, name, clocked):
        yield


def _train(config: Config) -> None:
    with TemporaryDirectory() as folder:
        trainer.train(replace(config, out=f"{folder}/run"), quiet=True)


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    return {
        "overhead-trainer": f"{_trainer_table(result['trainer'])}\n\n{_TRAINER_NOTE} {describe(result)}",
        "overhead-knot": f"{_knot_table(result['knots'])}\n\n{_KNOT_NOTE} {describe(result)}",
    }


def quoted(result: Mapping[str, Any]) -> dict[str, Quoted]:
    trainers = [row["ratio"]["bare"]["median"] for row in result["trainer"]]
    knots = [1 + row["share"] for row in result["knots"]]
    return {
        "overhead-trainer": Quoted("cola_fast.train / bare loop", trainers),
        "overhead-knot": Quoted(f"a chain with a knot every {BETWEEN_KNOTS} steps / plain LoRA", knots),
    }


_TRAINER_NOTE = (
    "Medians of single steps, ratios of interleaved pairs with quartiles. Bare: forward, loss, backward, clipping, "
    "AdamW on the same model, link, optimizer and batch. Random weights, sdpa attention."
)
_KNOT_NOTE = (
    f"Medians of the {LINKS - 1} knots of a run of {LINKS} links; the share is that of a knot every {BETWEEN_KNOTS} "
    "steps. Save: the state to resume from, on disk and synchronised. R = 16 on all linears, stochastic rounding."
)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    knots = [(row["case"], [Bar("knots", 100 * row["share"])]) for row in result["knots"]]
    more = []
    for row in result["trainer"]:
        ratio = harness.Spread(**row["ratio"]["bare"])
        more.append((row["case"], [Bar("trainer", *(100 * (r - 1) for r in (ratio.median, ratio.q1, ratio.q3)))]))
    return [
        Chart(f"A knot every {BETWEEN_KNOTS} steps", "% of plain LoRA's training time", knots),
        Chart("The trainer above a bare loop", "% of the bare loop's step, median and quartiles", more, signed=True),
    ]


def _trainer_table(rows: list[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        ours, bare = (row["seconds"][side]["median"] for side in ("ours", "bare"))
        ratio = harness.Spread(**row["ratio"]["bare"])
        lines.append(
            [
                row["case"],
                f"{1e3 * bare:.1f}",
                f"{1e3 * ours:.1f}",
                f"**{ratio.median - 1:+.1%}** ({ratio.q1 - 1:+.1%} to {ratio.q3 - 1:+.1%})",
            ]
        )
    return markdown(["a step", "bare loop, ms", "cola_fast.train, ms", "more"], lines)


def _knot_table(rows: list[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        step = row["step_seconds"]
        lines.append(
            [
                row["case"],
                f"{row['seconds']['ours']['median']:.2f}",
                *(f"{seconds:.2f}" for seconds in row["parts"].values()),
                f"{step['first link']:.2f}",
                f"**{row['share']:.2%}**",
                f"{step['last link'] / step['first link']:.2f}",
            ]
        )
    parts = rows[0]["parts"] if rows else []
    header = ["", "a knot, s", *(f"{part}, s" for part in parts), "a step, s"]
    return markdown([*header, "knot / 500 steps", f"step of link {LINKS} / link 1"], lines)

"""What does a LoRA linear cost above its frozen linear on a GPU, here and elsewhere?

Forward and backward (dX, dA, dB) of the linears of Llama 3.1 8B and Llama 3.2 1B, alone and as the seven projections of
a block (q, k, v read one x; gate and up another), for the sides of `layers`. A case's numbers are kept only if, in this
process and on these operands, every output and gradient passed the parity gate; a case that fails it is listed as
refused, and a baseline that fails it, or cannot run, is skipped with its reason.

Sides are timed in turn, between two events of the GPU, over operands that the last-level cache has forgotten. A call's
time on the host is measured, too: where it is longer than the GPU's, launching is what costs.

By default: the blocks with R = 16 at every M, the 8B block with R = 8 and 64 at M = 8192, and every single linear with
R = 16 at M = 512 and 8192; each with and without dropout. --full: every shape, M and R.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from cola_kernels import matmul, skinny, tuning

from . import harness, layers
from .charts import Bar, Chart
from .layers import Problem
from .registry import Options
from .report import describe, markdown

MODELS = {  # N, K
    "Llama 3.1 8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Llama 3.2 1B": {"q, o": (2048, 2048), "k, v": (512, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)},
}
TOKENS = (8192, 2048, 512, 16384)
RANKS = (16, 8, 64)
DROPOUTS = (0.0, 0.05)
BLOCK = "block"
SAMPLE_SECONDS = 0.01
SLOW_MASK = 512  # tokens up to which the reference is timed with dropout: its mask takes dozens of passes in int64
REHEARSAL = {"tiny": {"q, o": (32, 32), "k, v": (16, 32), "gate, up": (48, 32), "down": (32, 48)}}


class Case(NamedTuple):
    model: str
    shape: str  # of MODELS, or BLOCK
    tokens: int
    rank: int
    dropout: float

    def groups(self) -> list[list[tuple[int, int]]]:
        """N, K of the members that share an x."""
        sizes = (MODELS | REHEARSAL)[self.model]
        if self.shape != BLOCK:
            return [[sizes[self.shape]]]
        q, kv, up, down = sizes.values()
        return [[q, kv, kv], [q], [up, up], [down]]


def cases(*, full: bool) -> list[Case]:
    """The most telling first, since time may run out."""
    big, small = MODELS
    blocks = [Case(big, BLOCK, m, 16, p) for m, p in product(TOKENS[:1], DROPOUTS)]
    blocks += [Case(small, BLOCK, m, 16, p) for m, p in product(TOKENS[:1], DROPOUTS)]
    blocks += [Case(model, BLOCK, m, 16, p) for m, model, p in product((512, 2048, 16384), MODELS, DROPOUTS)]
    ranks = [Case(big, BLOCK, 8192, rank, p) for rank, p in product(RANKS[1:], DROPOUTS)]
    singles = [
        Case(model, shape, m, 16, p)
        for m, p, model in product((8192, 512), DROPOUTS, MODELS)
        for shape in MODELS[model]
    ]
    chosen = [*blocks, *ranks, *singles]
    if full:
        grid = product(MODELS, TOKENS, RANKS, DROPOUTS)
        chosen += [Case(model, shape, m, r, p) for model, m, r, p in grid for shape in (*MODELS[model], BLOCK)]
    return list(dict.fromkeys(chosen))


def rehearsal() -> list[Case]:
    return [Case("tiny", shape, 24, 4, p) for shape, p in product((BLOCK, "down"), DROPOUTS)]


def run(options: Options) -> dict[str, Any]:
    began = time.monotonic()
    rows: list[dict[str, Any]] = list(options.found.get("rows", []))
    refused: list[dict[str, Any]] = []
    chosen = rehearsal() if options.quick else cases(full=options.full)
    done = {tuple(row[field] for field in Case._fields) for row in rows}
    measured = {"rows": rows, "refused": refused, "cases": len(chosen)}
    for number, case in enumerate(chosen, 1):
        if tuple(case) in done:
            continue
        if time.monotonic() - began > options.seconds:
            harness.say("time is up")
            break
        harness.say(f"{number} of {len(chosen)}: {case}")
        try:
            rows.append(_measure(case, rounds=2 if options.quick else 11))
        except harness.ParityError as error:
            refused.append({**case._asdict(), "reason": str(error)})
        options.keep(measured)
    return {**measured, "left": len(chosen) - len(rows) - len(refused)}


def _measure(case: Case, *, rounds: int) -> dict[str, Any]:
    # The interpreter multiplies bf16 inexactly, so that a rehearsal without a GPU is in fp16.
    dtype = torch.bfloat16 if harness.device().type == "cuda" else torch.float16
    draw = partial(Problem.draw, case.groups(), case.tokens, case.rank, case.dropout, dtype)
    problems = [draw()]
    problems += [draw() for _ in range(layers.copies(problems[0].bytes) - 1)]
    sides: dict[str, list[layers.Side]] = {}
    parity: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, build in layers.SIDES.items():
        if name == "reference" and case.dropout and case.tokens > SLOW_MASK:
            skipped[name] = f"timed with dropout up to M = {SLOW_MASK} only: its mask takes dozens of passes"
            continue
        try:
            built = [build(problem) for problem in problems]
            parity[name] = layers.check(f"{name}: {case}", built[0], problems[0])
        except (harness.ParityError, harness.NotComparable, ImportError, RuntimeError, TypeError, ValueError) as error:
            if name == "ours":
                raise
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            sides[name] = built
    work = {"frozen": harness.in_turn([partial(layers.frozen, problem) for problem in problems])}
    for name, built in sides.items():
        pairs = zip(built, problems, strict=True)
        work[name] = harness.in_turn([partial(side.passes, problem) for side, problem in pairs])
    samples = harness.sample(work, rounds=rounds, seconds=SAMPLE_SECONDS)
    return {
        **case._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "copies": len(problems),
        "path": chosen_path(sides["ours"][0], problems[0]),
        "parity": parity,
        "skipped": skipped,
        "saved_bytes": {name: layers.saved_bytes(built[0], problems[0]) for name, built in sides.items()},
        "peak_bytes": {name: layers.peak_bytes(each) for name, each in work.items()},
        "host_seconds": {name: _host_seconds(each) for name, each in work.items()},
        **harness.summarise(samples, "ours"),
    }


def _host_seconds(work: Any, calls: int = 5) -> float:
    """What it takes to launch one call, whether the GPU keeps up or not."""
    harness.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    seconds = (time.perf_counter() - began) / calls
    harness.synchronize()
    return seconds


def chosen_path(side: layers.Side, problem: Problem) -> dict[str, Any]:
    """The configurations that one forward and backward asked for, by table key; none where cuBLAS does all."""
    asked: dict[str, Any] = {}
    choose = tuning.choose

    def recorded(kernel: str, candidates: Any, shape: tuning.Shape) -> Any:
        asked[shape.key(kernel)] = choose(kernel, candidates, shape)
        return asked[shape.key(kernel)]

    with patch.object(skinny, "choose", recorded), patch.object(matmul, "choose", recorded):
        side.passes(problem)
    return asked


# --- tables and plot --------------------------------------------------------------------------------------------------

TITLES = {
    "ours": "ours",
    "reference": "reference",
    "peft": "PEFT",
    "peft_half": "PEFT bf16",
    "unsloth": "Unsloth",
    "lorafusion": "LoRAFusion",
}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    rows = result["rows"]
    others = sorted({f"{name}: {why}" for row in rows for name, why in row["skipped"].items()})
    notes = [_NOTE, *(["Not measured: " + "; ".join(others) + "."] if others else [])]
    unfinished = result["cases"] - len(rows) - len(result["refused"])
    if unfinished:
        notes.append(f"{unfinished} of {result['cases']} cases did not fit into the time.")
    if result["refused"]:
        notes.append(f"{len(result['refused'])} cases refused, because ours failed the parity gate there.")
    return {
        "lora_linear-time": f"{_time_table(rows)}\n\n{' '.join(notes)} {describe(result)}",
        "lora_linear-memory": f"{_memory_table(rows)}\n\n{describe(result)}",
    }


_NOTE = (
    "Forward and backward over the frozen linears' (forward and dX by cuBLAS), medians of interleaved pairs with "
    "quartiles; PEFT: fp32 adapters under autocast, PEFT bf16: autocast_adapter_dtype=False; fp32 factors in ours."
)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The blocks; a single linear is in the table."""
    rows = []
    for row in result["rows"]:
        if row["shape"] == BLOCK:
            floor = row["samples"]["frozen"]
            above = {n: harness.Spread.of_ratio(row["samples"][n], floor) for n in TITLES if n in row["samples"]}
            rows.append((_label(row), [Bar(TITLES[n], r.median, r.q1, r.q3) for n, r in above.items()]))
    unit = "time / the frozen linears' time (lower is better)"
    return [Chart("A block's linears, forward and backward", unit, rows, floor=(1.0, "the frozen linears alone"))]


def _time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in TITLES if any(name in row["samples"] for row in rows)]
    lines = []
    for row in rows:
        samples = row["samples"]
        line = [_label(row), f"{1e3 * row['seconds']['frozen']['median']:.3f}"]
        for name in names:
            floor = harness.Spread.of_ratio(samples[name], samples["frozen"]) if name in samples else None
            line.append(f"{floor.median:.2f} ({floor.q1:.2f} to {floor.q3:.2f})" if floor else "")
        for name in ("peft", "peft_half"):
            line.append(f"**{1 / row['ratio'][name]['median']:.2f}**" if name in samples else "")
        lines.append([*line, _path(row["path"]), "host" if _launch_bound(row) else ""])
    header = ["", "floor, ms", *(f"{TITLES[name]} / floor" for name in names), "PEFT / ours", "PEFT bf16 / ours"]
    return markdown([*header, "large product", "bound by"], lines)


def _memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in TITLES if any(name in row["saved_bytes"] for row in rows)]
    mib = 2**20
    lines = [
        [
            _label(row),
            *(f"{row['saved_bytes'][name] / mib:.1f}" if name in row["saved_bytes"] else "" for name in names),
            *(f"{row['peak_bytes'][name] / mib:.1f}" if row["peak_bytes"].get(name) else "" for name in names),
        ]
        for row in rows
    ]
    return markdown(["MiB", *(f"{TITLES[n]}, saved" for n in names), *(f"{TITLES[n]}, peak" for n in names)], lines)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['model']} {row['shape']}, M = {row['tokens']}, R = {row['rank']}, p = {row['dropout']:g}"


def _path(path: Mapping[str, Any]) -> str:
    """How X W is computed: by cuBLAS alone, by cuBLAS into a seeded C, or by the Triton GEMM, for so many of them."""
    gemms = [config for key, config in path.items() if key.startswith("gemm")]
    fused = sum(config is not None for config in gemms)
    return "cuBLAS" if not gemms else "addmm" if not fused else f"gemm in {fused} of {len(gemms)}"


def _launch_bound(row: Mapping[str, Any]) -> bool:
    return bool(row["host_seconds"]["ours"] > 0.9 * row["seconds"]["ours"]["median"])


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Time over the floor, one panel a dropout, one bar a side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(DROPOUTS), 1, figsize=(12, 8), squeeze=False)
    for axis, dropout in zip(axes[:, 0], DROPOUTS, strict=True):
        rows = [row for row in result["rows"] if row["dropout"] == dropout]
        rows = [row for row in rows if row["shape"] == BLOCK] or rows
        for index, height, name in _bars(rows):
            axis.bar(index, height, 0.15, color=f"C{list(TITLES).index(name)}")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(range(len(rows)), [_label(row).replace(", ", "\n", 1) for row in rows], fontsize=7)
        axis.set_ylabel("time / frozen linears (ratio)")
        axis.set_title(f"forward + backward, dropout {dropout:g}", fontsize=9)
    shown = [name for name in TITLES if any(name in row["samples"] for row in result["rows"])]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{list(TITLES).index(name)}") for name in shown]
    figure.legend(handles, [TITLES[name] for name in shown], loc="upper right", ncols=len(shown), fontsize=8)
    figure.suptitle(f"{result['environment']['device']}; the line is the floor", x=0.2, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, float, str]]:
    for i, row in enumerate(rows):
        names = [name for name in TITLES if name in row["samples"]]
        for j, name in enumerate(names):
            ratio = harness.Spread.of_ratio(row["samples"][name], row["samples"]["frozen"])
            yield i + 0.16 * (j - (len(names) - 1) / 2), ratio.median, name

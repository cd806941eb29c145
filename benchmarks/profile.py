"""Where does the time of one training step go, and what would be the next 10 %?

A step of a plain loop (forward, loss, backward, clipping, AdamW; what the trainer adds is in `overhead`) under
PyTorch's profiler, with shapes. Operators are put together by what they are for; times are their own, without the
operators that they call, so that they add up to the step. On a GPU the same of its kernels.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cola_fast import attach
from cola_fast.data.batches import Batch, Feed
from cola_fast.data.loss import batch_loss, needed_logits
from cola_fast.data.rows import load_data
from cola_fast.training import models

from . import harness
from .charts import Bar, Chart
from .registry import Options
from .report import describe, markdown
from .workloads import Workload

STEPS = 3
LOW_RANK = 64  # a product with a side no longer than that is a link's: ranks of a group together, not a model's width
PRODUCTS = ("mm", "linear", "matmul", "gemm", "nvjet", "cutlass", "project", "output_grads", "factor_grad")
KINDS = {  # the first whose words are in an operator's name
    "products": PRODUCTS,
    "attention": ("attention", "flash", "sdp"),
    "look-ups and 4-bit levels": ("dequant", "index", "gather", "take", "embedding"),
    "optimizer and clipping": ("adam", "foreach", "norm_"),
    "loss": ("logsumexp", "scatter", "exp_"),
    "casts and copies": ("copy", "to_copy", "cat", "clone", "fill", "zero", "empty"),
    "elementwise": ("mul", "add", "silu", "sigmoid", "pow", "rsqrt", "neg", "sub", "mean", "sum", "sin", "cos", "div"),
}
OTHER = "Python, autograd and the rest"


def run(options: Options) -> dict[str, Any]:
    on_gpu = harness.device().type == "cuda"
    base = Workload("Llama-8B", 2048, 4) if on_gpu else Workload("SmolLM2-135M", 512, 1)
    base = Workload("tiny", 64, 2) if options.quick else base
    chosen = [w for w in (base, replace(base, in_4bit=True))[: 1 if options.quick else 2] if w.possible]
    began = time.monotonic()
    rows: list[dict[str, Any]] = list(options.found.get("rows", []))
    for workload in chosen[len(rows) :]:
        if time.monotonic() - began > options.seconds:
            break
        rows.append(_profiled(workload))
        options.keep({"rows": rows})
    return {"rows": rows, "left": len(chosen) - len(rows)}


def _profiled(workload: Workload) -> dict[str, Any]:
    harness.say(f"profile: {workload}")
    steps = _steps(workload)
    for _ in range(2):
        next(steps)
    plain = sorted(_seconds(steps) for _ in range(STEPS))[STEPS // 2]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(STEPS):
            next(steps)
        harness.synchronize()
    rows = recorded.key_averages(group_by_input_shape=True)
    if torch.cuda.is_available():  # the kernels; what launches them is not waited for
        rows = [row for row in rows if row.device_type.name == "CUDA" and not row.is_user_annotation]
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = [(r.key, r.input_shapes or [], r.count / STEPS, getattr(r, own) / 1e6 / STEPS) for r in rows]
    kinds: dict[str, float] = defaultdict(float)
    for name, shapes, _, seconds in operators:
        kinds[_kind(name, shapes)] += seconds
    largest = sorted(operators, key=lambda operator: -operator[3])[:12]
    return {
        "case": str(workload),
        "workload": asdict(workload),
        "seconds_without_profiler": plain,
        "kinds": dict(sorted(kinds.items(), key=lambda kind: -kind[1])),
        "largest": [
            {"operator": name, "shapes": _matrices(shapes), "calls": calls, "seconds": seconds}
            for name, shapes, calls, seconds in largest
        ],
    }


def _seconds(steps: Iterator[None]) -> float:
    harness.synchronize()
    began = time.perf_counter()
    next(steps)
    harness.synchronize()
    return time.perf_counter() - began


def _steps(workload: Workload) -> Iterator[None]:
    config = workload.config(4 * STEPS)
    c, t = config.chain, config.train
    model = models.load_model(config.model)
    data = load_data(config.data, models.load_tokenizer(config.model), context=workload.length, seed=t.seed)
    chain = attach(model, r=c.r, alpha=c.alpha, targets=c.targets, dropout=c.dropout, seed=t.seed)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-3, fused=True)
    device = next(model.parameters()).device
    model.train()
    for batch in islice(Feed(data.train, t, max_length=data.max_length), 4 * STEPS):
        _step(model, optimizer, chain.parameters(), batch.to(device))
        yield


def _step(model: nn.Module, optimizer: Any, parameters: list[nn.Parameter], batch: Batch) -> None:
    with record_function("step: forward"):
        loss = batch_loss(needed_logits(model, batch), batch)[0] / batch.labelled
    with record_function("step: backward"):
        loss.backward()
    with record_function("step: optimizer"):
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _kind(name: str, shapes: list[list[int]]) -> str:
    """By its name; products by their shapes, too. Spans of ours and of autograd are what is between operators."""
    lowered = name.lower()
    if not torch.cuda.is_available() and not lowered.startswith(("aten::", "cola_kernels::")):
        return OTHER
    kind = next((kind for kind, words in KINDS.items() if any(word in lowered for word in words)), OTHER)
    if kind == "products" and shapes:
        thin = min(size for shape in _matrices(shapes) for size in shape[-2:]) <= LOW_RANK
        return "products of the links" if thin else "products of the frozen weights and the head"
    return kind


def _matrices(shapes: list[list[int]]) -> list[list[int]]:
    return [shape for shape in shapes if len(shape) >= 2]


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    rows = result["rows"]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    lines = []
    for kind in kinds:
        line = [kind]
        for row in rows:
            seconds = row["kinds"].get(kind, 0.0)
            line += [f"{1e3 * seconds:.1f}", f"{seconds / sum(row['kinds'].values()):.1%}"]
        lines.append(line)
    header = [""] + [word for row in rows for word in (f"{row['case']}, ms", "share")]
    note = f"Mean of {STEPS} steps under the profiler; without it a step takes " + " and ".join(
        f"{1e3 * row['seconds_without_profiler']:.0f} ms" for row in rows
    )
    largest = [
        [
            row["case"],
            f"`{each['operator']}` {_sizes(each['shapes'])}",
            f"{each['calls']:.0f}",
            f"{1e3 * each['seconds']:.1f}",
        ]
        for row in rows
        for each in row["largest"]
    ]
    return {
        "profile-kinds": f"{markdown(header, lines)}\n\n{note}. {describe(result)}",
        "profile-largest": f"{markdown(['', 'operator', 'calls a step', 'ms a step'], largest)}\n\n{describe(result)}",
    }


def charts(result: Mapping[str, Any]) -> list[Chart]:
    rows = [(row["case"], [Bar(kind, 1e3 * s) for kind, s in row["kinds"].items()]) for row in result["rows"]]
    return [
        Chart(
            f"One step: {case}",
            "ms a step, under the profiler",
            [(bar.series, [Bar("ms", bar.value)]) for bar in bars],
            digits=0,
        )
        for case, bars in rows
    ]


def _sizes(shapes: list[list[int]]) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes[:3])

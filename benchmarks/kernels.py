"""How near is each kernel to the speed of memory or of the plain product?

**Bandwidth**: every memory-bound launch of a LoRA linear (S, dS and dB, dA, C0; with dropout and without), and merge_,
as the share of a measured copy's bandwidth. Bytes are the least that the product can move, not what the kernel moves.

**Products**: the large product of forward (Y) and backward (dX), with its low-rank term, over the plain product:

    addmm        C0 by our kernel, then cuBLAS adds to it in place
    gemm         our Triton GEMM with a seeded accumulator, in the configuration of the table, else the first candidate
    eager        cuBLAS, then addmm of the low-rank term into its result
    bordered     cuBLAS alone, on operands with the low-rank factors as R more columns: [x S] [W sB]ᵀ, [dY dS] [W; A].
                 A bound: making such operands is not timed

**Launching**: a forward and backward by Triton and by `small`, where the work is little: where do they cross?
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import cola_kernels
from cola_kernels import matmul, small, tune, tuning

from . import harness, layers
from .registry import Options
from .report import describe, markdown

LAYERS = ((4096, 4096), (14336, 4096), (2048, 2048), (1024, 4096), (4096, 14336), (8192, 2048))  # N, K
TOKENS, RANKS = 8192, (16, 64)
LITTLE = tuple(product((256, 512, 1024, 2048), ((2048, 2048), (4096, 4096))))  # M, (N, K)


_sample = partial(harness.sample, seconds=0.005)


def run(options: Options) -> dict[str, Any]:
    began = time.monotonic()
    sizes = ((48, 32),) if options.quick else LAYERS if options.full else LAYERS[:4]
    tokens = 32 if options.quick else TOKENS
    ranks = (4,) if options.quick else RANKS
    little = ((32, (48, 32)),) if options.quick else LITTLE
    rounds = 2 if options.quick else 9
    dtype = torch.bfloat16 if harness.device().type == "cuda" else torch.float16
    measured: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "done": 0}  # pieces of the work below
    measured |= {"copy": None, "bandwidth": [], "products": [], "launching": []}
    measured |= {key: options.found[key] for key in measured if key in options.found}
    measured["copy"] = measured["copy"] or _copy_bandwidth(options.quick, rounds)
    problems = [tune.Problem(tokens, n, k, rank, dtype) for rank, (n, k) in product(ranks, sizes)]
    work: list[tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = []
    for problem in problems:
        work.append(("products", partial(_products, problem, rounds)))
        work.append(("bandwidth", partial(_bandwidth, problem, rounds)))
    work.insert(2, ("launching", partial(_launching, little, dtype, rounds)))
    work.insert(3, ("bandwidth", partial(_merge, sizes, dtype, rounds)))
    seen = {row["name"] for kind in ("bandwidth", "products", "launching") for row in measured[kind]}
    for kind, rows in work[measured["done"] :]:
        if time.monotonic() - began > options.seconds:
            harness.say("time is up")
            break
        for row in rows():
            if row["name"] not in seen:
                seen.add(row["name"])
                harness.say(f"{kind}: {row['name']}")
                measured[kind].append(row)
        measured["done"] += 1
        options.keep(measured)
    return {**measured, "left": len(work) - measured["done"]}


# --- bandwidth --------------------------------------------------------------------------------------------------------


def _copy_bandwidth(quick: bool, rounds: int) -> dict[str, Any]:
    """Bytes read and written by a device-to-device copy, a second."""
    source = torch.randn(1 << (12 if quick else 28), device=harness.device())
    target = torch.empty_like(source)
    samples = _sample({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    seconds = harness.Spread.of(samples)
    return {"bytes": 2 * source.nbytes, "samples": samples, "bytes_per_second": 2 * source.nbytes / seconds.median}


def _bandwidth(problem: tune.Problem, rounds: int) -> Iterable[dict[str, Any]]:
    device = harness.device()
    inputs = tune.make_inputs(problem, device)
    count = layers.copies(min(inputs.x.nbytes, inputs.dy.nbytes))
    sets = [list(tune.jobs(i)) for i in [inputs, *(tune.make_inputs(problem, device) for _ in range(count - 1))]]
    for jobs in zip(*sets, strict=True):
        job = jobs[0]
        if job.key.startswith("gemm"):
            continue
        config = _configuration(job)
        work = harness.in_turn([partial(each.launch, config) for each in jobs])
        samples = _sample({"kernel": work}, rounds=rounds)["kernel"]
        yield {"name": job.key, "config": config, "least_bytes": job.least_bytes, "samples": samples}


def _configuration(job: tune.Job) -> Any:
    entries = tuning.table(tuning.gpu_name(harness.device()))
    return entries.get(job.key, job.candidates[0])


def _merge(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, rounds: int) -> Iterable[dict[str, Any]]:
    """W is read and written once."""
    for (n, k), rounding in product(sizes[:2], ("nearest", "stochastic")):
        weight, a, b = (torch.randn(*s, device=harness.device()).to(dtype) for s in ((n, k), (16, k), (n, 16)))
        count = layers.copies(weight.nbytes)
        weights = [weight, *(weight.clone() for _ in range(count - 1))]
        merges = [partial(cola_kernels.merge_, w, a, b, 1e-3, rounding=rounding) for w in weights]
        samples = _sample({"kernel": harness.in_turn(merges)}, rounds=rounds)["kernel"]
        moved = 2 * weight.nbytes + a.nbytes + b.nbytes
        yield {"name": f"merge_/{n}x{k}/R16/{rounding}", "config": None, "least_bytes": moved, "samples": samples}


# --- products ---------------------------------------------------------------------------------------------------------


def _products(problem: tune.Problem, rounds: int) -> Iterable[dict[str, Any]]:
    m, n, k, rank, _ = problem
    i = tune.make_inputs(problem, harness.device())
    for name, x, w, v in (("Y", i.x, i.weight.t(), i.lora_b.t()), ("dX", i.dy, i.weight, i.lora_a)):
        u = i.s
        sides = _ways(x, w, u, v)
        truth = {"C": x.double() @ w.double() + u.double() @ v.double()}
        eager = {"C": sides["eager"]()}  # not our reference, which rounds once less
        for way, side in sides.items():
            if way != "plain":
                harness.require_parity(f"{way}, {name}, {problem}", {"C": side()}, eager, truth)
        del truth, eager
        samples = _sample(sides, rounds=rounds)
        label = f"{name} {n}x{k}, M = {m}, R = {rank}"
        yield {"name": label, "multiply_adds": m * n * k, **harness.summarise(samples, "addmm")}


def _ways(x: Tensor, w: Tensor, u: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """C = X W + U V: x [M, L], w [L, P], u [M, R], v [R, P]."""
    transposed = w.stride(0) == 1  # a bordered weight lies in memory as the weight does
    bordered_x = torch.cat([x, u], dim=1)
    bordered_w = torch.cat([w.t(), v.t()], dim=1).t() if transposed else torch.cat([w, v])
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: torch.mm(x, w),
        "addmm": lambda: matmul.launch_seed(u, v, 1.0, 0.0, None).addmm_(x, w),
        "eager": lambda: torch.mm(x, w).addmm_(u, v),
        "bordered": lambda: torch.mm(bordered_x, bordered_w),
    }
    rank = tuning.rank_block(u.shape[1], u.dtype, matmul.MAX_RANK_BLOCK)
    shape = tuning.Shape(x.device, x.dtype, tuning.bucket(x.shape[0]), w.shape[1], rank, False)
    candidates = matmul.gemm_configs(shape, tuning.is_hopper(x.device))
    kept = tuning.table(tuning.gpu_name(x.device)).get(shape.key(matmul.gemm_name(w)))
    config = kept or next((c for c in candidates if c is not None), None)
    if config is not None:
        ways["gemm"] = lambda: matmul.run_gemm(config, x, w, u, v, 1.0, None)
    return ways


# --- launching --------------------------------------------------------------------------------------------------------


def _launching(
    little: Iterable[tuple[int, tuple[int, int]]], dtype: torch.dtype, rounds: int
) -> Iterable[dict[str, Any]]:
    for tokens, shape in little:
        problem = layers.Problem.draw([[shape]], tokens, 4 if tokens < 64 else 16, 0.0, dtype)
        ours, half = layers.ours(problem), layers.peft(problem, fp32_adapters=False)
        peft = layers.peft(problem)

        def forced(bound: int, side: layers.Side = ours, problem: layers.Problem = problem) -> Any:
            with patch.object(small, "LAUNCH_BOUND", bound):
                return side.passes(problem)

        work: dict[str, Callable[[], Any]] = {
            "frozen": partial(layers.frozen, problem),
            "triton": partial(forced, 0),
            "small": partial(forced, 1 << 62),
            "peft": partial(peft.passes, problem),
            "peft_half": partial(half.passes, problem),
        }
        for way, bound in (("triton", 0), ("small", 1 << 62)):
            with patch.object(small, "LAUNCH_BOUND", bound):
                layers.check(f"{way}: {shape}, {tokens} tokens", ours, problem)
        n, k = shape
        yield {"name": f"{n}x{k}, M = {tokens}", **harness.summarise(_sample(work, rounds=rounds), "small")}


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    copy = result["copy"]["bytes_per_second"]
    made = {
        "kernels-bandwidth": f"{_bandwidth_table(result['bandwidth'], copy)}\n\nA copy: {copy / 1e12:.2f} TB/s.",
        "kernels-products": _over(result["products"], "plain", ("addmm", "gemm", "eager", "bordered")),
        "kernels-launching": _over(result["launching"], "frozen", ("triton", "small", "peft", "peft_half")),
    }
    return {name: f"{table}\n\n{describe(result)}" for name, table in made.items()}


def _bandwidth_table(rows: Sequence[Mapping[str, Any]], copy: float) -> str:
    lines = []
    for row in rows:
        seconds = harness.Spread.of(row["samples"])
        speed = row["least_bytes"] / seconds.median
        low, high = row["least_bytes"] / seconds.q3, row["least_bytes"] / seconds.q1
        config = " ".join(f"{k}={v}" for k, v in (row["config"] or {}).items())
        spread = f"{speed / copy:.0%} ({low / copy:.0%} to {high / copy:.0%})"
        lines.append([row["name"], f"{1e6 * seconds.median:.1f}", f"{speed / 1e12:.2f}", spread, config])
    return markdown(["", "us", "TB/s", "share of a copy", "configuration"], lines)


def _over(rows: Sequence[Mapping[str, Any]], floor: str, names: Sequence[str]) -> str:
    lines = []
    for row in rows:
        line = [row["name"], f"{1e6 * row['seconds'][floor]['median']:.1f}"]
        for name in names:
            if name not in row["samples"]:
                line.append("")
                continue
            ratio = harness.Spread.of_ratio(row["samples"][name], row["samples"][floor])
            line.append(f"{ratio.median:.3f} ({ratio.q1:.3f} to {ratio.q3:.3f})")
        lines.append(line)
    return markdown(["", f"{floor}, us", *(f"{name} / {floor}" for name in names)], lines)

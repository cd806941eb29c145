"""Time every candidate configuration on this machine's GPU and keep the fastest, in a table that the launchers read.

    python -m cola_kernels.tune [--tokens 8192,2048,512,16384] [--ranks 16,32,64,128] [--dtype bfloat16]
                                [--layers 4096x4096,1024x4096,...]        each N x K: out_features x in_features
                                [--output DIR] [--seconds 120] [--jobs 8]

The table goes to the cache folder of backend.py unless --output names another; entries it already has for other shapes
stay. A candidate replaces the rule's choice only if it is faster by more than the noise of timing. Kernels are compiled
by several processes first, then timed by one alone. The shapes are taken in the order given, and the table is written
after each, so that one cut short by --seconds holds the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import backend, matmul, skinny
from .tuning import Shape, bucket, gpu_name, is_hopper, rank_block, table_name

LAYERS = "4096x4096,1024x4096,14336x4096,4096x14336,2048x2048,512x2048,8192x2048,2048x8192"  # Llama 3.1 8B, 3.2 1B
NOISE = 0.02
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of one call


class Job(NamedTuple):
    """One entry of the table: `launch(config)` runs its kernel, which moves at least `least_bytes`."""

    key: str
    candidates: list[Any]
    launch: Callable[[Any], Any]
    least_bytes: int


class Problem(NamedTuple):
    """One layer at one number of tokens."""

    m: int
    n: int
    k: int
    rank: int
    dtype: torch.dtype


class Inputs(NamedTuple):
    """The operands of one problem."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    s: Tensor
    dy: Tensor
    seed: Tensor


def make_inputs(problem: Problem, device: torch.device) -> Inputs:
    m, n, k, rank, dtype = problem

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    seed = torch.zeros((), dtype=torch.int64, device=device)
    return Inputs(normal(m, k), normal(n, k), normal(rank, k), normal(n, rank), normal(m, rank), normal(m, n), seed)


def jobs(i: Inputs) -> Iterator[Job]:
    """What the forward and backward of one layer launch, with dropout and without."""
    rank = i.lora_a.shape[0]
    for dropout, seed in ((0.0, None), (0.1, i.seed)):
        shape = Shape.of(i.x, rank_block(rank, i.x.dtype, skinny.MAX_RANK_BLOCK), seed)
        run = _with_config(skinny.run_project, i.x, i.lora_a, 1.0, dropout, seed)
        yield Job(shape.key("project"), skinny.project_configs(shape), run, _bytes(i.x, i.lora_a, i.s))
        run = _with_config(skinny.run_factor_grad, i.s, i.x, dropout, seed, i.x.dtype)
        yield Job(shape.key("factor_grad"), skinny.factor_grad_configs(shape), run, _bytes(i.s, i.x, i.lora_a))
    shape = Shape.of(i.dy, rank_block(rank, i.dy.dtype, skinny.MAX_RANK_BLOCK_OUTPUT), None)
    run = _with_config(skinny.run_output_grads, i.dy, i.lora_b, i.s, 1.0, i.dy.dtype)
    moved = _bytes(i.dy, i.lora_b, i.s, i.s, i.lora_b)
    yield Job(shape.key("output_grads"), skinny.output_grads_configs(shape, is_hopper(i.dy.device)), run, moved)
    forward, backward = (i.x, i.weight.t(), i.s, i.lora_b.t()), (i.dy, i.weight, i.s, i.lora_a)
    for operands, dropout, seed in ((forward, 0.0, None), (backward, 0.0, None), (backward, 0.1, i.seed)):
        yield from _matmul_jobs(operands, dropout, seed)


def _matmul_jobs(operands: tuple[Tensor, ...], dropout: float, seed: Tensor | None) -> Iterator[Job]:
    x, w, u, v = operands
    rank = rank_block(u.shape[1], u.dtype, matmul.MAX_RANK_BLOCK)
    shape = Shape(x.device, x.dtype, bucket(x.shape[0]), w.shape[1], rank, seed is not None)
    run = _with_config(matmul.run_seed, u, v, 1.0, dropout, seed)
    written = x.shape[0] * w.shape[1] * x.element_size()
    yield Job(shape.key("seed"), matmul.seed_configs(shape, is_hopper(x.device)), run, _bytes(u, v) + written)

    def product(config: Any) -> Tensor:
        if config is None:
            return matmul.launch_seed(u, v, 1.0, dropout, seed).addmm_(x, w)
        return matmul.run_gemm(config, x, w, u, v, 1.0, None)

    candidates = matmul.gemm_configs(shape, is_hopper(x.device))
    if len(candidates) > 1:
        yield Job(shape.key(matmul.gemm_name(w)), candidates, product, _bytes(x, w, u, v) + written)


def _with_config(run: Callable[..., Any], *operands: Any) -> Callable[[Any], Any]:
    return lambda config: run(config, *operands)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def fastest(job: Job, timer: Timer) -> tuple[Any, float]:
    """The configuration to keep, and its milliseconds. One that this GPU cannot run loses."""
    best, best_time = job.candidates[0], timer(lambda: job.launch(job.candidates[0]))
    for config in job.candidates[1:]:
        try:
            time = timer(partial(job.launch, config))
        except triton.TritonError:
            continue
        if time < best_time * (1 - NOISE):
            best, best_time = config, time
    return best, best_time


def write_table(folder: Path, gpu: str, entries: dict[str, Any], milliseconds: dict[str, float]) -> Path:
    """Merge into the GPU's table in `folder`, replacing the file at once."""
    path = folder / table_name(gpu)
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "entries": {**old.get("entries", {}), **entries},
        "milliseconds": {**old.get("milliseconds", {}), **milliseconds},
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(f".{os.getpid()}")
    partial_path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial_path.replace(path)
    return path


def compile_kernels(problems: list[Problem], device: torch.device, jobs: int) -> None:
    """Fill Triton's cache on disk from several processes, since one alone compiles longer than it measures."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_share, range(jobs), *zip(*[(jobs, problems, device)] * jobs, strict=True)))


def _compile_share(worker: int, workers: int, problems: list[Problem], device: torch.device) -> None:
    """Launch once every kernel that falls to this worker. Kernels do not depend on the sizes of M, K and N."""
    seen = set()
    for problem in problems:
        for job in jobs(make_inputs(problem, device)):
            kernel = re.sub(r"/[MCL]\d+", "", job.key)
            for config in job.candidates:
                name = f"{kernel} {config}"
                if name not in seen and zlib.crc32(name.encode()) % workers == worker:
                    with contextlib.suppress(triton.TritonError):  # `fastest` will meet it again
                        job.launch(config)
                seen.add(name)


def tune(
    problems: Iterable[Problem], device: torch.device, timer: Timer, seconds: float
) -> Iterator[tuple[Job, Any, float]]:
    """For each problem's jobs the configuration to keep and its milliseconds, until `seconds` have passed."""
    began = time.monotonic()
    done = set()
    for problem in problems:
        for job in jobs(make_inputs(problem, device)):
            if time.monotonic() - began > seconds:
                return
            if job.key not in done:
                done.add(job.key)
                yield job, *fastest(job, timer)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cola_kernels.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default=LAYERS)
    parser.add_argument("--tokens", default="8192,2048,512,16384")
    parser.add_argument("--ranks", default="16,32,64,128")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--output", type=Path, default=backend.CACHE, help="folder of the table")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="for all of it; what is missing then is left out"
    )
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or backend.INTERPRET):
        parser.error("no GPU is visible, so there is nothing to tune")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = [tuple(map(int, layer.split("x"))) for layer in options.layers.split(",")]
    tokens, ranks = (list(map(int, text.split(","))) for text in (options.tokens, options.ranks))
    dtype = getattr(torch, options.dtype)
    problems = [Problem(m, n, k, rank, dtype) for rank, m, (n, k) in itertools.product(ranks, tokens, layers)]
    began = time.monotonic()
    if options.jobs > 1:
        compile_kernels(problems, device, options.jobs)
    entries: dict[str, Any] = {}
    milliseconds: dict[str, float] = {}
    timer = _bench if device.type == "cuda" else _bench_interpreter
    path = write_table(options.output, gpu_name(device), entries, milliseconds)
    left = options.seconds - (time.monotonic() - began)
    for job, config, taken in tune(problems, device, timer, left):
        entries[job.key], milliseconds[job.key] = config, taken
        write_table(options.output, gpu_name(device), entries, milliseconds)
        print(f"{taken:9.4f} ms  {job.key}  {config}", flush=True)
    print(f"wrote {path}")
    return 0


def _bench(call: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(call, warmup=5, rep=15, return_mode="median"))


def _bench_interpreter(call: Callable[[], Any]) -> float:
    """For rehearsals: what it finds says nothing about a GPU."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())

"""Time every candidate configuration on this machine's GPU and keep the fastest, in a table that the launchers read.

    python -m cola_kernels.tune [--tokens 512,2048,8192,16384] [--ranks 16,64] [--dtype bfloat16] [--output DIR]
                                [--layers 4096x4096,1024x4096,...]        each N x K: out_features x in_features

The table goes to the cache folder of backend.py unless --output names another; entries it already has for other shapes
stay. A candidate replaces the rule's choice only if it is faster by more than the noise of timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import backend, matmul, skinny
from .tuning import Shape, bucket, gpu_name, rank_block, table_name

LAYERS = "4096x4096,1024x4096,14336x4096,4096x14336,2048x2048,512x2048,8192x2048,2048x8192"  # Llama 3.1 8B, 3.2 1B
NOISE = 0.02
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of one call


class Job(NamedTuple):
    """One entry of the table: `launch(config)` runs its kernel."""

    key: str
    candidates: list[Any]
    launch: Callable[[Any], Any]


class Inputs(NamedTuple):
    """The operands of one layer at one number of tokens."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    s: Tensor
    dy: Tensor
    seed: Tensor


def make_inputs(m: int, n: int, k: int, rank: int, dtype: torch.dtype, device: torch.device) -> Inputs:
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
        yield Job(shape.key("project"), skinny.project_configs(shape), run)
        run = _with_config(skinny.run_factor_grad, i.s, i.x, dropout, seed, i.x.dtype)
        yield Job(shape.key("factor_grad"), skinny.strip_configs(shape), run)
    shape = Shape.of(i.dy, rank_block(rank, i.dy.dtype, skinny.MAX_RANK_BLOCK_OUTPUT), None)
    run = _with_config(skinny.run_output_grads, i.dy, i.lora_b, i.s, 1.0, i.dy.dtype)
    yield Job(shape.key("output_grads"), skinny.strip_configs(shape), run)
    forward, backward = (i.x, i.weight.t(), i.s, i.lora_b.t()), (i.dy, i.weight, i.s, i.lora_a)
    for operands, dropout, seed in ((forward, 0.0, None), (backward, 0.0, None), (backward, 0.1, i.seed)):
        yield from _matmul_jobs(operands, dropout, seed)


def _matmul_jobs(operands: tuple[Tensor, ...], dropout: float, seed: Tensor | None) -> Iterator[Job]:
    x, w, u, v = operands
    rank = rank_block(u.shape[1], u.dtype, matmul.MAX_RANK_BLOCK)
    shape = Shape(x.device, x.dtype, bucket(x.shape[0]), w.shape[1], rank, seed is not None)
    run = _with_config(matmul.run_seed, u, v, 1.0, None, dropout, seed)
    yield Job(shape.key("seed"), matmul.seed_configs(shape), run)

    def product(config: Any) -> Tensor:
        if config is None:
            return matmul.launch_seed(u, v, 1.0, None, dropout, seed).addmm_(x, w)
        return matmul.run_gemm(config, x, w, u, v, 1.0, None)

    candidates = matmul.gemm_configs(shape, matmul.has_tma(x.device))
    if len(candidates) > 1:
        yield Job(shape.key(f"gemm/L{x.shape[1]}"), candidates, product)


def _with_config(run: Callable[..., Any], *operands: Any) -> Callable[[Any], Any]:
    return lambda config: run(config, *operands)


def fastest(job: Job, timer: Timer) -> tuple[Any, float]:
    """The configuration to keep, and its milliseconds. One that this GPU cannot run loses."""
    best, best_time = job.candidates[0], timer(lambda: job.launch(job.candidates[0]))
    for config in job.candidates[1:]:
        try:
            time = timer(partial(job.launch, config))
        except triton.runtime.errors.OutOfResources:
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cola_kernels.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default=LAYERS)
    parser.add_argument("--tokens", default="512,2048,8192,16384")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--output", type=Path, default=backend.CACHE, help="folder of the table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU is visible, so there is nothing to tune")
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    layers = [tuple(map(int, layer.split("x"))) for layer in options.layers.split(",")]
    tokens, ranks = (list(map(int, text.split(","))) for text in (options.tokens, options.ranks))
    entries: dict[str, Any] = {}
    milliseconds: dict[str, float] = {}
    for (n, k), m, rank in itertools.product(layers, tokens, ranks):
        for job in jobs(make_inputs(m, n, k, rank, dtype, device)):
            if job.key not in entries:
                entries[job.key], milliseconds[job.key] = fastest(job, _bench)
                print(f"{milliseconds[job.key]:9.4f} ms  {job.key}  {entries[job.key]}", flush=True)
    print(f"wrote {write_table(options.output, gpu_name(device), entries, milliseconds)}")
    return 0


def _bench(call: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median"))


if __name__ == "__main__":
    sys.exit(main())

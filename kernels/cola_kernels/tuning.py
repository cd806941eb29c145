"""Launch configurations: from a tuned table where there is one for this GPU and shape, else from a rule.

A kernel lists at most eight candidates for a shape, its best guess first: that guess is the rule. `python -m
cola_kernels.tune` times them and writes a table; nothing is timed while a model runs, so a run is reproducible and
can be captured in a CUDA graph. Tables are JSON, one a GPU, {"entries": {key: config}}; a user's own, in the cache
folder of backend.py, wins over the one in this package.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend

Config = dict[str, int]  # block sizes, num_warps and num_stages: keyword arguments of a launch
PACKAGED = Path(__file__).with_name("tables")


class Shape(NamedTuple):
    """What a choice depends on. `m` is a bucket, the power of two at or above M; `rank` is a block's, padded."""

    device: torch.device
    dtype: torch.dtype
    m: int
    columns: int
    rank: int
    dropout: bool

    @classmethod
    def of(cls, matrix: Tensor, rank: int, seed: Tensor | None) -> Shape:
        m, columns = matrix.shape
        return cls(matrix.device, matrix.dtype, bucket(m), columns, rank, seed is not None)

    def key(self, kernel: str) -> str:
        dropout = "dropout" if self.dropout else "plain"
        return f"{kernel}/{str(self.dtype).removeprefix('torch.')}/M{self.m}/C{self.columns}/R{self.rank}/{dropout}"


def bucket(m: int) -> int:
    return min(power_of_two(m, at_least=16), 1 << 16)


def power_of_two(n: int, at_least: int) -> int:
    """The smallest power of two not below n or `at_least`."""
    return max(at_least, 1 << (n - 1).bit_length())


def cdiv(n: int, block: int) -> int:
    """triton.cdiv on the host takes ten times as long: a launch's time is counted in microseconds."""
    return -(-n // block)


def choose(kernel: str, candidates: Callable[[Shape], list[Any]], shape: Shape) -> Any:
    """The tuned configuration of `kernel` for this shape, or the first candidate."""
    tuned, config = _lookup(kernel, shape)
    return config if tuned else candidates(shape)[0]


@functools.cache
def _lookup(kernel: str, shape: Shape) -> tuple[bool, Any]:
    entries = table(gpu_name(shape.device)) if backend.TUNED else {}
    key = shape.key(kernel)
    return key in entries, entries.get(key)


def table(gpu: str) -> dict[str, Any]:
    """The entries for one GPU: this package's, overlaid with the user's."""
    entries: dict[str, Any] = {}
    for folder in (PACKAGED, backend.CACHE):
        path = folder / table_name(gpu)
        if path.is_file():
            entries.update(json.loads(path.read_text(encoding="utf-8"))["entries"])
    return entries


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """NVIDIA's Hopper or newer: TMA, and tensor cores that read their operands from shared memory."""
    if device.type != "cuda":
        return backend.INTERPRET
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= 9


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def table_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def rank_block(rank: int, dtype: torch.dtype, largest: int) -> int:
    """How much of the rank one product takes: padded to a power of two that the tensor cores take, cut at `largest`.

    fp32 is multiplied without tensor cores, in code unrolled over the block, and so is cut at 32.
    """
    return min(power_of_two(rank, at_least=16), 32 if dtype == torch.float32 else largest)

"""Memory that runs out while a run is training: one sentence, with the nearest settings that would fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .. import world
from ..config import Config
from ..errors import UserError
from .models import resolve_device
from .plan import plan_run, size_of

SAFE = 0.9  # of the memory there is: libraries and the allocator hold some beside tensors


@contextmanager
def told(config: Config) -> Iterator[None]:
    """Raises UserError instead of whatever says that there is no memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        rows = config.train.batch_size
        raise UserError(
            f"Memory ran out with train.batch_size {rows}: {_advice(config)} The run folder is at its last saved "
            "state; with another `out`, these settings begin anew."
        ) from error


def is_shortage(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text


def _advice(config: Config) -> str:
    """What the memory model says of smaller batches, with the same rows a step, and of recomputed activations."""

    there = available(resolve_device(config.model.device))
    try:
        for smaller in _smaller(config):
            need = plan_run(smaller).need.peak
            if need is not None and need < SAFE * there:
                t = smaller.train
                keys = f"train.batch_size={t.batch_size} train.accumulation={t.accumulation}"
                keys += " train.activation_checkpointing=true" if t.activation_checkpointing else ""
                return f"{keys} needs about {size_of(need)} of the {size_of(there)} there are, for the same steps."
    except Exception:  # advice must not hide what has happened
        return "lower train.batch_size and raise train.accumulation, or set train.activation_checkpointing."
    return (
        f"one row is too much for the {size_of(there)} there are: lower data.max_length, set model.load_in_4bit, or "
        "take a smaller model."
    )


def _smaller(config: Config) -> Iterator[Config]:
    """Each at most half as many rows a forward pass as the one before, and the same rows a step; at last with
    recomputed activations too."""
    t = config.train
    total, rows = t.batch_size * t.accumulation, t.batch_size
    sizes = []
    while rows > 1:
        rows = next(n for n in range(rows // 2, 0, -1) if total % n == 0 and total // n % world.size() == 0)
        sizes.append(rows)
    for checkpointing in sorted({t.activation_checkpointing, True}):
        for rows in sizes if checkpointing == t.activation_checkpointing else [t.batch_size, *sizes]:
            train = replace(t, batch_size=rows, accumulation=total // rows, activation_checkpointing=checkpointing)
            yield replace(config, train=train)


def available(device: torch.device) -> int:
    """Bytes that this process may have on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        import resource
    except ImportError:  # Windows
        return there
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return there if limit == resource.RLIM_INFINITY else min(there, limit)

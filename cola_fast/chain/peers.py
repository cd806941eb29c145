"""Somebody's own training loop in several processes: DistributedDataParallel, accelerate, or all_reduce by hand.

Each process has a chain of its own, and they must stay the same. Nothing here shares gradients; it is looked at whether
somebody did. One process writes for all. `world` is another thing: the processes of `cola train`, which share the work
themselves.

Values go through the store that the processes met at, and not through a collective, which would wait for a process that
never comes, or mix with those of a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from .. import world
from ..errors import UserError

PATIENCE = timedelta(minutes=10)  # for the others to come to the same call

_calls = 0


def count() -> int:
    """The processes of the loop; 1 in `cola train`, whose own are none of it."""
    alone = world.size() > 1 or not (dist.is_available() and dist.is_initialized())
    return 1 if alone else dist.get_world_size()


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def exchange(value: str, what: str) -> list[str]:
    """What each of the processes has given, by rank. All have to call it.

    Raises UserError if some do not come; `what` is what they were to do.
    """
    global _calls
    if count() == 1:
        return [value]
    from torch.distributed.distributed_c10d import _get_default_store

    _calls += 1
    store, keys = _get_default_store(), [f"cola_fast/{_calls}/{r}" for r in range(count())]
    store.set(keys[rank()], value)
    try:
        store.wait(keys, PATIENCE)
    except dist.DistStoreError as error:
        raise UserError(
            f"Not all of the {count()} processes came to {what} within {PATIENCE.total_seconds():g} s: call it in each "
            "of them."
        ) from error
    return [store.get(key).decode() for key in keys]


@contextmanager
def together(what: str) -> Iterator[None]:
    """All processes leave this block, or none: the first one's UserError is everybody's."""
    sentence, error = "", None
    try:
        yield
    except UserError as raised:
        sentence, error = str(raised), raised
    found = next(filter(None, exchange(sentence, what)), None)
    if found is not None:
        raise error or UserError(found)


def require_writer(folder: object) -> None:
    if rank() > 0:
        raise UserError(
            f"Process {rank()} of {count()} was to write to {folder}, but one writes for all: call save() only where "
            "torch.distributed.get_rank() is 0. tie() and extend() are for all of them."
        )

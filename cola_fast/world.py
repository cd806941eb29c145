"""One run in several processes, as `torchrun` and `accelerate launch` start them. In one process this does nothing.

Every process (rank) runs the same code on the same state: the same links, optimizer, data order. They differ in the
forward passes they take. Rank 0 alone touches the disk: the others wait for it, and fail as it fails (`lead`), so that
no rank goes on alone and none is left waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
MEETING = timedelta(minutes=1)  # for all processes to come together: a launcher starts them at the same time
PATIENCE = timedelta(hours=1)  # for a rank 0 that prepares data; a process that has died is noticed at once

_rank, _size = 0, 1


class Told(UserError):
    """Another rank's UserError: that one says it to the user."""


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that a launcher has started; nothing happens without one, or inside another `joined`.

    The launcher's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) is read here and in `device`.

    Raises UserError if the processes do not come together within a minute, or if one of them dies.
    """
    global _rank, _size
    if _size > 1 or int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield
        return
    import torch
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        if torch.cuda.is_available():
            torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
        _meet("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _rank, _size = dist.get_rank(), dist.get_world_size()
    try:
        yield
        dist.barrier()  # who goes first closes connections that others may still be using
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise UserError(
            "Another process of this run has ended, and this one cannot go on alone: see what that one said, and start "
            "all of them again; they go on from the last saved state."
        ) from error
    finally:
        _rank, _size = 0, 1
        if ours:
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from torch.distributed.rendezvous import rendezvous

    count = os.environ["WORLD_SIZE"]
    try:
        store, number, size = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=MEETING)
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {count}, as a launcher of processes sets it, but the rest of "
            f"what it sets is missing ({error}): start them with torchrun, or unset WORLD_SIZE."
        ) from None
    except RuntimeError as error:  # of another kind where a port is taken, nobody listens, or one has died on the way
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"The {count} processes of this run did not come together at {place} within {MEETING.seconds} s "
            f"({str(error).splitlines()[0]}): see what the others said, or choose another port, and start all again."
        ) from error
    _set_pg_timeout(PATIENCE, dist.group.WORLD)


def _is_loss(error: RuntimeError) -> bool:
    """Whether it is a process that the others have lost. Gloo has no kind of error of its own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def rank() -> int:
    return _rank


def size() -> int:
    return _size


def is_main() -> bool:
    """Rank 0: it writes, and talks to the user."""
    return _rank == 0


def device(name: str) -> str:
    """`model.device` for this process: a GPU of its own where the name leaves open which.

    Raises UserError for a GPU by number, which all processes would share.
    """
    if _size == 1 or name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"model.device is {name}, but each of {_size} processes needs its own: use auto, cuda or cpu.")
    import torch

    return f"cuda:{_local_rank()}" if torch.cuda.is_available() else name


def lead(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only. Every rank returns its result (a copy, by pickle), or raises its UserError."""
    if _size == 1:
        return action()
    import torch.distributed as dist

    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    error: UserError | None = None
    if _rank == 0:
        try:
            outcome = [(action(), None)]
        except UserError as raised:
            outcome, error = [(None, str(raised))], raised
    dist.broadcast_object_list(outcome)
    result, sentence = outcome[0]
    if sentence is not None:
        raise error or Told(sentence)
    return result  # type: ignore[return-value]


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave this block, or none: the first one's UserError is everybody's. The block itself must not
    communicate before what may fail on some ranks only."""
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        if _size == 1:
            raise
        error = raised
    if _size == 1:
        return
    import torch.distributed as dist

    sentences: list[str | None] = [None] * _size
    dist.all_gather_object(sentences, None if error is None else str(error))
    found = next((i for i, sentence in enumerate(sentences) if sentence is not None), None)
    if found is not None:
        raise error if error is not None and found == _rank else Told(sentences[found])


def sum_(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over all ranks, in place and with one message; all on one device."""
    if _size == 1:
        return
    import torch
    import torch.distributed as dist

    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(total.view_as(tensor))


def anyone(flag: bool) -> bool:
    """Whether it is set on any rank."""
    if _size == 1:
        return flag
    import torch

    count = torch.tensor([float(flag)])  # on the CPU: no GPU is waited for
    sum_([count])
    return bool(count)


def dealt(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """This rank's items, one of each `size`, and whether they count. All ranks get equally many, since a forward pass
    of a sharded model needs all of them: at the end some get an item again that another one counts."""
    turn: list[T] = []
    for item in items:
        turn.append(item)
        if len(turn) == _size:
            yield turn[_rank], True
            turn = []
    if turn:
        yield turn[min(_rank, len(turn) - 1)], _rank < len(turn)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", _rank))

"""Trains in child processes and kills them. Run by test_crash.py and test_world.py, talks JSON lines over stdin and
stdout.

Everything heavy is imported once; each command forks a child, so a run starts in milliseconds and dies for real.

    {"config": path}                            run to the end
    {"config": path, "kill_at_operation": n}    SIGKILL just before the n-th operation below
    {"config": path, "kill_after": seconds}     SIGKILL at that moment
    {"config": path, "processes": 2, "rank": 1, "kill_at_operation": n}
                                                one run in two processes; that rank is killed
    {..., "kill_at_file": "links/.001"}         SIGKILL amid writing the first file with that in its path
    {..., "full_at_file": "links/.001"}         the disk is full then
    {..., "double": true}                       in fp64

Answers {"killed": bool, "codes": [int], "code": the worst, "operations": [n], "folds": [which operations of the first
rank fold a module], "refusals": [UserError or null], "rows": [rows folded by each rank], "seconds": s}. Operations are
what a power cut can fall between: every fsync and rename, every half-written file, and every module that is folded.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch

torch.set_num_threads(1)

import datasets  # noqa: F401
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers

from cola_fast import UserError, config, store
from cola_fast.chain import bases
from cola_fast.layers import layer
from cola_fast.layers.weights import dense
from cola_fast.methods import INIT
from cola_fast.training import plot, prepare, trainer

transformers.utils.logging.disable_progress_bar()
plot.draw = lambda run: run  # slow, and not what is tested here


def count_operations(
    kill_at: int | None, kill_file: str | None, full_file: str | None
) -> Callable[[], tuple[int, list[int]]]:
    """A function that says how many operations were done, and which of them were folds."""
    done = 0
    folds: list[int] = []

    def tick() -> None:
        nonlocal done
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            if function.__name__ == "fold":
                folds.append(done)
            tick()
            return function(*args, **keys)

        return call

    class Os:  # only what the store does counts, not what libraries do in their caches
        def __getattr__(self, name: str) -> Any:
            found = getattr(os, name)
            return counted(found) if name in ("fsync", "replace", "rename") else found

    store.os = Os()  # type: ignore[assignment]
    for base in (bases.DenseBase, bases.LedgerBase):
        base.fold = counted(base.fold)  # type: ignore[method-assign]
    whole = store._write_synced

    def in_halves(path: Path, data: bytes) -> None:
        kills = kill_file is not None and kill_file in str(path)
        if done == kill_at or kills:
            path.write_bytes(data[: len(data) // 2])
        if kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if full_file is not None and full_file in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        tick()
        whole(path, data)

    store._write_synced = in_halves
    return lambda: (done, folds)


def run(command: dict[str, Any]) -> dict[str, Any]:
    count = command.get("processes", 1)
    started = time.monotonic()
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    children: dict[int, int] = {}
    pipes = []
    for rank in range(count):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ.update(launch, RANK=str(rank), LOCAL_RANK=str(rank))
            train(command, rank, write)
        os.close(write)
        children[child] = rank
        pipes.append(read)
    if "kill_after" in command:
        time.sleep(command["kill_after"])
        os.kill(next(iter(children)), signal.SIGKILL)
    statuses = [0] * count
    while children:
        child, status = os.wait()
        statuses[children.pop(child)] = status
        if os.WIFSIGNALED(status):  # the others notice that it is gone, without a launcher that ends them
            signal.alarm(300)  # a hang, however busy the machine
    signal.alarm(0)
    answers = [json.loads(os.read(read, 1 << 16) or b"{}") for read in pipes]
    for read in pipes:
        os.close(read)
    codes = [os.waitstatus_to_exitcode(status) for status in statuses]
    return {
        "killed": any(map(os.WIFSIGNALED, statuses)),
        "codes": codes,
        "code": max(codes, key=abs),
        "operations": [answer.get("operations", 0) for answer in answers],
        "folds": answers[0].get("folds", []),
        "refusals": [answer.get("refusal") for answer in answers],
        "rows": [answer.get("rows", 0) for answer in answers],
        "seconds": time.monotonic() - started,
    }


def train(command: dict[str, Any], rank: int, answer: int) -> NoReturn:
    chosen = command.get("rank", 0) == rank
    keys = ("kill_at_operation", "kill_at_file", "full_at_file")
    operations, rows = count_operations(*(command.get(key) if chosen else None for key in keys)), count_rows()
    refusal, code = None, 1
    if command.get("double"):
        load, kaiming = prepare.load_model, INIT["kaiming"]
        prepare.load_model = lambda *given: load(*given).double()
        INIT["kaiming"] = lambda site: kaiming(replace(site, dtype=torch.float32))  # the same numbers drawn
        layer.LoRALinear.open = in_double(layer.LoRALinear.open)  # type: ignore[method-assign]
    try:
        trainer.train(config.load(command["config"]), quiet=True)
        code = 0
    except UserError as error:
        refusal, code = str(error), 2
    finally:
        done, folds = operations()
        found = {"operations": done, "folds": folds, "refusal": refusal, "rows": rows()}
        os.write(answer, json.dumps(found).encode())
        os._exit(code)


def in_double(opens: Callable[..., None]) -> Callable[..., None]:
    def call(self: Any, a: torch.Tensor, b: torch.Tensor, **keys: Any) -> None:
        opens(self, a.double(), b.double(), **keys)

    return call


def count_rows() -> Callable[[], int]:
    """Of all weights, those that this process has folded links into."""
    done = 0
    merge = dense.merge_

    def counted(weight: torch.Tensor, *args: Any, **keys: Any) -> Any:
        nonlocal done
        done += len(weight)
        return merge(weight, *args, **keys)

    dense.merge_ = counted  # type: ignore[assignment]
    return lambda: done


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    warm = False
    for line in sys.stdin:
        command = json.loads(line)
        if not warm:  # most of a short run is transformers' lazy imports: have them before the first fork
            settings = config.load(command["config"]).model
            prepare.load_model(settings), trainer.load_tokenizer(settings)
            warm = True
        print(json.dumps(run(command)), flush=True)

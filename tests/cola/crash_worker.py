"""Trains in child processes and kills them. Run by test_crash.py, talks JSON lines over stdin and stdout.

Everything heavy is imported once; each command forks a child, so a run starts in milliseconds and dies for real.

    {"config": path}                            run to the end
    {"config": path, "kill_at_operation": n}    SIGKILL just before the n-th operation below
    {"config": path, "kill_after": seconds}     SIGKILL at that moment

Answers {"killed": bool, "code": int, "operations": n, "seconds": s}. Operations are what a power cut can fall between:
every fsync and rename, every half-written file, and every module that is folded.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch

torch.set_num_threads(1)

import datasets  # noqa: F401
import transformers

from cola_fast import bases, config, plot, store, trainer

transformers.utils.logging.disable_progress_bar()
plot.draw = lambda run: run  # slow, and not what is tested here


def count_operations(kill_at: int | None) -> Callable[[], int]:
    done = 0

    def tick() -> None:
        nonlocal done
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            tick()
            return function(*args, **keys)

        return call

    class Os:  # only what the store does counts, not what libraries do in their caches
        def __getattr__(self, name: str) -> Any:
            found = getattr(os, name)
            return counted(found) if name in ("fsync", "replace", "rename") else found

    store.os = Os()  # type: ignore[assignment]
    for base in (bases.DenseBase, bases.NF4Base, bases.LedgerBase):
        base.fold = counted(base.fold)  # type: ignore[method-assign]
    whole = store._write_synced

    def in_halves(path: Path, data: bytes) -> None:
        if done == kill_at:
            path.write_bytes(data[: len(data) // 2])
        tick()
        whole(path, data)

    store._write_synced = in_halves
    return lambda: done


def run(command: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        operations = count_operations(command.get("kill_at_operation"))
        code = 1
        try:
            trainer.train(config.load(command["config"]), quiet=True)
            code = 0
        finally:
            os.write(write, str(operations()).encode())
            os._exit(code)
    os.close(write)
    if "kill_after" in command:
        time.sleep(command["kill_after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    counted = os.read(read, 100).decode()
    os.close(read)
    return {
        "killed": os.WIFSIGNALED(status),
        "code": os.waitstatus_to_exitcode(status),
        "operations": int(counted or 0),
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    warm = False
    for line in sys.stdin:
        command = json.loads(line)
        if not warm:  # most of a short run is transformers' lazy imports: have them before the first fork
            settings = config.load(command["config"]).model
            trainer.load_model(settings), trainer.load_tokenizer(settings)
            warm = True
        print(json.dumps(run(command)), flush=True)

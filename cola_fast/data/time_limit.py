"""A limit for Python code that came with a file, such as a chat template: so much CPU time, so much memory.

A thread looks on and raises `Exceeded` in the one that runs the code, at its next loop or call. That reaches neither
other threads nor one long operation in C.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError

SECONDS = 20.0  # of CPU time
MEMORY = 2 << 30  # bytes


class Exceeded(UserError):
    def __init__(self) -> None:
        super().__init__(f"It takes more than {SECONDS:g} s of computing, or more than {MEMORY / 2**30:g} GiB.")


class Watch:
    """`with watching() as watch: ...; watch.restart()` gives each row the whole limit."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.restart()

    def restart(self) -> None:
        self.since, self.peak = time.process_time(), _peak_memory()

    def look(self, thread: int) -> None:
        while not self.done.wait(0.05):
            if time.process_time() - self.since > SECONDS or _peak_memory() - self.peak > MEMORY:
                # again and again: code that catches it (a filter may, of its argument) goes no further
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Exceeded))


@contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch()
    looker = threading.Thread(target=watch.look, args=(threading.get_ident(),), daemon=True)
    looker.start()
    try:
        yield watch
    finally:
        watch.done.set()
        looker.join()


def _peak_memory() -> int:
    """Of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

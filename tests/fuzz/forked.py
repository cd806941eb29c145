"""Run something in a child process that may crash or hang, and see how it ended. Everything heavy is imported once, by
the parent, so a child starts in milliseconds."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

SECONDS = 120  # after which a child hangs
MEMORY = 12 << 30  # bytes of address space: what wants more has run away
NAMES = {signal.SIGALRM: "it hangs", signal.SIGSEGV: "it crashes (SIGSEGV)", signal.SIGKILL: "it was killed"}


@dataclass(frozen=True)
class Outcome:
    code: int | None  # what the function returned as exit code; None if it raised or died
    said: str  # all of stdout and stderr
    result: Any = None  # what the child's `keep` returned after it
    death: str | None = None  # how it died

    @property
    def lines(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("cola: ")]


def run(function: Callable[[], int], keep: Callable[[], Any] = lambda: None) -> Outcome:
    """function: returns an exit code. keep: looks at what it has done if that is 0, in the same child."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            _be_child(function, keep, output.fileno(), answer)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Outcome(None, said, death=NAMES.get(signal.Signals(number), f"signal {number}"))
        answer.seek(0)
        code, result = pickle.load(answer)
        return Outcome(code, said, result)


def _be_child(function: Callable[[], int], keep: Callable[[], Any], output: int, answer: Any) -> NoReturn:
    code, result = None, None
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = function()
        result = keep() if code == 0 else None
    except BaseException:
        traceback.print_exc()
    finally:
        signal.alarm(0)
        sys.stdout.flush()
        sys.stderr.flush()
        pickle.dump((code, result), answer)
        answer.flush()
        os._exit(0)

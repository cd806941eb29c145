"""One side's training run on one workload: its time, its losses, its peak memory.

On a GPU each is a process of its own: some sides change transformers for the rest of a process, one that runs out of
memory must not take the others along, and memory starts from nothing. On a CPU they run in this one.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import harness, trainers
from .peak import Peak
from .workloads import Workload

LIMIT = 500.0  # seconds for a process


class LegError(Exception):
    """A leg that could not be measured, and why."""


@dataclass(frozen=True)
class Leg:
    workload: Workload
    side: str  # of trainers.SIDES
    steps: int
    span: int  # steps between two readings of the clock, after the first
    memory: bool  # count it, too: a GPU does so for nothing, on a CPU it slows the run down


def measure(leg: Leg) -> dict[str, Any]:
    """`samples` [s / step], `losses`, `tokens_per_step`, `attention`; `peak_bytes` and `weight_bytes` with `memory`.

    Raises LegError.
    """
    reason = trainers.missing(leg.side, harness.device())
    if reason:
        raise LegError(reason)
    if harness.device().type == "cpu":
        return _here(leg)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.legs", json.dumps(asdict(leg))]
    try:
        done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise LegError(f"not done after {LIMIT:.0f} s") from None
    if done.returncode != 0:
        raise LegError((done.stderr.strip() or "no word").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


TOLERANCE = 3e-3  # relative, of losses; in their first steps 16-bit trainings part by at most 5e-4


def require_same_training(workload: Workload, found: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest relative difference of the sides' losses from ours. Raises ParityError above `TOLERANCE`.

    The first loss is the untrained model's, dropout or not, since B is 0. The next one is compared where a side starts
    from our A and B and draws no dropout mask. Later on PEFT's part by per cents from ours, and from its own in fp32:
    it rounds a part of every young link's term away (`rounding`).
    """
    worst = 0.0
    for side, leg in found.items():
        same = side in trainers.SAME_START and workload.dropout == 0
        count = 2 if same else 1
        mine, others = found["ours"]["losses"][:count], leg["losses"][:count]
        worst = max(worst, harness.require_close(f"{side}: {workload}", mine, others, tolerance=TOLERANCE))
    return worst


def _here(leg: Leg) -> dict[str, Any]:
    problem = trainers.Problem(leg.workload.config(leg.steps), leg.span)
    peak = Peak()
    side = trainers.SIDES[leg.side]
    try:
        times = side(problem, peak.watch) if leg.memory else side(problem, lambda model: model)
    except harness.NotComparable as error:
        raise LegError(str(error)) from None
    found = {
        **asdict(times),
        "tokens_per_step": problem.tokens_per_step,
        "attention": problem.attention,
        **({"peak_bytes": peak.bytes(), "weight_bytes": peak.weights} if leg.memory else {}),
    }
    gc.collect()
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print("\n" + json.dumps(_here(Leg(**{**given, "workload": Workload(**given["workload"])}))))

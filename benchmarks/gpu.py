"""`python -m benchmarks gpu --out DIR`: all that a GPU is needed for, unattended and within a time.

    parity        the kernels' tests on the GPU: bf16, fp16 and fp32 counted apart
    tune          a table for this GPU, in DIR; what follows uses it
    lora_linear, kernels, convergence, profile, overhead, memory, train     the suites of those names

Each stage is a process of its own, in this order, with its own limit within the whole. One that fails or runs out of
time is recorded and the next one starts; suites and the tuner keep what they have as they go. The same command again
goes on with what has not passed yet, as often as it takes. DIR holds few files: summary.json, log.txt, the table, and a
JSON a suite.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import harness
from .registry import UNFINISHED

GRACE = 15.0  # seconds of a stage's limit that are left to finish what was begun
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the whole time, at most
    arguments: list[str]  # of python; "{seconds}" is filled with when to start nothing more


@dataclass(frozen=True)
class Outcome:
    stage: str
    status: str  # passed, failed, unfinished, out of time, not started
    seconds: float
    exit_code: int | None = None


def stages(out: Path, *, quick: bool) -> list[Stage]:
    processes = str(min(12, os.cpu_count() or 1))
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'parity.xml'}"]
    if importlib.util.find_spec("xdist") and not quick:
        tests += ["-n", processes]  # most of the time is compiling
    tests += ["tests/kernels/test_small.py" if quick else "tests/kernels"]
    tune = ["-m", "cola_kernels.tune", "--output", str(out), "--seconds", "{seconds}"]
    small = ["--layers", "48x32", "--tokens", "32", "--ranks", "4", "--dtype", "float16", "--jobs", "1"]
    tune += small if quick else ["--jobs", processes]
    return [
        Stage("parity", 0.3, tests),
        Stage("tune", 0.25, tune),
        *(Stage(name, share, _suite(name, out, quick)) for name, share in _SUITES.items()),
    ]


# they take what is left, the longest last
_OF_MODELS = ("profile", "overhead", "memory", "train")
_SUITES = {"lora_linear": 0.3, "kernels": 0.2, "convergence": 0.25, **dict.fromkeys(_OF_MODELS, 1.0)}


def _suite(name: str, out: Path, quick: bool) -> list[str]:
    run = ["-m", "benchmarks", "run", name, "--out", str(out / f"{name}.json"), "--seconds", "{seconds}"]
    return [*run, *(["--quick"] if quick else [])]


def main(out: Path, seconds: float, *, quick: bool) -> int:
    """0 if every stage has passed, in this call or an earlier one into the same folder."""
    if harness.device().type == "cpu" and not quick:
        print("No GPU is visible; --quick rehearses on the CPU.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("datasets") is None:
        print("The suites of models read their data by datasets: pip install datasets.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("bitsandbytes") is None:
        harness.say("bitsandbytes is not installed: nothing in 4 bits is measured.")
    began = time.monotonic()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    summary: dict[str, Any] = {"environment": harness.environment(), "quick": quick, "seconds": seconds}
    earlier = _earlier(out / "summary.json", summary)
    summary["parity"] = earlier.get("parity")
    passed = {o["stage"]: Outcome(**o) for o in earlier.get("stages", []) if o["status"] == "passed"}
    outcomes = []
    for stage in stages(out, quick=quick):
        left = seconds - (time.monotonic() - began)
        again = passed.get(stage.name)
        environment = _environment(out, of_kernels=stage.name not in _OF_MODELS)
        outcomes.append(again or _run(stage, min(left, stage.share * seconds), log, environment))
        harness.say(f"{outcomes[-1]}")
        summary["stages"] = [asdict(outcome) for outcome in outcomes]
        if (out / "parity.xml").is_file():
            summary["parity"] = count(out / "parity.xml")
            (out / "parity.xml").unlink()
        harness.write_result(out / "summary.json", summary)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


def _earlier(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of an earlier call on the same commit and device; without one, nothing."""
    if not path.is_file():
        return {}
    found = harness.read(path)
    same = all(found["environment"][key] == summary["environment"][key] for key in ("device", "commit", "dirty"))
    return found if same and found["quick"] == summary["quick"] else {}


def _environment(out: Path, *, of_kernels: bool = True) -> dict[str, str]:
    """Nothing need be installed; the fresh table is found; a rehearsal without a GPU interprets the kernels, but where
    whole models are trained."""
    path = os.pathsep.join([str(harness.ROOT), str(harness.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    added = {"PYTHONPATH": path, "COLA_KERNELS_CACHE": str(out), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if harness.device().type == "cpu" and of_kernels:
        added |= {"TRITON_INTERPRET": "1", "COLA_KERNELS_BACKEND": "triton"}
    return os.environ | added


def _run(stage: Stage, limit: float, log: Path, environment: dict[str, str]) -> Outcome:
    if limit <= GRACE:
        return Outcome(stage.name, "not started", 0.0)
    command = [sys.executable, *(a.replace("{seconds}", f"{limit - GRACE:.0f}") for a in stage.arguments)]
    began = time.monotonic()
    with log.open("a") as file:
        print(f"\n--- {stage.name}: {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command, cwd=harness.ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()
            code = None
    status = {0: "passed", UNFINISHED: "unfinished", None: "out of time"}.get(code, "failed")
    return Outcome(stage.name, status, round(time.monotonic() - began, 1), code)


def count(junit: Path) -> dict[str, Any]:
    """Tests passed, failed and skipped, all together and by the dtype in their names, and the names of the failed."""
    totals: dict[str, Counter[str]] = {name: Counter() for name in ("all", *DTYPES)}
    failed = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        if result == "failed":
            failed.append(name)
        totals["all"][result] += 1
        words = name.replace("[", "-").replace("]", "-").replace("torch.", "").split("-")
        for dtype in DTYPES:
            if dtype in words:
                totals[dtype][result] += 1
    return {"counts": {name: dict(counter) for name, counter in totals.items()}, "failed": failed}

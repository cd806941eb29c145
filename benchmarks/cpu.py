"""`python -m benchmarks cpu`: every suite of speed and memory that a CPU answers, one after the other, then the report.

Each is a process of its own, writes its result under benchmarks/results/, and compares it with the last committed one
of the same machine. The others (demo, knot, quality and whatever trains for long) are run by name.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from . import harness

SUITES = ("linears", "train", "memory", "overhead", "profile")


def main(*, quick: bool) -> int:
    """0 if no suite failed, was refused a figure, or has become slower."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SUITES:
            command = [sys.executable, "-m", "benchmarks", "run", name]
            command += ["--quick", "--out", str(Path(folder) / f"{name}.json")] if quick else []
            if subprocess.call(command, cwd=harness.ROOT) != 0:
                failed.append(name)
    if not quick and subprocess.call([sys.executable, "-m", "benchmarks", "report"], cwd=harness.ROOT) != 0:
        failed.append("report")
    if failed:
        print(f"not as before, or not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0

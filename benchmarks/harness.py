"""What every benchmark shares: the environment, paired timing, the parity gate, results as data.

**Pairs.** A machine's speed drifts (clocks, caches, neighbours), so sides are timed in turn, A B C, C B A, A B C, ...,
and a ratio is taken within each round: what slows a whole round down cancels. The median of those ratios is reported
with its quartiles, never the ratio of two separate means.

**Parity.** A fast wrong answer is worth nothing: a suite calls `require_parity` before it times anything, and a failure
ends the run without a number. The rule is the tests': `err(found) <= 2 * err(eager, same dtype) + 1e-6`, both against
fp64 on the same inputs.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_fast.training.models import native_bf16

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
VERSIONS = ("torch", "triton", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "liger-kernel", "unsloth")


class NotComparable(Exception):
    """A side that cannot take part in a case. The message says why, and stands where its figure would."""


class ParityError(Exception):
    """Two sides of a benchmark do not compute the same thing, so comparing their speed would mean nothing."""


# --- timing -----------------------------------------------------------------------------------------------------------


def interleave(sides: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Call every side once a round, in alternating order; entry i of each list is from round i.

    A side returns the seconds it took, by its own account: so it can leave out what is not to be timed. The first
    `warmup` rounds are thrown away.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name in sides if turn % 2 == 0 else reversed(list(sides)):
            seconds = sides[name]()
            if turn >= warmup:
                samples[name].append(seconds)
    return samples


def sample(work: Mapping[str, Callable[[], Any]], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """`interleave` of `timed`, each side called as often as makes a sample last `seconds`."""
    for each in work.values():  # the first call compiles or loads, which says nothing of how long one takes
        each()
    repeats = {name: math.ceil(seconds / timed(each, 3)) for name, each in work.items()}
    return interleave({name: partial(timed, each, repeats[name]) for name, each in work.items()}, rounds=rounds)


def timed(work: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds for one call of `work`, the mean of `repeats` in a row; on a GPU between two of its own events."""
    synchronize()
    if torch.cuda.is_available():
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - began) / repeats


def in_turn(works: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One after the other, for ever: with enough copies of the operands none is still in the cache when it is used."""
    following = itertools.cycle(works)
    return lambda: next(following)()


def cache_bytes() -> int:
    """Of the last cache before a GPU's memory; 0 on a CPU, where nothing is said about caches."""
    return int(torch.cuda.get_device_properties().L2_cache_size) if torch.cuda.is_available() else 0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Spread:
    median: float
    q1: float
    q3: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation between order statistics; of one sample, that sample."""
        many = samples if len(samples) > 1 else [samples[0]] * 2
        q1, median, q3 = statistics.quantiles(many, n=4, method="inclusive")
        return cls(median, q1, q3, min(samples), max(samples), len(samples))

    @classmethod
    def of_ratio(cls, samples: Sequence[float], baseline: Sequence[float]) -> Spread:
        """Of `samples[i] / baseline[i]`, the pairs of each round."""
        return cls.of([a / b for a, b in zip(samples, baseline, strict=True)])


def summarise(samples: Mapping[str, Sequence[float]], side: str) -> dict[str, Any]:
    """The samples themselves, their spreads in seconds, and the ratios of `side` to each of the others."""
    return {
        "samples": {name: list(values) for name, values in samples.items()},
        "seconds": {name: asdict(Spread.of(values)) for name, values in samples.items()},
        "ratio": {
            name: asdict(Spread.of_ratio(samples[side], values)) for name, values in samples.items() if name != side
        },
    }


def say(line: str) -> None:
    """Progress; results go to stdout, and only when all of them are in."""
    print(line, file=sys.stderr, flush=True)


# --- parity -----------------------------------------------------------------------------------------------------------


def error(found: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the truth's largest absolute value: no single wrong element hides in a norm."""
    return float((found.detach().double() - truth).abs().max() / truth.abs().max())


def require_parity(
    what: str, found: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> dict[str, float]:
    """Errors of `found` in units of what the rule allows (1.0 is the limit). Raises ParityError above it, and for NaN.

    eager: plain PyTorch in the dtype of `found`. truth: fp64 on the same inputs, upcast. Outputs and gradients by name.
    """
    if found.keys() != truth.keys():
        raise ParityError(f"{what}: returns {', '.join(found)}, but should return {', '.join(truth)}.")
    shares = {}
    for name in truth:
        err, allowed = error(found[name], truth[name]), 2 * error(eager[name], truth[name]) + 1e-6
        if not err <= allowed:
            raise ParityError(f"{what}: {name} is off by {err:.1e}, and {allowed:.1e} is allowed.")
        shares[name] = err / allowed
    return shares


def require_close(what: str, ours: Sequence[float], theirs: Sequence[float], *, tolerance: float) -> float:
    """The largest relative difference of two equally long rows of numbers. Raises ParityError above the tolerance."""
    worst = largest_difference(ours, theirs)
    if not worst <= tolerance:
        raise ParityError(f"{what}: {list(ours)} against {list(theirs)}, where {tolerance:.0e} is allowed.")
    return worst


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Relative to theirs; NaN if one is."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(differences, key=lambda difference: (math.isnan(difference), difference))


# --- environment and results ------------------------------------------------------------------------------------------


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_dtype() -> str:
    """bf16 where the device has instructions for it, else fp32: what a suite measures in unless 16 bits are its
    question."""
    return "bf16" if native_bf16(device()) else "fp32"


def environment() -> dict[str, Any]:
    """Everything needed to judge or repeat the numbers. The load average shows whether the machine was quiet."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else _cpu_model()
    return {
        "device": name,
        "gpu": device().type == "cuda",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": _instructions(),
        "dtype": native_dtype(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: _version(package) for package in VERSIONS},
        "commit": git("rev-parse", "HEAD") or os.environ.get("BENCHMARK_COMMIT"),  # a copy without .git
        "dirty": bool(
            git("status", "--porcelain", "--", ".", ":!*.md", ":!benchmarks/results", ":!benchmarks/report.html")
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_slug(env: Mapping[str, Any]) -> str:
    """For file names: `intel-xeon-processor-2-threads`. Results of one slug may be compared with each other."""
    forced = re.findall(r"\w+ forced", env.get("instructions", ""))
    words = re.sub(r"\((r|tm)\)", "", f"{env['device']} {env['threads']} threads {' '.join(forced)}".lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def result_path(suite: str, env: Mapping[str, Any]) -> Path:
    return RESULTS / f"{suite}-{device_slug(env)}.json"


def write_result(path: Path, result: Any) -> None:
    """Replaces the file at once: whoever reads it, or is killed while writing, finds whole JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds; measured, and kept there with the commit, the first time."""
    if not path.exists():
        write_result(path, {**measure(), "commit": environment()["commit"]})
    return read(path)


def read_results(suite: str) -> list[dict[str, Any]]:
    """Of every device, in the order of the file names."""
    found = map(read, sorted(RESULTS.glob(f"{suite}-*.json")))
    return [result for result in found if result["suite"] == suite]


def _instructions() -> str:
    """What PyTorch uses of a CPU; `forced` where its variables hold it below what the CPU has."""
    used = torch.backends.cpu.get_cpu_capability()
    if not used.startswith("AVX512"):
        return f"{used} forced" if torch.cpu._is_avx512_supported() else used
    more = {"AVX512_BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return ", ".join([used, *(name for name, there in more.items() if there)])


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What git prints in this repository; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

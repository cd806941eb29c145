"""Does a chain learn more than LoRA at the same cost?

Every arm of `quality_arms` gets the same steps, batches and seeds. Its learning rate is swept on the validation set
with a seed of its own, over four values of a ladder and on from there while the best is at an edge; that rate then
meets the test set with the paired seeds. Every run is a JSON file in `benchmarks/results/quality/`, so a stopped
evaluation goes on where it was, and several processes share it; what is published holds all of them.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cola_fast.layers.targets import block_of

from . import harness
from .quality_arms import ARMS, BATCH, Diverged, Training
from .quality_problems import MODELS, Scores, Teacher
from .quality_tables import draw, quality_tables
from .registry import Options

LADDER = [digit * 10.0**power for power in range(-6, 0) for digit in (1, 2, 5)]
FOLDER = "quality"  # in benchmarks/results, for what is not published as it is
SWEEP_SEED = 1000  # none of the paired ones
MAIN = ("frozen", "lora", "cola-3", "lora-restarts", "rac-lora", "lora-24")
STARTS = {  # the lowest of the first four rates, by model and arm
    "minilm": {"full": 5e-5, "rac-lora": 1e-3, "": 5e-4},
    "smollm2": {"full": 2e-5, "rac-lora": 5e-4, "": 2e-4},
    "smollm2-text": {"full": 2e-5, "rac-lora": 5e-4, "": 2e-4},
}


@dataclass(frozen=True)
class Setting:
    """A model, a task, and how much of everything."""

    model: str
    task: str
    arms: tuple[str, ...]
    steps: int
    seeds: int
    items: int  # of the test set
    extra: int = 200  # training sentences that join the 200 of the validation set

    @property
    def name(self) -> str:
        return f"{self.model}-{self.task}"


@dataclass(frozen=True)
class Job:
    setting: Setting
    arm: str
    split: str  # "validation" while the learning rate is swept, then "test"
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name}-{self.arm}-{self.split}-{self.lr:g}-{self.seed}.json"


SETTINGS = (
    Setting("minilm", "movie", tuple(ARMS), steps=84, seeds=5, items=600),
    Setting("minilm", "amazon", tuple(ARMS), steps=48, seeds=5, items=600),
    Setting("smollm2", "movie", MAIN, steps=36, seeds=3, items=400, extra=50),
    Setting("smollm2-text", "movie", (*MAIN, "full"), steps=72, seeds=3, items=400, extra=50),
)
FULL = tuple(
    Setting(model, task, tuple(ARMS), steps=300, seeds=5, items=600) for model in MODELS for task in ("movie", "amazon")
)
QUICK = (Setting("minilm", "movie", ("lora", "cola-2"), steps=4, seeds=1, items=32),)


def run(options: Options) -> dict[str, Any]:
    settings = QUICK if options.quick else FULL if options.full else SETTINGS
    folder = Path(tempfile.mkdtemp()) if options.quick else harness.RESULTS / FOLDER / ("full" if options.full else "")
    try:
        began = time.perf_counter()
        while time.perf_counter() - began < options.seconds and work(settings, folder):
            pass
        done = finished(settings, folder)
        left = sum(1 for _ in pending(settings, done))
        ranks = {setting.name: found for setting in settings if (found := _by_block(setting, folder))}
        teacher = _kept(folder / "teacher.json", partial(teach, 50 if options.quick else 500))
    finally:
        if options.quick:
            shutil.rmtree(folder)
    return {
        "complete": left == 0,
        "left": left,
        "settings": [asdict(setting) for setting in settings],
        "runs": [record for records in done.values() for record in records.values()],
        "ranks": ranks,
        "teacher": teacher,
    }


# --- which runs -------------------------------------------------------------------------------------------------------


def pending(settings: Sequence[Setting], done: Mapping[Setting, Mapping[str, Any]]) -> Iterator[Job]:
    """The runs that what is `done` (their records by file name) leaves to do, as far as it tells: the next ones of a
    sweep follow from its results, and the tests from its end."""
    for setting in settings:
        found = done.get(setting, {})
        for arm in setting.arms:
            rates, lr = sweep(setting, arm, found.values())
            jobs = [Job(setting, arm, "validation", rate, SWEEP_SEED) for rate in rates]
            if lr is not None:
                jobs = [Job(setting, arm, "test", lr, seed) for seed in range(setting.seeds)]
            yield from (job for job in jobs if job.name not in found)


def sweep(setting: Setting, arm: str, records: Any) -> tuple[list[float], float | None]:
    """The learning rates to try, and the best one once it is known to be no edge: the least validation loss."""
    if not ARMS[arm].ranks and not ARMS[arm].full:
        return [], 0.0
    starts = STARTS[setting.model]
    first = LADDER.index(starts.get(arm, starts[""]))
    losses = {r["lr"]: _loss(r) for r in records if r["arm"] == arm and r["split"] == "validation"}
    rates = LADDER[first : first + 4]
    tried = sorted(losses)
    if any(rate not in losses for rate in rates):
        return rates, None
    best = min(tried, key=losses.__getitem__)
    place = LADDER.index(best)
    if best == tried[0] and place > 0:
        return [LADDER[place - 1]], None
    if best == tried[-1] and place + 1 < len(LADDER):
        return [LADDER[place + 1]], None
    return tried, best


def _loss(record: Mapping[str, Any]) -> float:
    return math.inf if record["loss"] is None else float(record["loss"])


def finished(settings: Sequence[Setting], folder: Path) -> dict[Setting, dict[str, Any]]:
    """The records in `folder`, by setting and file name. Those of a setting that has changed since do not count."""
    found: dict[Setting, dict[str, Any]] = {setting: {} for setting in settings}
    for setting in settings:
        for path in sorted(folder.glob(f"{setting.name}-*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["size"] == _size(setting):
                found[setting][path.name] = record
    return found


def _size(setting: Setting) -> dict[str, int]:
    return {"steps": setting.steps, "batch": BATCH, "extra": setting.extra, "items": setting.items}


# --- one run ----------------------------------------------------------------------------------------------------------


def work(settings: Sequence[Setting], folder: Path) -> bool:
    """Do the first pending run that no other process is at; False if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for job in pending(settings, finished(settings, folder)):
        path = folder / job.name
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            if not path.exists() or job.name not in finished(settings, folder)[job.setting]:
                harness.write_result(path, perform(job, folder))
                harness.say(job.name)
                gc.collect()  # a model and its chain hold each other
        finally:
            lock.release()
        return True
    return False


def perform(job: Job, folder: Path) -> dict[str, Any]:
    """Train, score. A run that diverges has no loss."""
    setting, arm = job.setting, ARMS[job.arm]
    problem = MODELS[setting.model](setting.task, job.seed, full=arm.full, items=setting.items, extra=setting.extra)
    ranks = gelora_pattern(setting.name, job.arm, problem, folder)
    training = Training(problem, arm, setting.steps, job.lr, job.seed, ranks)
    try:
        training.run()
        scores: Scores | None = problem.scores(job.split)
    except Diverged as error:
        harness.say(str(error))
        scores = None
    record: dict[str, Any] = {"setting": setting.name, "size": _size(setting)}
    record |= {"arm": job.arm, "split": job.split, "lr": job.lr, "seed": job.seed}
    return record | ({"loss": None} if scores is None else _summary(scores, job.split == "test"))


def _summary(scores: Scores, items: bool) -> dict[str, Any]:
    n = len(scores.losses)
    found: dict[str, Any] = {"loss": sum(scores.losses) / n}
    if scores.correct is not None:
        found["accuracy"] = sum(scores.correct) / n
    if items and scores.correct is not None:
        found["correct"] = "".join("01"[c] for c in scores.correct)
    if items:
        found["losses"] = " ".join(f"{1000 * loss:.0f}" for loss in scores.losses)  # thousandths of a nat
    return found


def gelora_pattern(setting: str, arm: str, problem: Any, folder: Path) -> dict[str, int] | None:
    """Module -> rank, measured once for a setting; None for an arm without GeLoRA."""
    from cola_fast import gelora_ranks

    mean = ARMS[arm].gelora
    if mean is None:
        return None

    def measure() -> dict[str, int]:
        return gelora_ranks(problem.model, problem.states_batches(), mean_rank=mean or None)

    found: dict[str, int] = _kept(folder / f"ranks-{setting}-{arm}.json", measure)
    return found


def _by_block(setting: Setting, folder: Path) -> dict[str, list[int]]:
    """Arm -> GeLoRA's ranks in the model's order, one a block, as far as they have been measured."""
    found = {}
    for arm in setting.arms:
        path = folder / f"ranks-{setting.name}-{arm}.json"
        if path.exists():
            pattern = json.loads(path.read_text(encoding="utf-8"))
            found[arm] = list({block_of(module): rank for module, rank in pattern.items()}.values())
    return found


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What was made once, and has been in `path` since."""
    if not path.exists():
        harness.write_result(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


# --- a known answer ---------------------------------------------------------------------------------------------------


def teach(steps: int, rank: int = 4, links: int = 8, seeds: int = 3) -> list[dict[str, Any]]:
    """What is left of a difference of rank 32 after as many steps in all, as a share of its squared norm, by seed."""
    one = replace(ARMS["lora"], ranks=(rank,))
    arms = {
        f"LoRA, R = {rank}": one,
        f"LoRA, R = {rank}, {links - 1} restarts, no merge": replace(one, ranks=(rank,) * links, merge=False),
        f"COLA, K = {links}, R = {rank}": replace(one, ranks=(rank,) * links),
    }
    left: dict[str, list[float]] = {name: [] for name in arms}
    tail = f"the best matrix of rank {rank}"
    left[tail] = []
    for seed in range(seeds):
        whole = float(Teacher(seed).difference.square().sum())
        for name, arm in arms.items():
            problem = Teacher(seed)
            Training(problem, arm, links * steps, 0.05, seed, targets=("0",)).run()
            left[name].append(float(problem.loss([0]).detach()) / whole)
        left[tail].append(Teacher(seed).tail(rank) / whole)
    return [{"arm": name, "left": values} for name, values in left.items()]


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    return quality_tables(result)


def plot(result: Mapping[str, Any], path: Path) -> None:
    draw(result, path)

"""`cola demo`: the whole life of a chain on a real model and real data, in a size that takes minutes.

The size is chosen once, by timing a few steps on the machine at hand. It is part of the run's configuration, so the
links still follow from config.yaml alone, and the same command resumes the run in the same size.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock

from .. import config, console, store
from ..config import Config
from ..errors import UserError, near
from ..training.run import CONFIG_FILE, load_config
from . import assets
from .report import export_run, score_run, table

if TYPE_CHECKING:
    from ..data.rows import Data

SECONDS = 170  # for training and scoring; setting up and loading take up to two minutes more
TIMED_ROWS = 8  # of a step that is only timed


@dataclass(frozen=True)
class Size:
    name: str
    rows: int  # to train on
    batch_size: int
    eval: int  # validation sentences
    test: int

    def __str__(self) -> str:
        return f"{self.name} ({self.rows} rows to train on, {self.test} test sentences)"


# The accuracy after three links on all 600 test sentences, seeds 0 to 2: half 0.888, 0.873, 0.882; small 0.888, 0.870,
# 0.880. Fewer rows go in smaller batches, for the number of steps counts: 640 rows in 40 steps of 16 reach 0.86.
SIZES = (
    Size("full", 1280, 16, eval=200, test=600),
    Size("half", 640, 8, eval=100, test=300),
    Size("small", 480, 8, eval=50, test=300),
)


@dataclass(frozen=True)
class Speed:
    """Seconds a token."""

    training: float
    scoring: float


def demo_config(overrides: Sequence[str] = (), *, in_4bit: bool = False, size: Size = SIZES[0]) -> Config:
    """demo.yaml on the cached model and sentences, which are fetched if they are not there yet."""
    raw = yaml.safe_load(resources.files(__package__).joinpath("demo.yaml").read_text())
    raw["model"]["name"] = str(assets.smollm2())
    files = assets.sentiment("movie")
    raw["data"]["train"] = str(files["train"])
    raw["data"] |= {split: str(_first(getattr(size, split), files[split])) for split in ("eval", "test")}
    raw["data"]["limit"], raw["train"]["batch_size"] = size.rows, size.batch_size
    raw["out"] = "runs/demo-4bit" if in_4bit else "runs/demo"
    raw["model"]["load_in_4bit"] = in_4bit
    return config.from_dict(raw, overrides)


def demo(
    overrides: Sequence[str], train: Callable[[Config], int], *, in_4bit: bool = False, size: str | None = None
) -> int:
    """Fetch, train three links, table the scores, write both exports. Running it again resumes or shows the result."""
    console.show(f"model and data: downloaded once and checked, then read from {assets.cache_folder()}")

    def make(size: Size) -> Config:
        return demo_config(overrides, in_4bit=in_4bit, size=size)

    chosen = make(_named(size)) if size is not None else _started(make) or _fitting(make)
    code = train(chosen)
    if code:
        return code
    run = Path(chosen.out)
    exports = {to: run / "export" / to for to in ("adapter", "merged")}
    for to, folder in exports.items():
        if not folder.exists():
            console.show(export_run(run, to))
    rows = score_run(run, merged=exports["merged"])
    console.show("\nscores on the test sentences, each model rebuilt from the run folder:\n")
    console.show(table(rows))
    console.show(f"\n{_precision(rows[-1]['accuracy'], rows[-1]['examples'])}")
    return 0


# --- the size ---------------------------------------------------------------------------------------------------------


def _named(name: str) -> Size:
    names = [size.name for size in SIZES]
    if name not in names:
        raise UserError(f"--size is {name}, but the demo's sizes are {', '.join(names)}.{near(name, names)}")
    return SIZES[names.index(name)]


def _started(make: Callable[[Size], Config]) -> Config | None:
    """The configuration of the run that is there already. One of no size is the full one's, which will be refused."""
    out = Path(make(SIZES[0]).out)
    if not (out / CONFIG_FILE).exists():
        return None
    kept = _sized(load_config(out))
    for size in SIZES:
        if _sized(chosen := make(size)) == kept:
            _say(f"size: {size.name}, as {out} was started")
            return chosen
    return make(SIZES[0])


def _sized(config: Config) -> tuple[Any, ...]:
    """What a size decides."""
    files = (Path(str(file or "")).name for file in (config.data.eval, config.data.test))
    return (config.data.limit, config.train.batch_size, *files)


def _fitting(make: Callable[[Size], Config]) -> Config:
    """The largest size that takes at most `SECONDS` on this machine, or the smallest one."""
    _say("timing a few steps, to choose a size ...")
    speed = measure(make(SIZES[0]))
    gc.collect()  # its chain and model, before the run's own
    slower = []
    for size in SIZES:
        chosen = make(size)
        seconds = _seconds(chosen, speed)
        told = f"{size} about {seconds:.0f} s"
        if seconds <= SECONDS or size is SIZES[-1]:
            break
        slower.append(told)
    limit = f"the limit is {SECONDS} s" if seconds <= SECONDS else f"more than {SECONDS} s, but the smallest"
    _say(f"size: {'; '.join([f'{told} of training and scoring here, {limit}', *slower])}. --size chooses another.")
    return chosen


def _seconds(config: Config, speed: Speed) -> float:
    """Training with its validations, and scoring the base and each link."""
    from ..training.prepare import prepare

    data = _load(config)
    schedule, _ = prepare(config, data)
    rows = schedule.total * config.train.batch_size * config.train.accumulation
    trained = rows * _mean(data.train)
    scored = (1 + config.schedule.links) * sum(map(len, [*data.eval, *data.test]))
    return trained * speed.training + scored * speed.scoring


def measure(config: Config) -> Speed:
    """Time a few steps, and scoring as many sentences, on a chain that is thrown away. A typical batch: its sentences
    are those of middle length."""
    import torch

    from ..chain.attach import attach
    from ..data.batches import Batch, collate
    from ..data.loss import batch_loss, needed_logits
    from ..training.models import load_model

    model = load_model(config.model)
    examples = sorted(_load(config).train, key=len)
    middle = examples[max(0, len(examples) // 2 - TIMED_ROWS // 2) :][:TIMED_ROWS]
    batch = collate([[example] for example in middle]).to(next(model.parameters()).device)

    def score(batch: Batch) -> None:
        with torch.no_grad():
            float(batch_loss(needed_logits(model, batch), batch)[0])

    def step(batch: Batch) -> None:
        loss = batch_loss(needed_logits(model, batch), batch)[0]
        loss.backward()
        float(loss.detach())  # waits for a GPU

    def best(work: Callable[[Batch], None]) -> float:
        """Seconds a token: of two tries the faster, since the first one warms up."""
        return min(_timed(lambda: work(batch)) for _ in range(2)) / batch.tokens

    scoring = best(score)
    c = config.chain
    attach(model, r=c.r, alpha=c.alpha, targets=c.targets, base=c.base)
    return Speed(best(step), scoring)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _load(config: Config) -> Data:
    from ..data.rows import load_data
    from ..training.models import load_tokenizer

    return load_data(config.data, load_tokenizer(config.model), context=config.data.max_length, seed=config.train.seed)


def _mean(examples: Sequence[Any]) -> float:
    return sum(map(len, examples)) / max(1, len(examples))


def _first(count: int, file: Path) -> Path:
    """A file of the first rows, beside `file`, and made once; the file itself if it has no more."""
    lines = file.read_bytes().splitlines(keepends=True)
    if count >= len(lines):
        return file
    part, content = file.with_name(f"{file.stem}-{count}{file.suffix}"), b"".join(lines[:count])
    with FileLock(f"{part}.lock"):
        if not part.exists() or part.read_bytes() != content:
            store.write_file(part, content)
    return part


def _precision(accuracy: float | None, examples: int) -> str:
    share = 0.5 if accuracy is None else accuracy
    error = math.sqrt(share * (1 - share) / examples)
    return f"With {examples} test sentences, an accuracy is known to within {error:.3f} (one standard error)."


def _say(line: str) -> None:
    console.tell(line)

"""What is damaged, what is done with it, and what must hold then: one sentence and exit code 2, with nothing changed on
disk, or the result that there would have been. Never a traceback, a crash, a hang, or another result."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from cola_fast import UserError, attach, cli, config, store
from cola_fast.commands import report
from cola_fast.training import plot, trainer

from ..conftest import disturb, snapshot, tiny_llama
from . import damage, forked

STEP = 5  # of 6 in two links, at which the run that is damaged was killed


@dataclass
class World:
    """Made once: a run that was killed in its second link, how it ends if nothing is damaged, and others' files."""

    folder: Path
    model: Path
    links: list[str]  # hashes
    adapter: bytes
    scores: list[dict[str, Any]]

    @property
    def work(self) -> Path:
        return self.folder / "work"


def make_world(folder: Path, model: Path, data: dict[str, str]) -> World:
    plot.draw = lambda run: run  # slow, and drawn from a log that decides nothing
    raw = {
        "out": str(folder / "work" / "run"),
        "model": {"name": str(folder / "work" / "model"), "dtype": "fp32", "device": "cpu"},
        "data": {
            **{split: str(folder / "work" / "data" / f"{split}.jsonl") for split in data},
            "template": "{text} it was", "verbalisers": {"0": " bad", "1": " good"}, "max_length": 16, "limit": 32,
        },
        "chain": {"r": 2, "alpha": 4, "dropout": 0.1, "train_also": ["norm"]},
        "schedule": {"links": 2, "steps": 6, "lr": 0.02},
        "train": {"batch_size": 4, "save_every": 1, "log_every": 1, "eval_every": 2},
    }  # fmt: skip
    work = folder / "work"
    work.mkdir()
    shutil.copytree(model, work / "model")
    (work / "data").mkdir()
    for split, path in data.items():
        shutil.copy(path, work / "data" / f"{split}.jsonl")
    (work / "config.yaml").write_text(yaml.safe_dump(raw))
    _train_until(STEP, work / "config.yaml")
    shutil.copytree(work, folder / "killed")
    made = World(folder, model, [], b"", [])
    done = forked.run(lambda: train(made), lambda: links_of(made))
    assert done.code == 0, done.said
    made.links = done.result
    damage.fresh(folder / "killed", work)
    done = forked.run(lambda: cli.main(["export", str(work / "run"), "--to", "adapter"]), lambda: adapter_of(made))
    assert done.code == 0, done.said
    made.adapter = done.result
    done = forked.run(lambda: evaluate(work / "run"), lambda: SCORES)
    assert done.code == 0, done.said
    made.scores = done.result
    chain = attach(tiny_llama(), r=2)
    disturb(chain)
    chain.export_adapter(folder / "adapter")
    return made


class Killed(Exception):
    pass


def _train_until(step: int, path: Path) -> None:
    real, calls = trainer.set_lr, []

    def dying(*args: Any) -> None:
        calls.append(args)
        if len(calls) == step:
            raise Killed
        real(*args)

    trainer.set_lr = dying
    try:
        with contextlib.suppress(Killed):
            trainer.train(config.load(path), quiet=True)
    finally:
        trainer.set_lr = real


def train(world: World) -> int:
    return cli.main(["train", str(world.work / "config.yaml")])


SCORES: list[dict[str, Any]] = []


def evaluate(run: Path) -> int:
    """In a child. Leaves the scores in SCORES."""
    report.table = lambda rows: SCORES.extend(rows) or ""  # type: ignore[func-returns-value]
    return cli.main(["eval", str(run), "--best"])


def links_of(world: World) -> list[str]:
    record = json.loads((world.work / "run" / "chain.json").read_bytes())
    return [link["sha256"]["adapter_model.safetensors"] for link in record["links"]]


def adapter_of(world: World) -> bytes:
    return (world.work / "run" / "export" / "adapter" / "adapter_model.safetensors").read_bytes()


# --- verdicts ---------------------------------------------------------------------------------------------------------


def fault(outcome: forked.Outcome, same: Callable[[Any], bool]) -> str | None:
    """What is wrong with how it ended. None if nothing is."""
    if outcome.death is not None:
        return outcome.death
    if outcome.code is None or "Traceback" in outcome.said:
        return "a traceback"
    if outcome.code == 0:
        return None if same(outcome.result) else "another result"
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    return None if outcome.lines else "no sentence"


def unchanged(before: dict[str, bytes], folder: Path) -> bool:
    """But for the lock, and for what an export or a data set's cache has made."""
    return before == snapshot(folder)


# --- scenes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    scene: str
    what: str
    fault: str | None
    outcome: forked.Outcome


def run_folder(world: World, source: random.Random) -> Found:
    """One file of the run folder is damaged; then the run is gone on with, exported, scored or looked at."""
    run = damage.fresh(world.folder / "killed", world.work) / "run"
    path = source.choice(sorted(p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "curves.png")))
    what = damage.of_file(source, path)
    action = source.choice(("train", "train", "export", "eval", "info"))
    before = _seen(run)
    actions: dict[str, tuple[Callable[[], int], Callable[[], Any], Callable[[Any], bool]]] = {
        "train": (lambda: train(world), lambda: links_of(world), lambda found: found == world.links),
        "export": (
            lambda: cli.main(["export", str(run), "--to", "adapter"]),
            lambda: adapter_of(world),
            lambda found: found == world.adapter,
        ),
        "eval": (lambda: evaluate(run), lambda: SCORES, lambda found: _close(found, world.scores)),
        "info": (lambda: cli.main(["info", str(run)]), lambda: None, lambda found: True),
    }
    function, keep, same = actions[action]
    outcome = forked.run(function, keep)
    wrong = fault(outcome, same)
    if wrong is None and outcome.code == 2 and before != _seen(run):
        wrong = "it was refused, but files have changed"
    return Found("run_folder", f"{action} after {what} ({path.relative_to(run)})", wrong, outcome)


def _seen(folder: Path) -> dict[str, bytes | None]:
    """What lies where; links and folders too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != ".lock"
    }


def _close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """The batch size of evaluations may change, which only adds up numbers in another order."""
    pairs = zip(found, expected, strict=True)
    return all(a["model"] == b["model"] and abs(a["loss"] - b["loss"]) < 1e-4 for a, b in pairs)


def writes(world: World, source: random.Random) -> Found:
    """The n-th operation on the disk fails, that one alone or all from then on; the run goes on when there is room."""
    damage.fresh(world.folder / "killed", world.work)
    number, code = source.randrange(60), source.choice((errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT))
    lasting = source.random() < 0.5

    def failing() -> int:
        _fail_at(number, code, lasting)
        return train(world)

    first = forked.run(failing, lambda: links_of(world))
    wrong = fault(first, lambda found: found == world.links)
    if wrong is None:
        second = forked.run(lambda: train(world), lambda: links_of(world))
        wrong = fault(second, lambda found: found == world.links)
        wrong = wrong or (None if second.code == 0 else "it does not go on afterwards")
        first = second if wrong else first
    what = f"{errno.errorcode[code]} at operation {number}{' and after' if lasting else ''}"
    return Found("writes", what, wrong, first)


def _fail_at(number: int, code: int, lasting: bool) -> None:
    def fail(count: int, args: Any) -> None:
        if count == number or (lasting and count > number):
            raise OSError(code, os.strerror(code), str(args[0]))

    _before_operations(fail)


def _before_operations(hook: Callable[[int, Any], None]) -> None:
    """In this process: call `hook` with their number and arguments before all operations by which the store writes."""
    counter = itertools.count()

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            hook(next(counter), args)
            return function(*args, **keys)

        return call

    class Os:
        def __getattr__(self, name: str) -> Any:
            found = getattr(os, name)
            return wrapped(found) if name in ("fsync", "replace", "rename", "mkdir") else found

    store.os = Os()  # type: ignore[assignment]
    store._write_synced = wrapped(store._write_synced)  # type: ignore[assignment]


def kills(world: World, source: random.Random) -> Found:
    """Killed one to three times, between any two operations or amid a file; then the run goes on to the same links, and
    nothing is left behind."""
    work = damage.fresh(world.folder / "killed", world.work)
    if source.random() < 0.5:
        shutil.rmtree(work / "run")
    moments = [source.randrange(90) for _ in range(source.choice((1, 1, 2, 3)))]

    def killed(moment: int) -> int:
        def kill(count: int, args: Any) -> None:
            if count == moment:
                if len(args) == 2 and isinstance(args[1], bytes):
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        _before_operations(kill)
        return train(world)

    for moment in moments:
        forked.run(partial(killed, moment))
    outcome = forked.run(lambda: train(world), lambda: links_of(world))
    wrong = fault(outcome, lambda found: found == world.links)
    if wrong is None and outcome.code != 0:
        wrong = "it does not go on"
    left = [str(p) for p in (work / "run").rglob(".*") if p.name != ".lock"]
    if wrong is None and left:
        wrong = f"left behind: {left}"
    return Found("kills", f"before operations {moments}", wrong, outcome)


def model_files(world: World, source: random.Random) -> Found:
    """A model folder that somebody made: it trains as it is, or is refused before there is a run folder."""
    work = damage.fresh(world.folder / "killed", world.work)
    shutil.rmtree(work / "run")
    path = source.choice(sorted((work / "model").iterdir()))
    what = damage.of_file(source, path)
    outcome = forked.run(lambda: train(world))
    wrong = fault(outcome, lambda found: True)
    if wrong is None and outcome.code == 2 and "step" not in outcome.lines[-1] and (work / "run").exists():
        wrong = "it was refused, but there is a run folder"
    return Found("model_files", what, wrong, outcome)


ROWS: list[dict[str, Any]] = [
    {"text": "w1 w2 it was good", "label": 1},
    {"prompt": "w1 w2", "completion": " good"},
    {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "good w2"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "w1"}], "weight": 0},
            {"role": "assistant", "tool_calls": [{"function": {"name": "w2", "arguments": '{"w3": null}'}}]},
            {"role": "assistant", "content": "good", "train": True},
        ],
        "tools": [{"name": "w2"}],
        "chat_template_kwargs": {"w4": 1},
    },
    {"system": "w3", "conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "good w2"}]},
    {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "good w2"}]},
    {"instruction": "w1", "input": "w2", "output": " good"},
]
TEMPLATES = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}",
    "{{ strftime_now('w%d') }} {{ w4 }} {% for m in messages %}{% generation %}{{ m.content }} "
    "{{ m.tool_calls | tojson if m.tool_calls }}{% endgeneration %} {% endfor %}",
    "{% for m in messages %}{% for n in messages %}{{ n.content }}{% endfor %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages[0].content * 10**9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
)


def data_files(world: World, source: random.Random) -> Found:
    """Rows with a strange value somewhere, or damaged bytes, of every kind of row."""
    work = damage.fresh(world.folder / "killed", world.work)
    shutil.rmtree(work / "run")
    row = source.choice(ROWS)
    path = work / "data" / "rows.jsonl"
    lines = [json.dumps(row)] * 20
    if source.random() < 0.6:
        strange: Any = json.loads(json.dumps(row))
        holder, key = source.choice(list(damage._places(strange)))
        holder[key] = source.choice(damage.STRANGE)
        lines[source.choice((0, 10))] = json.dumps(strange)
        what = f"{key!r} is {str(holder[key])[:40]!r} in {row}"
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(lines) + "\n")
        what = f"{damage.of_bytes(source, path)}, rows of {row}"
    raw = yaml.safe_load((work / "config.yaml").read_text())
    raw["data"] = {"train": str(path), "max_length": 16}
    if "label" in row:
        raw["data"] |= {"template": "{text} it was", "verbalisers": {"0": " bad", "1": " good"}}
    (work / "config.yaml").write_text(yaml.safe_dump(raw))
    if any(isinstance(cell, list) for cell in row.values()):
        (work / "model" / "chat_template.jinja").write_text(source.choice(TEMPLATES))
    outcome = forked.run(lambda: cli.main(["train", str(work / "config.yaml")]))
    return Found("data_files", what, fault(outcome, lambda found: True), outcome)


def configurations(world: World, source: random.Random) -> Found:
    """A YAML file with a strange value somewhere, or damaged bytes."""
    work = damage.fresh(world.folder / "killed", world.work)
    shutil.rmtree(work / "run")
    path = work / "config.yaml"
    if source.random() < 0.6:
        raw = yaml.safe_load(path.read_text())
        holder, key = source.choice([place for place in damage._places(raw) if place[1] != "out"])
        holder[key] = source.choice(damage.STRANGE)
        path.write_text(json.dumps(raw))  # which is YAML, too
        what = f"{key} is {str(holder[key])[:40]!r}"
    else:
        what = damage.of_bytes(source, path)
    outcome = forked.run(lambda: cli.main(["train", str(path), "--dry-run"]))
    return Found("configurations", what, fault(outcome, lambda found: True), outcome)


def adapters(world: World, source: random.Random) -> Found:
    """An adapter that somebody made becomes a link, or is refused, and the chain is as it was."""
    folder = damage.fresh(world.folder / "adapter", world.work / "adapter")
    path = source.choice(sorted(folder.iterdir()))
    what = damage.of_file(source, path)

    def imported() -> int:
        chain = attach(tiny_llama(), r=2)
        before = {name: f.a.clone() for name, f in chain.live_factors().items()}
        try:
            link = chain.import_adapter(folder)
        except UserError as error:
            assert not chain.links
            assert all(torch.equal(f.a, before[name]) for name, f in chain.live_factors().items())
            print(f"cola: {error}")
            return 2
        tensors = safetensors.torch.load((link.contents or {})["adapter_model.safetensors"])
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values()), "a link that is not finite"
        return 0

    outcome = forked.run(imported)
    return Found("adapters", what, fault(outcome, lambda found: True), outcome)


SCENES: dict[str, Callable[[World, random.Random], Found]] = {
    scene.__name__: scene for scene in (run_folder, writes, kills, model_files, data_files, configurations, adapters)
}


def play(world: World, name: str, seed: int) -> Found:
    """The same seed is the same case."""
    return SCENES[name](world, random.Random(f"{name} {seed}"))

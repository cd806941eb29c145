"""Invariant 3: killed anywhere and resumed, a run ends with the links of a run that was never killed, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import snapshot
from .conftest import sealed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed")]  # one process is the parent of every run


def finish(worker: Callable[..., dict[str, Any]], config: str) -> None:
    answer = worker(config)
    assert (answer["killed"], answer["code"]) == (False, 0)


def test_killed_at_every_sub_step(
    worker: Callable[..., dict[str, Any]], config_file: Callable[..., str], tmp_path: Path
) -> None:
    """Two links; every operation of their knots and of the saves around them."""
    short = {
        "data__eval": None,
        "data__eval_share": 0,
        "schedule__links": 2,
        "schedule__steps": 2,
        "train__batch_size": 4,
        "train__save_every": 1,
    }
    whole = worker(config_file(out=str(tmp_path / "whole"), **short))
    assert whole["code"] == 0
    expected = sealed(tmp_path / "whole")
    assert len(expected) == 2
    assert whole["operations"][0] > 50
    for n in range(whole["operations"][0]):
        run = tmp_path / f"killed-{n}"
        config = config_file(out=str(run))
        assert worker(config, kill_at_operation=n)["killed"], f"operation {n} was not reached"
        finish(worker, config)
        assert sealed(run) == expected, f"after a kill at operation {n}"
        leftovers = [p for p in run.rglob(".*") if p.name != ".lock"]
        assert not leftovers, f"after a kill at operation {n}"


def test_killed_at_random_moments(
    worker: Callable[..., dict[str, Any]], config_file: Callable[..., str], tmp_path: Path
) -> None:
    """Dropout, evaluation, best checkpoints and step-down included; some runs are killed several times."""
    long = {"schedule__ranks": [3, 2, 1], "schedule__steps": 18, "train__eval_every": 5}
    for name in ("whole", "again"):  # the first also measures how long imports and caches take; the second, a run
        whole = worker(config_file(out=str(tmp_path / name), **long))
        assert whole["code"] == 0
    expected = sealed(tmp_path / "whole")
    assert sealed(tmp_path / "again") == expected
    source = random.Random()
    kills = runs = 0
    while kills < 12:
        runs += 1
        assert runs < 60, "the runs end before they can be killed"
        run = tmp_path / f"killed-{runs}"
        config = config_file(out=str(run))
        for _ in range(1 + runs % 3):
            kills += worker(config, kill_after=source.uniform(0.05, 0.95) * whole["seconds"])["killed"]
        finish(worker, config)
        assert sealed(run) == expected


@pytest.mark.parametrize(
    "chosen",
    [
        {"schedule__optimizer_state": "reset"},
        {"schedule__optimizer_state": "keep"},
        {"chain__method": ["relora", "pissa"], "schedule__optimizer_state": "prune-random", "schedule__prune": 0.5},
        {"chain__method": "periodic-lora"},
        {"chain__train_also": ["norm"], "chain__train_tokens": [5, 6], "schedule__ranks": [2, 1]},
    ],
    ids=["reset", "keep", "relora-pissa", "periodic", "beside"],
)
def test_interrupted_and_resumed_at_each_step(
    worker: Callable[..., dict[str, Any]], config_file: Callable[..., str], tmp_path: Path, chosen: dict[str, Any]
) -> None:
    """The optimizer-state policy, a start taken out of the weights, and what is trained beside the links, survive a
    kill anywhere around a knot."""
    keys = {**chosen, "schedule__links": 2, "schedule__steps": 4}
    whole = worker(config_file(out=str(tmp_path / "whole"), **keys))
    assert whole["code"] == 0
    for n in range(20, whole["operations"][0], 11):
        run = tmp_path / f"killed-{n}"
        config = config_file(out=str(run))
        worker(config, kill_at_operation=n)
        finish(worker, config)
        assert sealed(run) == sealed(tmp_path / "whole")


@pytest.mark.parametrize("base", ["nf4", "ledger"])
def test_killed_on_a_4_bit_base(
    worker: Callable[..., dict[str, Any]], config_file: Callable[..., str], wide_folder: Path, tmp_path: Path, base: str
) -> None:
    """Amid a fold, too. The second link is trained on the codes that the first one's fold left: equal hashes say that
    those are equal."""
    keys = {"model__name": str(wide_folder), "model__load_in_4bit": True, "chain__base": base, "schedule__links": 2}
    keys |= {"data__eval": None, "data__eval_share": 0}
    whole = worker(config_file(out=str(tmp_path / "whole"), schedule__steps=4, **keys))
    assert whole["code"] == 0
    first, *_, last = whole["folds"]
    assert len(whole["folds"]) >= 2 * 4  # of two links, on four layers
    for n in sorted({first + 1, last, *range(20, whole["operations"][0], 12)}):
        run = tmp_path / f"killed-{n}"
        config = config_file(out=str(run))
        assert worker(config, kill_at_operation=n)["killed"]
        finish(worker, config)
        assert sealed(run) == sealed(tmp_path / "whole")


def test_a_finished_run_is_left_alone(
    worker: Callable[..., dict[str, Any]], config_file: Callable[..., str], tmp_path: Path
) -> None:
    config = config_file()
    finish(worker, config)
    before = snapshot(tmp_path / "run" / "links"), snapshot(tmp_path / "run" / "state")
    finish(worker, config)
    assert (snapshot(tmp_path / "run" / "links"), snapshot(tmp_path / "run" / "state")) == before

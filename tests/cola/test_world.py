"""One run in two processes (gloo, on the CPU): the links of a single process, whatever is killed on the way."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from cola_fast import UserError, cli, config, world
from cola_fast.data.encode import Example
from cola_fast.data.rows import Data
from cola_fast.layers.factors import Factors
from cola_fast.layers.layer import LoRALinear
from cola_fast.layers.weights.sharded import Rows, Sharded
from cola_fast.training import metrics
from cola_fast.training.prepare import prepare

from ..conftest import tiny_llama
from .conftest import sealed

LINKS = 2
ONE_WORKER = pytest.mark.xdist_group("killed")  # the undisturbed runs are made once, by the process of test_crash.py
TWO: dict[str, Any] = {"processes": 2}
SHARDED = {"train": {"shard": True}}


class Runs:
    """Trains in one or two processes; a folder for each name."""

    def __init__(self, worker: Callable[..., dict[str, Any]], folder: Path, raw: dict[str, Any]) -> None:
        self.worker, self.folder, self.raw = worker, folder, raw

    def __call__(self, name: str, changes: dict[str, Any] | None = None, **command: Any) -> dict[str, Any]:
        raw = {key: {**value, **(changes or {}).get(key, {})} for key, value in self.raw.items()}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**raw, "out": str(self.folder / name)}))
        return self.worker(str(path), **command)

    def links(self, name: str) -> torch.Tensor:
        """Every factor of every link, as one fp64 vector."""
        files = sorted((self.folder / name).glob("links/*/adapter_model.safetensors"))
        assert len(files) == LINKS
        return torch.cat([v.double().flatten() for file in files for _, v in sorted(load_file(file).items())])

    def rows(self, name: str) -> list[dict[str, Any]]:
        return metrics.read(self.folder / name)


@pytest.fixture(scope="module")
def runs(
    worker: Callable[..., dict[str, Any]],
    tiny_folder: Path,
    task_files: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Four forward passes a step, so that a rank's two are added up before the ranks' are; five evaluation batches,
    of seven rows with two candidates each, which two ranks do not share evenly; q, k and v in one group, with
    dropout; weights of 49 rows, which do not halve; labels of one token and of two, so that ranks have unequal
    counts."""
    model = tmp_path_factory.mktemp("model") / "odd-llama"
    shutil.copytree(tiny_folder, model)
    tiny_llama(intermediate_size=49).save_pretrained(model)
    raw = {
        "model": {"name": str(model), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": task_files["train"], "eval": task_files["eval"], "format": "classification",
            "template": "{text} it was", "verbalisers": {"0": " bad", "1": " good it"}, "max_length": 32,
        },
        "chain": {"r": 2, "alpha": 4, "targets": "all-linear", "dropout": 0.1},
        "schedule": {"links": LINKS, "steps": 6, "lr": 0.02},
        "train": {"batch_size": 2, "accumulation": 4, "save_every": 2, "log_every": 1, "eval_batch_size": 14},
    }  # fmt: skip
    return Runs(worker, tmp_path_factory.mktemp("world"), raw)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, dict[str, Any]]:
    """Undisturbed runs, by name: in fp64, in one process, and in two."""
    answers = {
        "exact": runs("exact", double=True),
        "single": runs("single"),
        "ddp": runs("ddp", **TWO),
        "fsdp": runs("fsdp", SHARDED, **TWO),
    }
    assert {name: answer["code"] for name, answer in answers.items()} == dict.fromkeys(answers, 0)
    return answers


def require_close(runs: Runs, name: str) -> None:
    """The error rule: against fp64, at most twice the error of the single process."""
    exact = runs.links("exact")
    error, of_one = (float((runs.links(n) - exact).norm() / exact.norm()) for n in (name, "single"))
    assert error <= 2 * of_one + 1e-6


@pytest.mark.slow
@ONE_WORKER
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_the_links_of_one(runs: Runs, whole: dict[str, Any], name: str) -> None:
    """Dropout masks included; and both report the single process's scores and losses."""
    require_close(runs, name)
    for mine, single in zip(runs.rows(name), runs.rows("single"), strict=True):
        assert mine["event"] == single["event"]
        for key in {"loss", "accuracy", "examples", "retained"} & single.keys():
            assert mine[key] == pytest.approx(single[key], rel=1e-5), (key, mine)


@pytest.mark.slow
@ONE_WORKER
def test_a_knot_costs_a_sharded_process_half(runs: Runs, whole: dict[str, Any]) -> None:
    """Of the rows; and what is reported is the fold of all of them."""
    (rows,) = whole["single"]["rows"]
    assert whole["ddp"]["rows"] == [rows, rows]
    odd = 2 * 2 * LINKS  # gate and up of two blocks
    assert whole["fsdp"]["rows"] == [(rows + odd) // 2, (rows - odd) // 2]
    errors = [[row["error"] for row in runs.rows(name) if row["event"] == "knot"] for name in ("ddp", "fsdp")]
    assert len(errors[0]) == LINKS
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


def test_rows_are_rounded_as_in_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = Factors(torch.randn(3, 24), torch.randn(40, 3), 0.3)

    def folded(first: int, count: int) -> torch.Tensor:
        torch.manual_seed(0)
        layer = LoRALinear.from_linear(nn.Linear(24, 40, bias=False, dtype=torch.bfloat16))
        rows = Rows(layer.weight.detach()[first : first + count], first, None)
        monkeypatch.setattr(Sharded, "own_rows", lambda weight: rows)
        Sharded(layer, layer.weight).fold(factors, rounding="stochastic", seed=3, report=False)
        return rows.weight

    assert torch.equal(torch.cat([folded(0, 15), folded(15, 15), folded(30, 10)]), folded(0, 40))


@pytest.mark.slow
@ONE_WORKER
def test_killed_in_knots_and_resumed(runs: Runs, whole: dict[str, Any]) -> None:
    """One sharded run: rank 1 dies as it folds link 0, then rank 0 as it seals link 1, and both times the other one
    ends, too. Resumed in two processes, the links are those of the undisturbed run, bit for bit."""
    folds = whole["fsdp"]["operations"][1] // LINKS
    first = runs("killed", SHARDED, **TWO, rank=1, kill_at_operation=folds // 2)
    assert first["codes"][1] == -9
    assert first["codes"][0] not in (0, -9)
    assert len(sealed(runs.folder / "killed")) == 1
    second = runs("killed", SHARDED, **TWO, kill_at_file="links/.001")
    assert second["codes"][0] == -9
    assert second["codes"][1] not in (0, -9)
    assert runs("killed", SHARDED, **TWO)["code"] == 0
    assert sealed(runs.folder / "killed") == sealed(runs.folder / "fsdp")


@pytest.mark.slow
@ONE_WORKER
def test_resumed_in_another_number_of_processes(runs: Runs, whole: dict[str, Any]) -> None:
    """Two processes begin; rank 0 cannot seal link 1, and both end with the one sentence. One process goes on, with
    nothing sharded."""
    stopped = runs("moved", SHARDED, **TWO, full_at_file="links/.001")
    assert stopped["codes"] == [2, 2]
    assert "could not be written (No space left on device)" in stopped["refusals"][0]
    assert stopped["refusals"][0] == stopped["refusals"][1]
    assert runs("moved")["code"] == 0
    require_close(runs, "moved")


def as_one_of(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_size", count)


def test_a_step_is_dealt_out_evenly(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of(3, monkeypatch)
    with pytest.raises(UserError, match=r"train.accumulation is 4, but 3 processes .* set it to 3 or a multiple"):
        prepare(config.from_dict(runs.raw), Data("text", [Example([1, 2], [1, 2])], [], [], 8))


@pytest.mark.parametrize(("count", "shares"), [(1, [[0, 1, 2]]), (2, [[0, 2], [1, 2]]), (4, [[0], [1], [2], [2]])])
def test_every_item_counts_once(count: int, shares: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of(count, monkeypatch)
    counted = []
    for rank, share in enumerate(shares):
        monkeypatch.setattr(world, "_rank", rank)
        dealt = list(world.dealt(range(3)))
        assert [item for item, _ in dealt] == share
        counted += [item for item, counts in dealt if counts]
    assert sorted(counted) == [0, 1, 2]


def test_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.device("cuda:1") == "cuda:1"
    as_one_of(2, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [world.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UserError, match=r"model.device is cuda:1, but each of 2 processes"):
        world.device("cuda:1")


def test_refuses_a_sharded_4_bit_base(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"train.shard is for 16- and 32-bit weights"):
        config.from_dict(runs.raw, ["train.shard=true", "model.load_in_4bit=true"])


def test_refuses_to_look_into_a_sharded_model(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"train.shard is set, but chain.ranks is gelora"):
        config.from_dict(runs.raw, ["train.shard=true", "chain.ranks=gelora"])


def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, .* start them with torchrun"), world.joined():
        pass


def test_only_training_takes_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    as_one_of(2, monkeypatch)
    with pytest.raises(UserError, match="cola export runs in one process, but 2 were started"):
        cli._require_one_process("export")


ALONE = """
import os, sys
from datetime import timedelta
from cola_fast import cli, world
world.MEETING = timedelta(seconds=2)
if "dies" in sys.argv:
    from torch.distributed.rendezvous import rendezvous
    next(rendezvous("env://", timeout=world.MEETING))
    os._exit(1)
sys.exit(cli.main(["train", "no-such.yaml"]))
"""


def started(rank: int, port: int, *words: str) -> subprocess.Popen[str]:
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    command = [sys.executable, "-c", ALONE, *words]
    return subprocess.Popen(command, env={**os.environ, **launch}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("case", ["nobody came", "nobody listens", "died on the way", "a port in use"])
def test_a_process_does_not_wait_for_one_that_never_comes(case: str) -> None:
    """Within the time in which processes have to come together: a minute, here two seconds."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        if case == "a port in use":
            taken.listen()
        else:
            taken.close()
        other = started(1, port, "dies") if case == "died on the way" else None
        with started(1 if case == "nobody listens" else 0, port) as process:
            said = process.communicate(timeout=120)[1]
        if other is not None:
            other.communicate()
    assert process.returncode == 2, said
    sentence = rf"cola: The 2 processes of this run did not come together at 127\.0\.0\.1:{port} within 2 s \(.+\): see"
    assert re.search(sentence, said), said
    assert "Traceback" not in said


def test_a_process_that_is_lost_is_told_in_a_sentence(runs: Runs) -> None:
    answer = runs("lost", **TWO, rank=1, kill_at_operation=1)
    assert answer["killed"]
    assert answer["codes"][0] == 2
    assert answer["refusals"][0].startswith("Another process of this run has ended, and this one cannot go on alone")

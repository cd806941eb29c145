"""What has become slower is found, and only that."""

from __future__ import annotations

import itertools
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu, harness, linears, regression
from benchmarks.__main__ import main
from cola_kernels import lora_linear


def result(ours: list[float], peer: list[float]) -> dict[str, Any]:
    return {"rows": [{"case": "a", **harness.summarise({"ours": ours, "peer": peer}, "ours")}]}


OLD = result([1.0, 1.1, 1.2, 1.1], [2.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("ours", "peer", "found"),
    [
        pytest.param(1.0, 1.0, 0, id="as before"),
        pytest.param(1.5, 1.0, 1, id="slower"),
        pytest.param(1.05, 1.0, 0, id="within the spread"),
        pytest.param(0.5, 1.0, 0, id="faster"),
        pytest.param(2.0, 2.0, 0, id="a slower machine"),
        pytest.param(1.0, 0.5, 0, id="a faster peer"),
    ],
)
def test_only_what_became_slower_itself_is_found(ours: float, peer: float, found: int) -> None:
    samples = OLD["rows"][0]["samples"]
    new = result([ours * s for s in samples["ours"]], [peer * s for s in samples["peer"]])
    slower = regression.slower(new, OLD)
    assert [each.where for each in slower] == ["rows / a"] * found


def test_rows_are_matched_by_their_case() -> None:
    slow = result([9.0] * 4, [2.0] * 4)["rows"][0]
    assert regression.slower({"rows": [{**slow, "case": "new"}]}, OLD) == []
    assert len(regression.slower({"rows": [{**slow, "case": "new"}, slow]}, OLD)) == 1


def test_the_last_committed_result_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    env = {"device": "One", "threads": 2}
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    assert regression.last_committed("linears", env) is None
    path = harness.result_path("linears", env)
    harness.write_result(path, {"commit": 1})
    subprocess.run([*git, "add", "-A"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=tmp_path, check=True)
    harness.write_result(path, {"commit": 2})
    assert regression.last_committed("linears", env) == {"commit": 1}
    assert regression.last_committed("linears", {**env, "device": "Two"}) is None


def test_a_slowed_op_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = itertools.count(step=1e-3)  # a clock of the test's own: it goes on when it is read, and by the op

    def op(reads: int, *arguments: Any, **options: Any) -> Any:
        for _ in range(reads):
            next(now)
        return lora_linear(*arguments, **options)

    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    monkeypatch.setattr("cola_fast.layers.grouping.lora_linear", partial(op, 1))
    monkeypatch.setattr(linears, "_layers", lambda quick: [linears._layer("fp32", 0.0, 64, "k, v", rounds=5)])
    committed: list[dict[str, Any]] = []
    monkeypatch.setattr(regression, "last_committed", lambda suite, env: committed[0] if committed else None)
    monkeypatch.setattr(linears, "tables", lambda result: {})
    command = ["run", "linears", "--out", str(tmp_path / "out.json")]
    assert main(command) == 0
    committed.append(harness.read(tmp_path / "out.json"))
    monkeypatch.setattr("cola_fast.layers.grouping.lora_linear", partial(op, 30))
    assert main(command) == 1
    assert "rows / k, v, fp32, dropout 0.0, 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [None, "memory", "report"])
def test_the_cpu_command_runs_every_suite_and_says_what_failed(
    failing: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []

    def call(command: list[str], cwd: Path) -> int:
        called.append(command[-1])
        return int(command[-1] == failing)

    monkeypatch.setattr(subprocess, "call", call)
    assert main(["cpu"]) == (0 if failing is None else 1)
    assert called == [*cpu.SUITES, "report"]
    assert failing is None or failing in capsys.readouterr().err

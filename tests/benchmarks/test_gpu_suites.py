"""The suites that a GPU is lent for, rehearsed in small: every line runs here before it runs there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cola_kernels
from benchmarks import convergence, gpu, harness, layers, lora_linear
from benchmarks.__main__ import main
from benchmarks.layers import Problem
from benchmarks.registry import UNFINISHED

pytest.importorskip("peft")
DTYPE = torch.float32


def problem(dropout: float = 0.0) -> Problem:
    return Problem.draw([[(12, 16), (8, 16)], [(10, 24)]], 20, 4, dropout, DTYPE)


# --- sides and their gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["ours", "reference", "peft", "peft_half"])
def test_every_side_passes_the_gate(name: str, dropout: float) -> None:
    p = problem(dropout)
    assert 0 <= layers.check(name, layers.SIDES[name](p), p) <= 1


@pytest.mark.parametrize("factor", [1.02, float("nan")])
@pytest.mark.parametrize("leaf", range(8), ids=["x0", "x1", "a0", "b0", "a1", "b1", "a2", "b2"])
def test_the_gate_sees_every_gradient(leaf: int, factor: float) -> None:
    p = problem()
    side = layers.ours(p)
    side.leaves[leaf].register_hook(lambda gradient: factor * gradient)
    with pytest.raises(harness.ParityError, match=["dX", "dX", "dA0", "dB0", "dA1", "dB1", "dA2", "dB2"][leaf]):
        layers.check("ours", side, p)


def test_the_gate_sees_another_mask() -> None:
    p = problem(0.3)
    side = layers.ours(p)
    wrong = layers.Side(side.forward, side.leaves, lambda: [torch.ones_like(noise) for noise in side.noise()])
    with pytest.raises(harness.ParityError):
        layers.check("ours", wrong, p)


def test_saved_bytes_are_x_and_s_for_ours_and_more_for_peft() -> None:
    p = problem(0.3)
    x_and_s = sum(group.x.nbytes + 20 * 4 * 4 * len(group.members) for group in p.groups)
    seeds = 8 * len(p.groups)
    assert layers.saved_bytes(layers.ours(p), p) == x_and_s + seeds
    assert layers.saved_bytes(layers.peft(p), p) > 2 * x_and_s


def test_a_wrong_op_gets_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = cola_kernels.lora_linear

    def wrong(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, **options: Any) -> Tensor:
        return right(x, w, a, b, 1.02 * scale, **options)

    monkeypatch.setattr(cola_kernels, "lora_linear", wrong)
    out = tmp_path / "out.json"
    assert main(["run", "lora_linear", "--quick", "--out", str(out)]) == 1
    written = json.loads(out.read_text())
    assert written["rows"] == []
    assert len(written["refused"]) == written["cases"] == 4
    assert all("is off by" in row["reason"] for row in written["refused"])


# --- the suites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_cases_are_distinct_and_the_target_comes_first(full: bool) -> None:
    cases = lora_linear.cases(full=full)
    assert len(set(cases)) == len(cases)
    assert cases[0] == lora_linear.Case("Llama 3.1 8B", "block", 8192, 16, 0.0)
    assert sum(n * k for group in cases[0].groups() for n, k in group) == 218_103_808
    if full:
        assert len(cases) == 2 * 5 * 4 * 3 * 2


@pytest.mark.parametrize("suite", ["lora_linear", "kernels", "convergence"])
def test_no_time_leaves_a_whole_file_that_is_gone_on_from(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `convergence` trains and compiles is in the rehearsal below."""
    monkeypatch.setattr(convergence, "_train", lambda size, dtype, seed: [1.0 + seed] * size.steps)
    monkeypatch.setattr(convergence, "_compiled", lambda *_: {"passed": True, "worst_gradient": 0.0, "allowed": 0.0})
    out = tmp_path / "out.json"
    command = ["run", suite, "--quick", "--out", str(out)]
    assert main([*command, "--seconds", "-1"]) == UNFINISHED
    written = json.loads(out.read_text())
    assert not written["complete"]
    assert not written.get("rows")
    if suite != "kernels":  # which needs the interpreter
        assert main(command) == 0
        assert json.loads(out.read_text())["complete"]


def test_what_is_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither what fitted into the time, nor what was measured beside a case that was refused."""
    out, command, calls = tmp_path / "out.json", ["run", "lora_linear", "--quick", "--out"], []
    measure = lora_linear._measure

    def failing(case: Any, **options: Any) -> dict[str, Any]:
        calls.append(case)
        if len(calls) == 2:
            raise harness.ParityError("by accident")
        return measure(case, **options)

    monkeypatch.setattr(lora_linear, "_measure", failing)
    assert main([*command, str(out)]) == 1
    assert main([*command, str(out)]) == 0
    assert calls == [*lora_linear.rehearsal(), lora_linear.rehearsal()[1]]
    assert len(json.loads(out.read_text())["rows"]) == 4


def test_partial_results_are_on_disk_while_a_suite_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.json", []
    measure = lora_linear._measure

    def watched(*arguments: Any, **options: Any) -> dict[str, Any]:
        seen.append(json.loads(out.read_text()) if out.exists() else None)
        return measure(*arguments, **options)

    monkeypatch.setattr(lora_linear, "_measure", watched)
    assert main(["run", "lora_linear", "--quick", "--out", str(out)]) == 0
    assert seen[0] is None
    assert [len(each["rows"]) for each in seen[1:]] == [1, 2, 3]
    assert not any(each["complete"] for each in seen[1:])
    row = json.loads(out.read_text())["rows"][0]
    assert row["samples"].keys() == row["host_seconds"].keys() == {"frozen", *row["saved_bytes"]}
    assert set(row["skipped"]) == {"unsloth", "lorafusion"}
    assert out.with_suffix(".png").stat().st_size > 10_000
    (chart,) = lora_linear.charts(json.loads(out.read_text()))
    assert chart.floor
    assert len(chart.rows) == 2  # the block, with and without dropout


def test_curves_that_part_are_refused() -> None:
    far = {"reference 0": [1.0, 1.0], "reference 1": [1.1, 1.1], "triton 0": [1.2, 1.2], "triton 1": [1.1, 1.1]}
    assert convergence._compare(far)["passed"] is False
    assert convergence._compare({**far, "triton 0": [1.05, 1.05]})["passed"] is True


# --- one command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_gpu_command_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    of_kernels = ("lora_linear", "kernels", "convergence")  # those of training have tests of their own
    monkeypatch.setattr(gpu, "_SUITES", {name: gpu._SUITES[name] for name in of_kernels})
    assert main(["gpu", "--quick", "--out", str(tmp_path), "--seconds", "900"]) == 0, (tmp_path / "log.txt").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["passed"] * 5
    assert summary["parity"]["counts"]["all"]["passed"] > 20
    files = {path.name for path in tmp_path.iterdir()}
    suites = {"lora_linear.json", "lora_linear.png", "kernels.json", "convergence.json"}
    assert files - suites == {"summary.json", "log.txt", next(iter(files - suites - {"summary.json", "log.txt"}))}
    products = json.loads((tmp_path / "kernels.json").read_text())["products"]
    assert {"plain", "addmm", "gemm", "bordered"} <= set(products[0]["samples"])
    curves = json.loads((tmp_path / "convergence.json").read_text())
    assert len(curves["losses"]) == 4
    assert curves["compiled"]["passed"]


def test_a_stage_out_of_time_is_killed_with_its_children_and_a_failed_one_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeper = f"import time; open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(99)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    listed = [
        gpu.Stage("slow", 0.02, ["-c", child]),
        gpu.Stage("broken", 1.0, ["-c", "raise SystemExit(5)"]),
        gpu.Stage("good", 1.0, ["-c", "print('hello {seconds}')"]),
    ]
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu, "stages", lambda out, quick: listed)
    assert gpu.main(tmp_path / "out", 300.0, quick=True) == 1
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert [(s["stage"], s["status"], s["exit_code"]) for s in stages] == [
        ("slow", "out of time", None),
        ("broken", "failed", 5),
        ("good", "passed", 0),
    ]
    assert (tmp_path / "up").exists()
    assert "hello " in (tmp_path / "out" / "log.txt").read_text()


def test_what_no_time_is_left_for_is_not_started(tmp_path: Path) -> None:
    assert gpu.main(tmp_path, 1.0, quick=True) == 1
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert {stage["status"] for stage in stages} == {"not started"}


# what it refuses is a machine without a GPU: with one it would measure for minutes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(tmp_path / "out", 500.0, quick=False) == 2
    assert "--quick" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tests_are_counted_by_dtype(tmp_path: Path) -> None:
    cases = """<testsuites><testsuite>
        <testcase classname="tests.kernels.test_linear" name="test_a[(1, 2)-0.0-bfloat16]"/>
        <testcase classname="tests.kernels.test_linear" name="test_a[(1, 2)-0.0-float16]"><failure/></testcase>
        <testcase classname="tests.kernels.test_merge" name="test_b[torch.float32-nearest]"/>
        <testcase classname="tests.kernels.test_merge" name="test_c"><skipped/></testcase>
    </testsuite></testsuites>"""
    (tmp_path / "junit.xml").write_text(cases)
    found = gpu.count(tmp_path / "junit.xml")
    assert found["counts"]["all"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert found["counts"]["bfloat16"] == {"passed": 1}
    assert found["counts"]["float16"] == {"failed": 1}
    assert found["counts"]["float32"] == {"passed": 1}
    assert found["failed"] == ["tests.kernels.test_linear::test_a[(1, 2)-0.0-float16]"]


def test_stages_need_nothing_installed(tmp_path: Path) -> None:
    path = gpu._environment(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path[:2] == [str(harness.ROOT), str(harness.ROOT / "kernels")]
    assert all(stage.arguments[0] == "-m" for stage in gpu.stages(tmp_path, quick=False))
    assert sum(stage.share for stage in gpu.stages(tmp_path, quick=False)) >= 1

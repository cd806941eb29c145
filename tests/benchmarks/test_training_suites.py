"""The suites of whole training steps, in small: every side trains, memory is what was said, runs can be continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, harness, legs, overhead, profile, train, workloads
from benchmarks.__main__ import main
from benchmarks.legs import Leg
from benchmarks.registry import UNFINISHED
from benchmarks.workloads import Workload
from cola_fast.training.plan import plan_run

pytest.importorskip("peft")
TINY = Workload("tiny", 64, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "workloads"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(workloads, "_folder", lambda: folder)


def run(suite: str, out: Path, *more: str) -> int:
    return main(["run", suite, "--quick", "--out", str(out), *more])


# --- every side and suite ---------------------------------------------------------------------------------------------


def test_every_trainer_follows_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    assert run("train", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    plain, packed = found["rows"]
    assert set(plain["seconds"]) == {"ours", "peft", "trl", "full"}
    assert set(packed["seconds"]) == {"ours", "peft"}
    assert "liger" in plain["skipped"]
    assert plain["tokens_per_step"] == 128
    assert all(len(samples) == 2 for samples in plain["samples"].values())


@pytest.mark.parametrize("suite", ["overhead", "profile"])
def test_a_suite_measures_and_draws(suite: str, tmp_path: Path) -> None:
    assert run(suite, tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    module: Any = {"overhead": overhead, "profile": profile}[suite]
    assert all(chart.rows for chart in module.charts(found))
    if suite == "overhead":
        (knot,) = found["knots"]
        assert 0 < sum(knot["parts"].values()) <= knot["seconds"]["ours"]["median"] * 1.01
    else:
        (row,) = found["rows"]
        assert row["kinds"].keys() >= {"products of the links", "attention", "optimizer and clipping"}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"dropout": 0.05}, id="dropout"),
        pytest.param({"length": 128, "checkpointing": True, "in_4bit": True}, id="4 bits, checkpointing"),
        pytest.param({"batch": 8, "packing": True, "rank": 4}, id="packed"),
        pytest.param({"dtype": "fp32", "targets": ("q_proj", "v_proj")}, id="fp32"),
    ],
)
def test_the_memory_model_is_within_a_tenth_of_the_measured_peak(keys: dict[str, Any]) -> None:
    if keys.get("in_4bit"):
        pytest.importorskip("bitsandbytes")
    workload = Workload(**{"model": "tiny", "length": 64, "batch": 2, **keys})
    need = plan_run(workload.config(2)).need
    measured = legs.measure(Leg(workload, "ours", 2, 2, memory=True))
    assert need.peak == pytest.approx(measured["peak_bytes"], rel=0.1)
    assert measured["weight_bytes"] < measured["peak_bytes"]


def test_checkpointing_and_4_bits_need_less() -> None:
    wide = Workload("tiny", 256, 4)
    full = plan_run(wide.config(1)).need
    saving = plan_run(Workload("tiny", 256, 4, checkpointing=True, in_4bit=True).config(1)).need
    assert full.step is not None
    assert saving.step is not None
    assert saving.step < full.step
    assert saving.weights < full.weights


# --- the gate, and going on -------------------------------------------------------------------------------------------


def leg(losses: list[float]) -> dict[str, Any]:
    return {"samples": [1.0], "losses": losses, "tokens_per_step": 128.0, "attention": "sdpa"}


@pytest.mark.parametrize("wrong", [6.3, float("nan")])
def test_losses_that_part_get_no_figure(wrong: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = {"ours": [6.0, wrong]}
    monkeypatch.setattr(legs, "measure", lambda leg_: leg(measured.get(leg_.side, [6.0, 5.5])))
    assert run("train", tmp_path / "out.json") == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"] == []
    assert len(found["refused"]) == 2


def test_only_the_first_loss_counts_for_another_training() -> None:
    found = {"ours": leg([6.0, 5.5]), "full": leg([6.0, 4.0])}
    assert legs.require_same_training(TINY, found) == 0
    with pytest.raises(harness.ParityError):
        legs.require_same_training(TINY, {**found, "full": leg([5.9, 5.5])})


def test_a_run_out_of_time_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[tuple[str, str]] = []

    def measure(asked: Leg) -> dict[str, Any]:
        measured.append((str(asked.workload), asked.side))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return leg([6.0, 5.5])

    monkeypatch.setattr(legs, "measure", measure)
    out = tmp_path / "out.json"
    assert run("train", out, "--seconds", "-1") == UNFINISHED
    assert measured == []
    with pytest.raises(KeyboardInterrupt):
        run("train", out)
    assert not json.loads(out.read_text())["complete"]
    assert run("train", out) == 0
    assert len(measured) == len(set(measured)) + 1  # only the interrupted one again
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_the_gpu_command_goes_on_with_what_has_not_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    once = f"import os, sys; p = {str(tmp_path / 'ran')!r}; sys.exit(9 if os.path.exists(p) else open(p, 'w').close())"
    later = f"import os, sys; p = {str(tmp_path / 'two')!r}; os.path.exists(p) or sys.exit(open(p, 'w').close() or 3)"
    listed = [gpu.Stage("once", 1.0, ["-c", once]), gpu.Stage("later", 1.0, ["-c", later])]
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(gpu, "stages", lambda out, quick: listed)
    assert gpu.main(tmp_path / "out", 60.0, quick=True) == 1
    assert gpu.main(tmp_path / "out", 60.0, quick=True) == 0
    stages = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["passed", "passed"]


# --- workloads --------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_weights() -> None:
    """2 a weight and token forward and 2 for dX; 2 more where the weights are trained."""
    short = Workload("Llama-8B", 1, 1)
    assert short.flops(1) == pytest.approx(4 * 7.5e9, rel=0.01)  # without the embedding
    assert short.flops(1, full=True) == pytest.approx(6 * 7.5e9, rel=0.01)
    assert Workload("Llama-8B", 8192, 1).flops(1) > short.flops(1)


def test_cases_are_distinct() -> None:
    for kind in ("cpu", "cuda"):
        cases = [str(workload) for workload, _ in train.cases(kind, quick=False)]
        assert len(set(cases)) == len(cases)
        assert all("ours" in sides for _, sides in train.cases(kind, quick=False))

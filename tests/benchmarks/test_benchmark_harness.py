"""Paired timing and its statistics, and the parity rule."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, linears, memory, train, workloads
from benchmarks.harness import ParityError, Spread, device_slug, interleave, require_close, require_parity, summarise
from benchmarks.registry import Options
from benchmarks.workloads import Workload


def test_sides_alternate_and_the_warm_up_is_dropped() -> None:
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = interleave({name: lambda name=name: side(name) for name in "ABC"}, rounds=2, warmup=1)
    assert "".join(calls) == "ABCCBAABC"
    assert samples == {"A": [6.0, 7.0], "B": [5.0, 8.0], "C": [4.0, 9.0]}


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, q1=2.0, q3=4.0, low=1.0, high=5.0, n=5)
    assert Spread.of([1.0, 2.0]) == Spread(median=1.5, q1=1.25, q3=1.75, low=1.0, high=2.0, n=2)
    assert Spread.of([7.0]) == Spread(median=7.0, q1=7.0, q3=7.0, low=7.0, high=7.0, n=1)


def test_a_drifting_machine_does_not_reach_the_ratio() -> None:
    speed = [1.0, 1.0, 1.0, 3.0, 3.0, 9.0, 9.0]  # the machine slows down ninefold
    ratio = Spread.of_ratio([0.8 * s for s in speed], speed)
    assert ratio.median == pytest.approx(0.8)
    assert ratio.high - ratio.low == pytest.approx(0.0)


def test_ratios_are_of_pairs_not_of_medians() -> None:
    ours, theirs = [1.0, 2.0, 9.0], [2.0, 8.0, 3.0]
    assert Spread.of_ratio(ours, theirs).median == 0.5  # of 0.5, 0.25, 3; the medians' would be 2 / 3


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratio([1.0], [1.0, 2.0])


def test_summary_compares_one_side_with_every_other() -> None:
    summary = summarise({"floor": [1.0], "ours": [2.0], "peer": [4.0]}, "ours")
    assert {name: ratio["median"] for name, ratio in summary["ratio"].items()} == {"floor": 2.0, "peer": 0.5}
    assert summary["samples"]["peer"] == [4.0]


def test_parity_allows_twice_the_error_of_plain_pytorch() -> None:
    truth = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    eager = {"y": torch.tensor([1.0, -2.01])}
    shares = require_parity("op", {"y": torch.tensor([1.0, -2.015])}, eager, truth)
    assert shares["y"] == pytest.approx(0.75, rel=1e-3)
    with pytest.raises(ParityError, match="op: y is off"):
        require_parity("op", {"y": torch.tensor([1.0, -2.03])}, eager, truth)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parity_refuses_what_is_not_finite(value: float) -> None:
    truth = {"y": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(ParityError):
        require_parity("op", {"y": torch.tensor([1.0, value])}, {"y": torch.ones(2)}, truth)


def test_parity_refuses_a_missing_gradient() -> None:
    one = torch.ones(1)
    with pytest.raises(ParityError, match="should return y, dA"):
        require_parity("op", {"y": one}, {"y": one, "dA": one}, {"y": one.double(), "dA": one.double()})


def test_losses_have_to_agree_step_by_step() -> None:
    assert require_close("losses", [2.0, 1.01], [2.0, 1.0], tolerance=0.02) == pytest.approx(0.01)
    for wrong in (1.05, math.nan):
        with pytest.raises(ParityError, match="losses"):
            require_close("losses", [2.0, wrong], [2.0, 1.0], tolerance=0.02)


def test_device_slug_tells_machines_apart() -> None:
    assert device_slug({"device": "Intel(R) Xeon(R) Processor", "threads": 2}) == "intel-xeon-processor-2-threads"


# --- kinds of CPU -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPUs")
@pytest.mark.parametrize(
    ("used", "has", "instructions", "dtype", "ends"),
    [
        ("AVX2", "", "AVX2", "fp32", "2-threads"),
        ("AVX2", "avx512 avx512_bf16 amx_tile", "AVX2 forced", "fp32", "2-threads-avx2-forced"),
        ("DEFAULT", "avx512", "DEFAULT forced", "fp32", "2-threads-default-forced"),
        ("AVX512", "avx512", "AVX512", "fp32", "2-threads"),
        ("AVX512", "avx512 avx512_bf16", "AVX512, AVX512_BF16", "bf16", "2-threads"),
        ("AVX512", "avx512 avx512_bf16 amx_tile", "AVX512, AVX512_BF16, AMX", "bf16", "2-threads"),
    ],
    ids=["avx2", "avx2 forced", "none forced", "avx512", "bf16", "amx"],
)
def test_a_kind_of_cpu_is_described_by_what_is_used_of_it(
    used: str, has: str, instructions: str, dtype: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    for name in ("avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has.split())
    env = harness.environment()
    assert (env["instructions"], env["dtype"]) == (instructions, dtype)
    assert device_slug({**env, "device": "AMD EPYC", "threads": 2}) == f"amd-epyc-{ends}"


@pytest.mark.parametrize("native", [True, False], ids=["bf16", "fp32"])
def test_suites_measure_in_what_is_native(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 is emulated, a suite that multiplied in it would take hours, and measure nothing that anybody does."""
    monkeypatch.setattr(harness, "native_bf16", lambda device: native)
    name = "bf16" if native else "fp32"
    for suite in (train, memory):
        for quick in (True, False):
            chosen = [workload for workload, _ in suite.cases("cpu", quick=quick)]
            assert {workload.dtype for workload in chosen} <= {name, "fp32"}
            assert chosen[0].dtype == name
            assert len(set(map(str, chosen))) == len(chosen)
    assert f" {name} " in train._peak_flops(8)["source"]
    monkeypatch.setattr(linears, "_layer", lambda dtype, *case, rounds: {"dtype": dtype})
    assert {row["dtype"] for row in linears.run(Options(quick=True))["rows"]} == {name, "fp32"}


def test_a_4_bit_workload_names_the_dtype_it_computes_in() -> None:
    said = [str(Workload("tiny", 64, 2, in_4bit=True, dtype=dtype)) for dtype in ("bf16", "fp32")]
    assert [line.split(", ")[1] for line in said] == ["QLoRA", "QLoRA in fp32"]  # bf16 is the paper's


@pytest.mark.parametrize("native", [True, False], ids=["bf16", "fp32"])
def test_the_demo_s_losses_are_compared_in_what_is_native(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        def __init__(self, dtype: str, span: int | None = None) -> None:
            self.config = SimpleNamespace(model=SimpleNamespace(dtype=dtype))
            self.attention, self.tokens_per_step = "sdpa", 16.0

    monkeypatch.setattr(harness, "native_bf16", lambda device: native)
    monkeypatch.setattr(workloads, "demo", lambda steps, dtype: dtype)
    monkeypatch.setattr(train, "Problem", Asked)
    monkeypatch.setattr(
        train.trainers, "SIDES", dict.fromkeys(train.DEMO_SIDES, lambda *_: train.trainers.Times([1.0], [2.0, 1.0]))
    )
    demo = train._demo(rounds=1)
    assert list(demo["parity"]) == (["fp32", "bf16"] if native else ["fp32"])
    said = train._demo_note(demo)
    assert ("in bf16 ours came within" in said) == native
    assert ("no instructions for bf16" in said) != native

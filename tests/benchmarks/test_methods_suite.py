"""The suite `methods`: which learning rates it tries, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, methods
from benchmarks.registry import Options
from cola_fast.config import Config, from_dict
from cola_fast.methods import METHODS

LEARNS_AT = {"lora-ga": 2e-4, "adalora": None}  # at the first rate, all others


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, float]]:
    """What was trained. Training itself is left out; it takes minutes."""
    seen: list[tuple[str, float]] = []

    def measure(name: str, rate: float, out: Path, quick: bool) -> dict[str, Any]:
        seen.append((name, rate))
        return {"lr": rate, "links": 1, "ranks": [1, 8], **scores(0.9 if rate == LEARNS_AT.get(name, 1e-3) else 0.5)}

    monkeypatch.setattr(methods, "WORK", tmp_path)
    monkeypatch.setattr(methods, "_measure", measure)
    monkeypatch.setattr(methods, "_score", lambda config, chain: scores(0.5))
    monkeypatch.setattr(methods, "demo_config", lambda settings: None)
    return seen


def scores(accuracy: float) -> dict[str, Any]:
    return {split: {"loss": 1.0, "accuracy": accuracy, "examples": 4} for split in ("validation", "test")}


def test_the_next_rate_is_tried_until_a_method_learns(measured: list[tuple[str, float]]) -> None:
    result = methods.run(Options())
    rates = {name: [rate for each, rate in measured if each == name] for name in METHODS}
    assert rates.pop("lora-ga") == [1e-3, 2e-4]
    assert rates.pop("adalora") == list(methods.RATES)
    assert set(map(tuple, rates.values())) == {(1e-3,)}
    table = methods.tables({**result, "quick": False, "environment": harness.environment()})["methods-demo"]
    assert "| lora-ga | 1 | 1 to 8 | 0.001: 0.500, 0.0002: 0.900 | 1.000 | 0.900 |" in table


def test_it_goes_on_where_it_was(measured: list[tuple[str, float]]) -> None:
    whole = methods.run(Options())
    count = len(measured)
    assert methods.run(Options()) == whole
    assert len(measured) == count
    last = sorted(methods.WORK.glob("full/xgblora/*.json"))[-1]
    last.unlink()
    cut = methods.run(Options(seconds=0))
    assert cut["left"]
    assert [one["method"] for one in cut["methods"]] == [name for name in METHODS if name != "xgblora"]


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_what_is_trained(name: str) -> None:
    """Over what demo.yaml says: all of it but what `NEEDS` gives."""
    raw = {"model": {"name": "m"}, "data": {"train": "t"}, "chain": {"r": 8}, "schedule": {"links": 3, "steps": 80}}
    given: Config = from_dict(raw, methods.settings(name, 1e-3))
    assert given.chain.method == name
    assert given.schedule.lr == 1e-3
    for key, value in methods.leaves(METHODS[name].defaults):
        if key != "schedule.rewarm":
            section, leaf = key.split(".")
            assert getattr(getattr(given, section), leaf) == value

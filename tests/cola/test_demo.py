"""`cola demo` from end to end, on a model and a task small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import assets
from cola_fast.cli import main


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, wide_folder: Path, task_files: dict[str, str], tmp_path: Path) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "smollm2", lambda: wide_folder)
    monkeypatch.setattr(assets, "sentiment", lambda name: {key: Path(file) for key, file in task_files.items()})
    return [
        "data.verbalisers={0: ' bad', 1: ' good'}",
        "data.template='{text} it was'",
        "max_length=32",
        "lr=0.02",
        "epochs=4",
    ]


@pytest.mark.parametrize(
    ("flags", "base", "out"),
    [([], "dense", "demo"), (["--4bit"], "ledger", "demo-4bit"), (["--4bit", "base=nf4"], "nf4", "demo-4bit")],
    ids=["16 bits", "4 bits, ledger", "4 bits, in place"],
)
def test_three_links_scores_and_both_exports(
    small: list[str], flags: list[str], base: str, out: str, capsys: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    assert main(["demo", *flags, *small]) == 0
    run = Path("runs") / out
    record = json.loads((run / "chain.json").read_text())
    assert (record["base_kind"], len(record["links"])) == (base, 3)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["load_in_4bit"] == bool(flags)
    rows = {line[:14].strip(): line[14:].split() for line in capsys.readouterr().out.splitlines()}
    after, merged = float(rows["after 3 links"][1]), float(rows["merged export"][0])
    assert merged == pytest.approx(after, rel=0.02)  # bf16 where the CPU has it
    assert after < float(rows["base"][0])
    assert {path.name for path in (run / "export").iterdir()} == {"adapter", "merged"}
    assert main(["train", str(run / "config.yaml")]) == 0  # done already

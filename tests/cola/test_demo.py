"""`cola demo` from end to end, on a model and a task small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import config
from cola_fast.cli import main
from cola_fast.commands import assets, demo, scores
from cola_fast.commands.demo import Size, Speed, demo_config
from cola_fast.training.evaluate import evaluate

SIZES = (Size("full", 96, 16, 32, 32), Size("half", 48, 8, 16, 20))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, wide_folder: Path, task_files: dict[str, str], tmp_path: Path) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "smollm2", lambda: wide_folder)
    monkeypatch.setattr(assets, "sentiment", lambda name: {key: Path(file) for key, file in task_files.items()})
    monkeypatch.setattr(demo, "SIZES", SIZES)
    return [
        "data.verbalisers={0: ' bad', 1: ' good'}",
        "data.template='{text} it was'",
        "max_length=32",
        "lr=0.02",
        "epochs=4",
        "dtype=fp32",  # in which a dequantised export is exact
    ]


@pytest.fixture
def runs_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A machine of so many seconds a token."""
    return lambda seconds: monkeypatch.setattr(demo, "measure", lambda config: Speed(seconds, seconds))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sentences of every model that was scored on the test set."""
    counts: list[int] = []

    def counted(model: Any, examples: Any, **keys: Any) -> Any:
        counts.append(len(examples))
        return evaluate(model, examples, **keys)

    monkeypatch.setattr(scores, "evaluate", counted)
    return counts


def hashes(run: Path) -> list[str]:
    links = json.loads((run / "chain.json").read_text())["links"]
    return [link["sha256"]["adapter_model.safetensors"] for link in links]


@pytest.mark.parametrize(
    ("flags", "base", "out"),
    [([], "dense", "demo"), (["--4bit"], "ledger", "demo-4bit"), (["--4bit", "base=nf4"], "nf4", "demo-4bit")],
    ids=["16 bits", "4 bits, ledger", "4 bits, in place"],
)
def test_three_links_scores_and_both_exports(
    small: list[str], flags: list[str], base: str, out: str, scored: list[int], capsys: Any
) -> None:
    """The base and each link are scored; the merged export only where its weights are not those of the last link."""
    pytest.importorskip("bitsandbytes")
    assert main(["demo", *flags, *small]) == 0
    run = Path("runs") / out
    record = json.loads((run / "chain.json").read_text())
    assert (record["base_kind"], len(record["links"])) == (base, 3)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["load_in_4bit"] == bool(flags)
    printed = capsys.readouterr()
    rows = {line[:14].strip(): line[14:].split() for line in printed.out.splitlines()}
    after, merged = float(rows["after 3 links"][1]), float(rows["merged export"][0])
    assert merged == pytest.approx(after, abs=2e-4)
    assert after < float(rows["base"][0])
    assert rows["merged export"][3:] == ([] if flags else ["after", "3", "links"])
    assert scored == [32] * (5 if flags else 4)
    assert "With 32 test sentences, an accuracy is known to within" in printed.out
    assert "size: full (96 rows to train on, 32 test sentences)" in printed.err
    assert {path.name for path in (run / "export").iterdir()} == {"adapter", "merged"}
    before = hashes(run)
    assert main(["train", str(run / "config.yaml")]) == 0  # done already
    assert main(["train", str(run / "config.yaml"), "out=anew"]) == 0  # timing steps has changed nothing
    assert hashes(run) == hashes(Path("anew")) == before


def test_a_slow_machine_takes_the_smaller_size_and_says_why(
    small: list[str], runs_at: Callable[[float], None], scored: list[int], capsys: Any
) -> None:
    runs_at(0.05)
    assert main(["demo", *small]) == 0
    chosen = config.load("runs/demo/config.yaml")
    assert (chosen.data.limit, chosen.train.batch_size) == (48, 8)
    assert scored == [20] * 4
    said = capsys.readouterr().err
    assert "size: half (48 rows to train on, 20 test sentences) about" in said
    assert "here, the limit is 170 s; full (96 rows to train on, 32 test sentences) about" in said


def test_the_estimate_counts_the_tokens_that_are_trained_on_and_scored(small: list[str]) -> None:
    for size in SIZES:
        chosen = demo_config(small, size=size)
        data = demo._load(chosen)
        trained = 4 * sum(map(len, data.train))  # epochs
        scored = 4 * sum(map(len, [*data.eval, *data.test]))  # the base and three links
        assert (len(data.train), len(data.eval), len(data.test)) == (size.rows, size.eval, size.test)
        assert demo._seconds(chosen, Speed(1.0, 0.0)) == pytest.approx(trained)
        assert demo._seconds(chosen, Speed(0.0, 1.0)) == pytest.approx(scored)


def test_the_smallest_size_is_taken_however_slow_the_machine_is(
    small: list[str], runs_at: Callable[[float], None], capsys: Any
) -> None:
    runs_at(1e6)
    assert demo._fitting(lambda size: demo_config(small, size=size)).data.limit == 48
    assert "more than 170 s, but the smallest; full (96 rows" in capsys.readouterr().err


def test_the_same_command_goes_on_in_the_size_of_the_run(
    small: list[str], runs_at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runs_at(0.05)
    with monkeypatch.context() as patch:  # a run that is stopped before its scores
        patch.setattr(demo, "score_run", lambda *a, **k: pytest.fail("scored"))
        patch.setattr("cola_fast.cli._run_training", _stopped)
        assert main(["demo", *small]) == 130
    before = hashes(Path("runs/demo"))
    runs_at(0.0)  # the machine is idle now
    assert main(["demo", *small]) == 0
    assert "size: half, as runs/demo was started" in capsys.readouterr().err
    assert hashes(Path("runs/demo")) == before
    assert main(["demo", *small, "lr=0.01"]) == 2  # another configuration is still refused
    assert "schedule.lr was 0.02, is 0.01" in capsys.readouterr().err


def _stopped(config: Any) -> int:
    from cola_fast.training.trainer import train

    train(config, quiet=True)
    return 130


def test_what_the_user_says_wins_over_the_choice(
    small: list[str], runs_at: Callable[[float], None], task_files: dict[str, str], capsys: Any
) -> None:
    own = [*small, "epochs=1", "limit=64", f"data.test={task_files['test']}"]
    runs_at(1e6)
    for _ in range(2):  # and once more, to resume
        assert main(["demo", *own]) == 0
        chosen = config.load("runs/demo/config.yaml")
        assert (chosen.data.limit, chosen.train.batch_size) == (64, 8)
        assert chosen.data.test == task_files["test"]
    runs_at(1e6)
    assert main(["demo", *small, "epochs=1", "--size", "full", "out=runs/full"]) == 0
    assert config.load("runs/full/config.yaml").data.limit == 96
    capsys.readouterr()
    assert main(["demo", *small, "--size", "ful"]) == 2
    assert "--size is ful, but the demo's sizes are full, half. Did you mean full?" in capsys.readouterr().err


def test_the_demos_sizes_are_named_from_the_largest_to_the_smallest() -> None:
    """`limit` holds for each file, so it must not cut the test sentences."""
    for larger, smaller in zip(demo.SIZES, demo.SIZES[1:], strict=False):
        assert larger.rows > smaller.rows
        assert larger.test >= smaller.test
    assert all(size.test <= size.rows and size.eval <= size.rows for size in demo.SIZES)
    assert demo.SIZES[0] == Size("full", 1280, 16, assets.SPLITS["eval"], assets.SPLITS["test"])

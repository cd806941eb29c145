"""What a run folder goes on with: the same configuration, weights and examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_fast import UserError, config
from cola_fast.training import metrics, models, trainer
from cola_fast.training.run import load_config

from ..conftest import snapshot, tiny_llama


def train(path: str, *overrides: str) -> trainer.Result:
    return trainer.train(config.load(path, overrides), quiet=True)


def train_until(step: int, path: str, *overrides: str) -> None:
    """Dies in that step."""
    set_lr, calls = trainer.set_lr, []

    def dying(*args: Any) -> None:
        calls.append(args)
        if len(calls) == step:
            raise RuntimeError("killed")
        set_lr(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "set_lr", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(path, *overrides)


def test_other_keys_are_refused(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file()
    train(path)
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"another configuration \(schedule.lr was 0.02, is 0.5\)"):
        train(path, "lr=0.5")
    assert snapshot(tmp_path / "run") == before
    pattern, elsewhere = "chain.rank_pattern={q_proj: 1}", f"out={tmp_path}/elsewhere"
    train(path, pattern, elsewhere)
    with pytest.raises(UserError, match=r"another configuration \(chain.rank_pattern.q_proj was 1, is None"):
        train(path, elsewhere)


@pytest.mark.parametrize("change", ["log_every=7", "chain.method=[cola]"])
def test_what_changes_no_link_is_accepted(change: str, config_file: Callable[..., str], tmp_path: Path) -> None:
    train(config_file())
    train(config_file(), change)
    written = load_config(tmp_path / "run")
    assert written == config.load(config_file(), [change])


def test_other_weights_and_other_data_are_refused(
    config_file: Callable[..., str], tmp_path: Path, tiny_folder: Path, task_files: dict[str, str]
) -> None:
    """Data of as many rows, with other labels."""
    train(config_file())
    shutil.copytree(tiny_folder, tmp_path / "other")
    tiny_llama(seed=4).save_pretrained(tmp_path / "other")
    rows = [json.loads(line) for line in Path(task_files["train"]).read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))
    before = snapshot(tmp_path / "run")
    other_model = f"model.name={tmp_path / 'other'}"
    with pytest.raises(UserError, match=r"model.name was .* If the model has only moved, write its new name into"):
        train(config_file(), other_model)
    with pytest.raises(UserError, match="The data is not what this run was started with"):
        train(config_file(), f"data.train={other}")
    assert snapshot(tmp_path / "run") == before
    rename_model(tmp_path, tiny_folder, "other")
    with pytest.raises(UserError, match="this model's weights differ"):
        train(config_file(), other_model)


def rename_model(tmp_path: Path, old: Path, new: str) -> None:
    written = tmp_path / "run" / "config.yaml"
    written.write_text(written.read_text().replace(str(old), str(tmp_path / new)))


def test_a_model_and_data_that_have_moved_are_the_same(
    config_file: Callable[..., str], tmp_path: Path, tiny_folder: Path, task_files: dict[str, str]
) -> None:
    train_until(6, config_file())
    shutil.copytree(tiny_folder, tmp_path / "moved")
    shutil.copy(task_files["train"], tmp_path / "moved.jsonl")
    rename_model(tmp_path, tiny_folder, "moved")
    result = train(config_file(), f"model.name={tmp_path / 'moved'}", f"data.train={tmp_path / 'moved.jsonl'}")
    assert (result.links, result.steps) == (3, 12)
    assert load_config(tmp_path / "run").data.train == str(tmp_path / "moved.jsonl")


def test_a_configuration_of_the_user_s_own_in_the_run_folder(config_file: Callable[..., str], tmp_path: Path) -> None:
    """It says auto, which the run's own copy never does."""
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.yaml"
    shutil.copy(config_file(model__dtype="auto"), path)
    train(str(path))
    assert load_config(tmp_path / "run").model.dtype in ("bf16", "fp32")
    train(config_file())  # auto again


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_the_dtype_stays_what_it_was(
    native: bool, expected: str, config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is another dtype on the machine where the run is resumed."""
    path = config_file(model__dtype="auto")
    monkeypatch.setattr(models, "native_bf16", lambda device: native)
    train_until(6, path)
    monkeypatch.setattr(models, "native_bf16", lambda device: not native)
    seen = []
    load = trainer.load_base
    monkeypatch.setattr(trainer, "load_base", lambda c: seen.append(c.model.dtype) or load(c))
    train(path)
    assert [*seen, load_config(tmp_path / "run").model.dtype] == [expected] * 2
    with pytest.raises(UserError, match=r"another configuration \(model.dtype"):
        train(path, f"model.dtype={'fp32' if native else 'bf16'}")


def test_logged_losses_are_those_of_a_run_that_never_stopped(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file(train__log_every=4, train__save_every=3, schedule__links=1)
    train(path, f"out={tmp_path / 'whole'}")
    train_until(7, path)
    train(path)
    whole, resumed = (
        [(row["step"], row["loss"]) for row in metrics.read(tmp_path / name) if row["event"] == "train"]
        for name in ("whole", "run")
    )
    assert [step for step, _ in whole] == [1, 4, 8, 12]
    assert resumed == whole

"""A chain's folder: moving to another one, a disk that refuses, and states that are lost."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cola_fast import Chain, UserError, attach, load_chain, store
from cola_fast.chain.best import load_best, save_best
from cola_fast.chain.chain_json import newest_state, read_record, state_files
from cola_fast.errors import Note
from cola_fast.training import trainer

from ..conftest import disturb, snapshot, tiny_llama
from .test_trainer import hashes, rows, train


def with_a_link(model: nn.Module) -> Chain:
    chain = attach(model, r=2)
    disturb(chain)
    chain.tie()
    chain.extend()
    return chain


def refuse(monkeypatch: pytest.MonkeyPatch, names: Callable[[Path], bool]) -> None:
    """No space for the files that `names` names."""
    write = store._write_synced

    def full(path: Path, data: bytes) -> None:
        if names(path):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(store, "_write_synced", full)


# --- another folder ---------------------------------------------------------------------------------------------------


def test_a_second_folder_holds_the_whole_chain(model: nn.Module, tmp_path: Path) -> None:
    chain = with_a_link(model)
    for name in ("a", "b"):
        chain.save(tmp_path / name)
    loaded = load_chain(tiny_llama(), tmp_path / "b")
    loaded.save(tmp_path / "c")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    again = load_chain(tiny_llama(), tmp_path / "c")
    weights = ({n: layer.weight for n, layer in each.layers.items()} for each in (chain, loaded, again))
    for first, second, third in zip(*(each.values() for each in weights), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)


@pytest.mark.parametrize("file", ["chain.json", ".pt", "adapter_model"])
def test_a_folder_that_cannot_be_written_is_not_moved_to(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    chain = with_a_link(model)
    chain.save(tmp_path / "old")
    with monkeypatch.context() as patch:
        refuse(patch, lambda path: file in path.name)
        with pytest.raises(UserError, match="No space left"):
            chain.save(tmp_path / "new")
    assert not (tmp_path / "new" / "chain.json").exists()
    shutil.rmtree(tmp_path / "new")
    disturb(chain)
    chain.tie()
    assert len(read_record(tmp_path / "old")["links"]) == 2
    chain.save(tmp_path / "new")
    assert len(load_chain(tiny_llama(), tmp_path / "new").links) == 2


def test_a_detached_chain_is_not_written(model: nn.Module, tmp_path: Path) -> None:
    chain = with_a_link(model)
    chain.save(tmp_path / "run")
    before = snapshot(tmp_path / "run")
    chain.detach()
    for action in (lambda: chain.save(tmp_path / "run"), lambda: chain.export_adapter(tmp_path / "adapter")):
        with pytest.raises(UserError, match=r"detached|no link to export"):
            action()
    assert snapshot(tmp_path / "run") == before


def test_a_tie_counts_once_its_link_is_folded(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no space left to say what the fold kept: the next save does."""
    chain = with_a_link(model)
    chain.save(tmp_path)
    disturb(chain)
    records = []
    with monkeypatch.context() as patch:
        refuse(patch, lambda path: path.name.startswith(".chain.json.") and len(records.append(path) or records) > 1)
        chain.tie()
    assert read_record(tmp_path)["links"][1]["fold"] == {}
    chain.extend()
    chain.save(tmp_path)
    assert read_record(tmp_path)["links"][1]["fold"]["retained"] > 0.99


def test_a_best_checkpoint_is_replaced_at_once(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any of its operations, the folder holds the best checkpoint from before or the new one, whole; also
    where it has been moved to another disk, behind a link."""
    chain = with_a_link(model)
    chain.save(tmp_path / "run")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run" / "best").symlink_to(tmp_path / "disk")
    kinds = ("_write_synced", "_sync_folder", "remove", "os.replace", "os.rename")
    for number in itertools.count():
        disturb(chain, seed=2 * number)
        save_best(chain, tmp_path / "run", step=1, loss=2.0)
        disturb(chain, seed=2 * number + 1)
        with monkeypatch.context() as patch:
            calls = itertools.count()
            for kind in kinds:
                patch.setattr(f"cola_fast.store.{kind}", dying(attribute(store, kind), number, calls))
            try:
                save_best(chain, tmp_path / "run", step=2, loss=1.0)
                break
            except KeyboardInterrupt:
                pass
        found = load_best(tiny_llama(), tmp_path / "run").open_factors()
        steps = json.loads((tmp_path / "disk" / "best.json").read_text())["step"]
        assert steps in (1, 2)
        if steps == 2:
            assert all(torch.equal(found[name].b, f.b) for name, f in chain.open_factors().items())
        store.sweep(tmp_path / "disk")
        save_best(chain, tmp_path / "run", step=2, loss=1.0)
        assert len(list((tmp_path / "disk").iterdir())) == 2
    assert number > 5
    assert (tmp_path / "run" / "best").is_symlink()


def attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def dying(function: Callable[..., Any], at: int, calls: Iterator[int]) -> Callable[..., Any]:
    def call(*args: Any, **keys: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **keys)

    return call


# --- states that are lost ---------------------------------------------------------------------------------------------


def test_a_run_without_its_states_is_not_trained_again(config_file: Callable[..., str], tmp_path: Path) -> None:
    train(config_file())
    shutil.rmtree(tmp_path / "run" / "state")
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"has 3 sealed links, but no readable state .* set `out` to a new folder"):
        train(config_file())
    assert snapshot(tmp_path / "run") == before


def test_a_state_of_an_earlier_link_is_not_gone_on_from(
    config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a tie and the next save, and the newest state is damaged: the one before is in the sealed link."""
    path = config_file(train__save_every=2)
    open_link = trainer._Loop._open_link

    def killed(loop: Any) -> None:
        if loop.at.link == 1:
            raise KeyboardInterrupt
        open_link(loop)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Loop, "_open_link", killed)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    run = tmp_path / "run"
    newest = state_files(run)[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:100])
    state, passed = newest_state(run, read_record(run))
    assert state is not None
    assert str(newest) in passed[0]
    assert not state["extra"]["position"]["knot_due"]
    with pytest.raises(UserError, match=r"has 1 sealed links, but the newest readable state is of link 1 "):
        train(path)
    newest.write_bytes(whole)
    assert train(path).links == 3


def test_factors_that_are_not_finite_are_not_saved(
    config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient overflows in a step whose loss is finite, and that step saves: the state before it is the last."""
    path = config_file(out=str(tmp_path / "whole"))
    train(path)
    path = config_file(out=str(tmp_path / "run"))
    set_lr = trainer.set_lr
    steps = []

    def overflow(optimizer: torch.optim.Optimizer, lr: float) -> None:
        steps.append(lr)
        set_lr(optimizer, float("inf") if len(steps) == 8 else lr)

    monkeypatch.setattr(trainer, "set_lr", overflow)
    with pytest.raises(UserError, match=r"factors became NaN or infinite at step 8: .* keeps its last good state"):
        train(path)
    monkeypatch.undo()
    train(path)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_rows_of_a_run_that_had_not_begun_are_dropped(
    config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first save, after the first evaluation."""

    def killed(loop: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Loop, "_open_link", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config_file())
    assert len(rows(tmp_path / "run", "eval")) == 1
    train(config_file())
    steps = [row["step"] for row in rows(tmp_path / "run", "eval")]
    assert steps == sorted(set(steps))


def test_a_log_that_cannot_be_written_does_not_stop_a_run(config_file: Callable[..., str], tmp_path: Path) -> None:
    """There is a folder in place of the file; that is said once, not with every row."""
    path = config_file()
    train(path, f"out={tmp_path / 'whole'}")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "config.yaml", tmp_path / "run" / "config.yaml")
    with pytest.warns(Note, match=r"metrics.jsonl could not be written \(Is a directory\)") as said:
        train(path)
    assert len([w for w in said if "metrics.jsonl" in str(w.message)]) == 1
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")

"""A run folder that was changed, is somebody else's, or is written by two processes at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from cola_fast import UserError, attach, cli, config, load_chain, store
from cola_fast.chain.chain_json import state_files
from cola_fast.commands import report
from cola_fast.errors import Note
from cola_fast.training import metrics, out_of_memory, trainer

from ..conftest import disturb, snapshot, tiny_llama
from .test_resuming import train_until
from .test_trainer import hashes, train


@pytest.fixture
def run(config_file: Callable[..., str], tmp_path: Path) -> Path:
    """A finished run of two links."""
    train(config_file(schedule__links=2, schedule__steps=4, train__batch_size=4))
    return tmp_path / "run"


def edit(path: Path, **keys: Any) -> None:
    """`section__key=value` in a configuration."""
    raw = yaml.safe_load(path.read_text())
    for key, value in keys.items():
        section, name = key.split("__")
        raw[section][name] = value
    path.write_text(yaml.safe_dump(raw))


CHANGES = {"chain__dropout": 0.3, "chain__alpha": 1.0, "train__seed": 5, "schedule__lr": 0.5, "data__max_length": 9}


@pytest.mark.parametrize("key", CHANGES)
def test_a_configuration_that_was_changed_with_the_run_s_copy(key: str, run: Path) -> None:
    """Somebody edits RUN/config.yaml and gives it to `cola train`: both say the same, but the links do not."""
    edit(run / "config.yaml", **{key: CHANGES[key]})
    before = snapshot(run)
    name = key.replace("__", ".")
    with pytest.raises(UserError, match=rf"another configuration \({name} was .*, is {CHANGES[key]}\)"):
        train(str(run / "config.yaml"))
    for action in (lambda: report.score_run(run), lambda: report.export_run(run, "adapter")):
        with pytest.raises(UserError, match=rf"config.yaml is not what the run was trained with \({name} was"):
            action()
    assert snapshot(run) == before


def test_a_run_is_exported_on_another_device_than_it_was_trained_on(run: Path) -> None:
    """Trained on a GPU, exported where there is none: config.yaml says where."""
    edit(run / "config.yaml", model__device="auto")
    report.export_run(run, "adapter")
    assert (run / "export" / "adapter" / "adapter_model.safetensors").exists()


def test_code_of_somebody_else_s_folder_is_not_run(
    run: Path, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.yaml asks for it; only the command line may."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import *\n")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.LlamaConfig", "AutoModelForCausalLM": "evil.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "evil"}))
    edit(run / "config.yaml", model__name=str(folder), model__trust_remote_code=True)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    file = str(run / "config.yaml")
    commands = (["eval", str(run)], ["export", str(run), "--to", "adapter"], ["train", file])
    for command in (*commands, ["train", file, "--dry-run"]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert "asks to run code that comes with the model" in said
        assert "--trust-remote-code" in said or "model.trust_remote_code=true" in said
        assert not (tmp_path / "ran").exists()


def test_a_run_goes_on_from_the_state_before_a_damaged_one(
    config_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte of it decides: 40 flips all over the file give the same links, and a sentence."""
    path = config_file(schedule__links=1, schedule__steps=6, train__batch_size=4)
    train(path, f"out={tmp_path / 'whole'}")
    train_until(6, path)
    newest = state_files(tmp_path / "run")[-1]
    data = newest.read_bytes()
    for number in range(40):
        place = number * (len(data) - 1) // 39
        newest.write_bytes(data[:place] + bytes([data[place] ^ (1 << number % 8)]) + data[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            store.load_tensors(newest)
    assert cli.main(["export", str(tmp_path / "run"), "--to", "adapter"]) == 2
    assert "The open link was in it" in capsys.readouterr().err
    assert cli.main(["train", path]) == 0
    assert f"{newest} is damaged (its checksum differs). Going on from step 2" in capsys.readouterr().err
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_memory_that_runs_out_in_a_step(
    config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses in step 3. The memory model knows what would fit; the run goes on when there is more."""
    path = config_file(schedule__links=1, schedule__steps=4, train__batch_size=12, train__save_every=1)
    plans = {rows: report.plan_run(config.load(path, [f"train.batch_size={rows}"])).need for rows in (12, 6, 3, 2)}
    monkeypatch.setattr(out_of_memory, "available", lambda device: int(plans[3].peak / out_of_memory.SAFE) + 1)
    calls: list[int] = []

    def refused(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return torch.empty(2**60) if len(calls) == 3 else summed(model, batch)

    summed = trainer._summed_loss
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_summed_loss", refused)
        sentence = r"Memory ran out with train.batch_size 12: train.batch_size=3 train.accumulation=4 needs about"
        with pytest.raises(UserError, match=sentence):
            train(path)
    assert train(path).steps == 4
    train(path, f"out={tmp_path / 'whole'}")
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_of_two_exports_into_one_folder_one_is_kept_whole(model: nn.Module, tmp_path: Path, kind: str) -> None:
    """The second one begins and ends while the first is being written."""
    chains = {r: attach(tiny_llama(), r=r) for r in (1, 4)}
    for chain in chains.values():
        disturb(chain)
    export = {r: getattr(chain, f"export_{kind}") for r, chain in chains.items()}
    target = tmp_path / "out"
    store_sync = store._sync_folder

    def second_first(path: Path) -> None:
        store._sync_folder = store_sync
        export[1](target)
        store_sync(path)

    store._sync_folder = second_first
    try:
        with pytest.raises(UserError, match="has been written by another process meanwhile"):
            export[4](target)
    finally:
        store._sync_folder = store_sync
    alone = tmp_path / "alone"
    export[1](alone)
    assert snapshot(target) == snapshot(alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "out"]


def test_a_killed_export_leaves_nothing_for_long(model: nn.Module, tmp_path: Path) -> None:
    """The next one to the same place removes what a dead process has left there, but not what a living one holds."""
    (tmp_path / ".out.dead.part").mkdir()
    chain = attach(model, r=1)
    with store._held(tmp_path / ".out.dead.part"):
        chain.export_adapter(tmp_path / "out")
        assert (tmp_path / ".out.dead.part").exists()
    shutil.rmtree(tmp_path / "out")
    chain.export_adapter(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on, with a note; where there are locks, one that is taken is refused. (For ENOSYS, new versions of
    filelock have a way of their own.)"""
    with store.lock(tmp_path), pytest.raises(UserError, match="Another process is training in"), store.lock(tmp_path):
        pass

    def refused(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.warns(Note, match="knows no locks: take care"), store.lock(tmp_path):
        (tmp_path / "reached").touch()
    assert (tmp_path / "reached").exists()


# --- logs and terminals -----------------------------------------------------------------------------------------------

ODD_ROWS = {
    "not UTF-8": b'{"event": "train", "step": 1, "link": 0, "loss": 1.0, "x": "\xff"}\n',
    "not JSON": b"}{\n",
    "a list": b"[1]\n",
    "no step": b'{"event": "train"}\n',
    "a step in words": b'{"event": "train", "step": "one", "link": 0, "loss": 1.0}\n',
    "a loss in words": b'{"event": "train", "step": 1, "link": 0, "loss": "low"}\n',
    "another event": b'{"event": "lunch", "step": 1, "link": 0}\n',
    "nested": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("row", ODD_ROWS)
def test_an_odd_row_of_the_log_stops_nothing(row: str, config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file(schedule__links=1, schedule__steps=3, train__batch_size=4)
    train_until(3, path)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(ODD_ROWS[row] + log.read_bytes() + ODD_ROWS[row])
    assert train(path).steps == 3
    assert [r["step"] for r in metrics.read(tmp_path / "run") if r["event"] == "train"] == [1, 2, 3]
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("stderr", ["closed", "/dev/full", "broken pipe"])
def test_a_terminal_that_is_gone_stops_nothing(stderr: str, config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file(schedule__links=1, schedule__steps=3, train__batch_size=4)
    command = f"{sys.executable} -m cola_fast.cli train {path} log_every=1 > {tmp_path / 'out'}"
    ends = {"closed": "2>&-", "/dev/full": "2>/dev/full", "broken pipe": "2> >(exec true)"}
    done = subprocess.run(["bash", "-c", f"{command} {ends[stderr]}"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert "1 links in 3 steps" in (tmp_path / "out").read_text()


def test_ctrl_c_amid_an_import(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some libraries turn it into an error of their own."""

    def importing(arguments: Any) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("Encountered an error while initializing the extension.") from None
        return 0

    monkeypatch.setattr(cli, "_run", importing)
    assert cli.main(["train", "x.yaml"]) == 130
    assert capsys.readouterr().err == "cola: stopped at once; the run folder is at its last saved state.\n"
    monkeypatch.setattr(cli, "_run", lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        cli.main(["train", "x.yaml"])


def test_results_that_cannot_be_written(run: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cola_fast.cli", "info", str(run)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (
        2,
        "cola: The result could not be written (No space left on device): send it elsewhere.\n",
    )


def test_what_comes_out_of_files_does_not_steer_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = store.read_sealed(run / "chain.json")[0]
    record["base"]["name"] = "\x1b]0;mine\x07\x9b2J\u202e"
    record["open"] = None
    store.write_sealed(run / "chain.json", record)
    assert cli.main(["info", str(run)]) == 0
    assert r"base     \x1b]0;mine\x07\x9b2J\u202e, dense" in capsys.readouterr().out
    assert cli.main(["info", "no\x1b[2Jsuch"]) == 2
    assert r"no\x1b[2Jsuch" in capsys.readouterr().err


HOSTILE_PATHS = {
    "too long": "x" * 5000,
    "NUL": "a\0b",
    "surrogate": "\udcff\ud800",
    "a file": __file__,
    "/dev/null": "/dev/null",
    "nobody's home": "~nobody_at_all/run",
}


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_paths_that_no_folder_has(name: str, run: Path, config_file: Callable[..., str], tmp_path: Path) -> None:
    path = HOSTILE_PATHS[name]
    chain = attach(tiny_llama(), r=1)
    actions: list[Callable[[], Any]] = [
        lambda: report.describe(path),
        lambda: report.score_run(path),
        lambda: report.export_run(run, "adapter", out=path),
        lambda: report.export_run(run, "merged", out=path),
        lambda: chain.save(path),
        lambda: chain.export_adapter(path),
        lambda: load_chain(tiny_llama(), path),
        lambda: train(config_file(out=path)),
    ]
    before = snapshot(tmp_path / "run")
    for action in actions:
        with pytest.raises(UserError):
            action()
    assert snapshot(tmp_path / "run") == before

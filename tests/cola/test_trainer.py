"""The training loop: what it learns, when it stops, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cola_fast import UserError, config, store
from cola_fast.chain.attach import load_chain
from cola_fast.chain.best import load_best
from cola_fast.chain.chain_json import load_state, read_record
from cola_fast.commands.report import dry_run
from cola_fast.training import metrics, trainer
from cola_fast.training.models import load_model

from ..conftest import snapshot


def train(path: str, *overrides: str) -> trainer.Result:
    return trainer.train(config.load(path, overrides), quiet=True)


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in metrics.read(run) if row["event"] == event]


def hashes(run: Path) -> list[str]:
    record = json.loads((run / "chain.json").read_text())
    return [link["sha256"]["adapter_model.safetensors"] for link in record["links"]]


def test_it_learns_the_task_and_writes_everything(config_file: Callable[..., str], tmp_path: Path) -> None:
    result = train(config_file(schedule__steps=60))
    run = tmp_path / "run"
    assert (result.links, result.steps) == (3, 60)
    assert result.score is not None
    assert result.score.accuracy is not None
    assert result.score.accuracy >= 0.9
    evals = rows(run, "eval")
    assert evals[0]["step"] == 0
    assert evals[0]["accuracy"] < 0.8
    assert [row["step"] for row in evals] == [0, 20, 40, 60]
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 61))
    assert [(row["link"], row["step"]) for row in rows(run, "knot")] == [(0, 20), (1, 40), (2, 60)]
    assert {p.name for p in run.iterdir()} == {
        ".lock", "config.yaml", "chain.json", "links", "state", "best", "metrics.jsonl", "curves.png",
    }  # fmt: skip
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert config.load(run / "config.yaml") == config.load(config_file())


def test_a_logged_loss_is_the_mean_since_the_last_row(config_file: Callable[..., str], tmp_path: Path) -> None:
    for name, every in (("fine", 1), ("coarse", 4)):
        train(config_file(out=str(tmp_path / name), train__log_every=every, schedule__links=1))
    fine = [row["loss"] for row in rows(tmp_path / "fine", "train")]
    coarse = {row["step"]: row["loss"] for row in rows(tmp_path / "coarse", "train")}
    means = {1: fine[0], 4: sum(fine[1:4]) / 3, 8: sum(fine[4:8]) / 4, 12: sum(fine[8:12]) / 4}
    assert coarse == pytest.approx(means)


def test_the_same_seed_gives_the_same_links(config_file: Callable[..., str], tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config_file(out=str(tmp_path / name), train__seed=seed))
        found.append(hashes(tmp_path / name))
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_one_link_is_plain_lora(config_file: Callable[..., str], tmp_path: Path) -> None:
    """The loop's first link equals a LoRA fine-tune written out by hand."""
    from cola_fast import attach
    from cola_fast.data.batches import Feed
    from cola_fast.data.loss import batch_loss, needed_logits
    from cola_fast.data.rows import load_data
    from cola_fast.training.models import context_length, load_tokenizer

    path = config_file(schedule__links=1, schedule__steps=5, chain__dropout=0, train__clip=None)
    train(path)
    c = config.load(path)
    model = load_model(c.model).train()
    chain = attach(model, r=2, alpha=4)
    data = load_data(c.data, load_tokenizer(c.model), context=context_length(model), seed=0)
    feed = Feed(data.train, c.train, max_length=data.max_length)
    optimizer = torch.optim.AdamW(chain.parameters(), weight_decay=0.0, fused=True)
    for step in range(5):
        batch = next(feed)
        total, count = batch_loss(needed_logits(model, batch), batch)
        (total / count).backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 5)
        optimizer.step()
        optimizer.zero_grad()
    sealed = load_chain(load_model(c.model), tmp_path / "run").links[0].factors()
    for name, f in chain.open_factors().items():
        torch.testing.assert_close(sealed[name].a, f.a)
        torch.testing.assert_close(sealed[name].b, f.b)


def test_accumulation_equals_a_larger_batch(config_file: Callable[..., str], tmp_path: Path) -> None:
    """Batches of unequal token counts: only a mean over all tokens of the step agrees."""
    keys = {"schedule__steps": 1, "schedule__links": 1, "chain__dropout": 0, "train__group_by_length": False}
    train(config_file(out=str(tmp_path / "whole"), train__batch_size=8, **keys))
    train(config_file(out=str(tmp_path / "parts"), train__batch_size=2, train__accumulation=4, **keys))
    base = config.load(config_file()).model
    whole, parts = (load_chain(load_model(base), tmp_path / n).links[0].factors() for n in ("whole", "parts"))
    for name, f in whole.items():
        torch.testing.assert_close(parts[name].b, f.b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"train__packing": True, "train__batch_size": 2},
        {"train__activation_checkpointing": True},
        {"model__dtype": "bf16"},
        {"schedule__lr_span": "restart", "schedule__optimizer_state": "keep", "schedule__lr_shape": "cosine"},
        {"schedule__ranks": [4, 2, 1], "schedule__shares": [3, 2, 1]},
        {"chain__method": "lora", "schedule__links": 1},
        {"chain__targets": "all-linear", "chain__rank_pattern": {"q_proj": 4}},
    ],
    ids=lambda keys: "-".join(k.split("__")[1] for k in keys),
)
def test_variants_train(config_file: Callable[..., str], keys: dict[str, Any], tmp_path: Path) -> None:
    result = train(config_file(schedule__steps=24, **keys))
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert result.score is not None


def test_activation_checkpointing_changes_nothing(config_file: Callable[..., str], tmp_path: Path) -> None:
    """Dropout included: its seed is replayed in the second forward pass."""
    keys = {"chain__dropout": 0.3, "schedule__steps": 4, "schedule__links": 1}
    train(config_file(out=str(tmp_path / "a"), **keys))
    train(config_file(out=str(tmp_path / "b"), train__activation_checkpointing=True, **keys))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_optimizer_state_policy(config_file: Callable[..., str], tmp_path: Path) -> None:
    """reset: the first step of link 1 has Adam's full size again (step counter 1); keep: it goes on counting."""
    counters = {}
    for policy in ("reset", "keep"):
        train(config_file(out=str(tmp_path / policy), schedule__optimizer_state=policy, schedule__steps=9))
        states = sorted((tmp_path / policy / "state").glob("*.pt"))
        extra = store.load_tensors(states[-2])["extra"]  # before the last knot
        counters[policy] = {int(s["step"]) for s in extra["optimizer"]["state"].values()}
    assert counters == {"reset": {3}, "keep": {9}}


def test_plateau_ends_links_early(config_file: Callable[..., str], tmp_path: Path) -> None:
    """With a learning rate too small to move the loss, each link ends after the evaluations it is given."""
    keys = {"schedule__plateau": 2, "schedule__steps": 60, "train__eval_every": 2, "train__log_every": 1000}
    result = train(config_file(schedule__lr=1e-12, **keys))
    assert result.links == 3
    knots = [row["step"] for row in rows(tmp_path / "run", "knot")]
    assert knots in ([6, 12, 18], [4, 10, 16], [4, 8, 12])
    assert result.steps < 60
    logged = [(row["step"], row["link"]) for row in rows(tmp_path / "run", "train")]
    assert logged == [(1, 0), *zip(knots, range(3), strict=True)]  # no link's losses are averaged with the next one's


def test_early_stop_ties_and_ends(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file(schedule__lr=1e-12, train__early_stop=2, train__eval_every=2, schedule__steps=60)
    result = train(path)
    assert result.links == 1
    assert result.steps <= 6
    assert train(path).steps == result.steps  # it stays finished


def test_best_checkpoint(config_file: Callable[..., str], tmp_path: Path) -> None:
    """After a good start the learning rate wrecks the model; the best point is kept and can be loaded."""
    from cola_fast.data.rows import load_data
    from cola_fast.training.evaluate import evaluate
    from cola_fast.training.models import context_length, load_tokenizer

    path = config_file(schedule__steps=40, schedule__lr=0.3, train__eval_every=2, schedule__lr_shape="constant")
    result = train(path)
    c = config.load(path)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "run", "eval") if row["step"]}
    assert result.best_loss == min(losses.values())
    model = load_model(c.model)
    data = load_data(c.data, load_tokenizer(c.model), context=context_length(model), seed=0)
    chain = load_best(model, tmp_path / "run")
    assert evaluate(chain.model, data.eval, batch_size=32).loss == pytest.approx(result.best_loss, rel=1e-5)


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_cleanly_and_the_same_command_resumes(
    config_file: Callable[..., str], tmp_path: Path, number: int
) -> None:
    path = config_file(out=str(tmp_path / "whole"), schedule__steps=60, train__save_every=1000)
    train(path)
    path = config_file(out=str(tmp_path / "run"))
    command = [sys.executable, "-m", "cola_fast.cli", "train", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread())
    wait_for(lambda: len(list_rows(tmp_path / "run")) > 5, process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    train(path)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == list(range(1, 61))


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def list_rows(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_loss_that_is_not_finite_stops_the_run(
    config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says at which step, keeps the last good state, and that state trains on."""
    path = config_file(out=str(tmp_path / "whole"))
    train(path)
    path = config_file(out=str(tmp_path / "run"))
    real = trainer.batch_loss
    calls = []

    def poisoned(logits: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
        calls.append(1)
        total, count = real(logits, batch)
        return total * (float("nan") if len(calls) == 8 else 1.0), count

    monkeypatch.setattr(trainer, "batch_loss", poisoned)
    with pytest.raises(UserError, match=r"The loss became nan at step 8: .* keeps its last good state"):
        train(path)
    state = load_state(tmp_path / "run", read_record(tmp_path / "run"))
    assert state is not None
    assert state["extra"]["position"]["step"] == 6
    assert all(torch.isfinite(t).all() for f in state["factors"].values() for t in f[:2])
    monkeypatch.undo()
    train(path)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_a_full_disk(config_file: Callable[..., str], tmp_path: Path) -> None:
    """A real limit on file size, which link 1 exceeds and link 0 does not; the run goes on once there is room."""
    path = config_file(
        out=str(tmp_path / "whole"), chain__targets="all-linear", schedule__ranks=[1, 16, 1], schedule__steps=6
    )
    train(path)
    path = config_file(out=str(tmp_path / "run"))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150 * 1024, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "cola_fast.cli", "train", path]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=one_thread())
    assert done.returncode == 2, done.stderr
    assert "could not be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "chain.json").read_text())
    assert len(record["links"]) == 1
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    train(path)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_sealing_on_a_full_disk_leaves_the_link_open(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cola_fast import attach

    chain = attach(model)
    chain.save(tmp_path)
    before = snapshot(tmp_path)

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_synced", full)
    with pytest.raises(UserError, match=r"links/000 could not be written \(No space left on device\)"):
        chain.tie()
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    assert chain.open_link is not None
    assert chain.tie().index == 0


# --- what a run refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model__name": "/no/such/folder"}, r"there is no such folder"),
        ({"model__name": "nobody/nothing"}, r"The model nobody/nothing could not be loaded"),
        ({"model__attention": "nonsense"}, r"could not be loaded: .*nonsense"),
        ({"model__device": "cuda"}, r"model.device is cuda, but PyTorch finds no CUDA GPU"),
        ({"model__device": "abacus"}, r"model.device is 'abacus'"),
        ({"data__train": "none.jsonl"}, r"There is no file none.jsonl"),
        ({"chain__targets": ["q_porj"]}, r"'q_porj' matches no module.* Did you mean q_proj"),
        ({"chain__r": 40}, r"rank of .* is 40"),
        ({"schedule__ranks": [2, 2, 40]}, r"rank of .* is 40"),
        ({"schedule__steps": 2}, r"2 steps for 3 links"),
        (
            {"data__eval": None, "data__eval_share": 0, "train__early_stop": 1},
            r"train.early_stop needs a validation set",
        ),
        ({"train__loggers": ["trackio"]}, r"logger trackio is not installed: pip install"),
        ({"data__label_column": "lable"}, r"has no column 'lable'"),
        ({"train__weight_decay": -0.1}, r"train.weight_decay is -0.1"),
        ({"train__betas": [0.9, 1.5]}, r"train.betas is \[0.9, 1.5\]"),
        ({"train__eps": 0}, r"train.eps is 0"),
        ({"chain__gate": "sora", "train__gradient": "lora-pro"}, r"lora-pro knows no gates on the rank"),
        ({"chain__gate": "sora", "train__optimizer": "lora-rite"}, r"lora-rite"),
        ({"chain__gate": "dora", "train__after_step": "sora"}, r"after_step: sora needs gates on the rank"),
        ({"chain__init": "loftq"}, r"init is loftq, which corrects what quantising has lost: set model.load_in_4bit"),
        ({"chain__init": "eva", "chain__frozen": "b"}, r"frozen is 'b', but init eva needs that factor trained"),
        ({"chain__init": "lora-ga", "schedule__ranks": [2, 2, 10]}, r"lora-ga takes 2R directions .* has no 20"),
        ({"chain__base": "dense", "model__load_in_4bit": True}, r"chain.base is dense, but model.load_in_4bit is set"),
        ({"out": "/proc/nowhere/run"}, r"/proc/nowhere/run could not be written|no folder that can be written in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_changes_nothing_on_disk(
    config_file: Callable[..., str], tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    path = config_file(**keys)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=sentence) as caught:
        train(path)
    assert "\n" not in str(caught.value)
    if "out" not in keys:  # a dry run has none
        with pytest.raises(UserError, match=sentence):
            dry_run(config.load(path))
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_weights_that_were_cut_off(config_file: Callable[..., str], tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"The model .*model could not be loaded: .*header"):
        train(config_file(model__name=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_someone_else(config_file: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    path = config_file()
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex, \.\.\.\): choose a new folder"):
        train(path)
    assert snapshot(tmp_path) == before


def test_tokens_without_an_embedding_are_refused(config_file: Callable[..., str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    raw = yaml.safe_load(Path(config_file()).read_text())
    folder = tmp_path / "model"
    shutil.copytree(raw["model"]["name"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)
    (tmp_path / "texts.jsonl").write_text('{"text": "new8 new8"}\n{"text": "good"}\n')
    raw |= {"data": {"train": f"{tmp_path}/texts.jsonl", "eval_share": 0.0}, "model": {"name": str(folder)}}
    path = tmp_path / "texts.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"gives token 72, but the model has embeddings of 64"):
        train(str(path))
    assert not (tmp_path / "run").exists()


def test_two_processes_cannot_train_one_run(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file()
    train(path)
    with store.lock(tmp_path / "run"):
        before = snapshot(tmp_path)
        done = subprocess.run(
            [sys.executable, "-m", "cola_fast.cli", "train", path], capture_output=True, text=True, env=one_thread()
        )
        assert done.returncode == 2
        assert "Another process is training in" in done.stderr
        assert snapshot(tmp_path) == before

"""A base that is stored in 4 bits, as the hub's `*-bnb-4bit`: all that a chain does on one quantised while loading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from cola_fast import ChainCallback, UserError, attach, cli, config
from cola_fast.commands.report import dry_run, score_run
from cola_fast.training.trainer import train

from ..conftest import disturb
from .trainer_runs import token_rows


@pytest.fixture(scope="module")
def packed(load_nf4: Callable[..., nn.Module], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised from 16 bits, as such checkpoints are."""
    folder: Path = tmp_path_factory.mktemp("packed") / "llama-bnb-4bit"
    model: Any = load_nf4(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    return folder


@pytest.fixture
def raw(raw_config: dict[str, Any], packed: Path) -> dict[str, Any]:
    raw_config["model"] |= {"name": str(packed)}
    raw_config["chain"] |= {"targets": "all-linear"}
    raw_config["schedule"] |= {"links": 2, "steps": 4}
    return raw_config


@pytest.mark.slow
@pytest.mark.parametrize("base", ["auto", "nf4"])
@pytest.mark.parametrize("said", [False, True], ids=["not said", "load_in_4bit"])
def test_a_run_on_it(raw: dict[str, Any], config_file: Callable[..., str], said: bool, base: str) -> None:
    """Train, resume, score, export both ways: the merged export is what was scored."""
    path = config_file(model__load_in_4bit=said, chain__base=base)
    run = raw["out"]
    assert [cli.main(["train", path]), cli.main(["train", path])] == [0, 0]
    rows = {row["model"]: row for row in score_run(run)}
    assert rows["merged export"]["loss"] == pytest.approx(rows["after 2 links"]["loss"], rel=1e-4)
    for to in ("adapter", "merged"):
        assert cli.main(["export", run, "--to", to]) == 0
    merged = AutoModelForCausalLM.from_pretrained(Path(run, "export", "merged"))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}  # as configured, not as it was quantised from
    assert not hasattr(merged.config, "quantization_config")


def test_a_dry_run_counts_its_4_bits_and_its_ledger(raw: dict[str, Any]) -> None:
    def figures(**model: Any) -> str:
        return dry_run(config.from_dict({**raw, "model": {**raw["model"], **model}})).split("memory")[1]

    assert figures() == figures(load_in_4bit=True)
    weights = re.search(r"weights ([\d.]+) MiB", figures())
    assert weights is not None
    assert float(weights[1]) < 0.2  # 0.3 in fp32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chain": {"base": "dense"}}, "chain.base is dense, but .* is stored in 4 bits: use nf4, ledger or auto"),
        ({"train": {"shard": True}}, "train.shard is for 16- and 32-bit weights, but .* is stored in 4 bits"),
        ({"chain": {"init": "loftq"}}, "init is loftq, which needs the weights from before .* give the original model"),
    ],
    ids=["dense", "shard", "loftq"],
)
@pytest.mark.parametrize("function", [dry_run, train])
def test_what_it_rules_out_is_refused(
    raw: dict[str, Any], function: Callable[..., Any], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        function(config.from_dict({**raw, **{key: {**raw[key], **value} for key, value in changes.items()}}))
    assert not Path(raw["out"]).exists()


def test_its_original_is_not_known(raw: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config.from_dict({**raw, "schedule": {"steps": 1, "links": 1}}), quiet=True).run
    assert cli.main(["export", str(run), "--to", "merged", "--onto", "original"]) == 2
    assert "is stored in 4 bits: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["ledger", "nf4"])
def test_the_trainer_saves_and_resumes_on_it(packed: Path, base: str, tmp_path: Path) -> None:
    def trainer() -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}, dtype=torch.float32)
        chain = attach(model, r=2, base=base)
        args = TrainingArguments(
            str(tmp_path / "out"), max_steps=4, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
        )
        callbacks = [ChainCallback(chain, links=2)]
        return Trainer(model=model, args=args, train_dataset=token_rows(), callbacks=callbacks), chain

    whole, chain = trainer()
    whole.train()
    again, resumed = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert [link.sha256 for link in resumed.links] == [link.sha256 for link in chain.links]


def test_a_merged_export_from_python(packed: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """In another dtype than it was quantised from, too."""
    model = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}, dtype=torch.float32)
    chain = attach(model, r=2)
    disturb(chain)
    chain.export_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, found = model(ids).logits, merged(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03  # bf16

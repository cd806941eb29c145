"""The configuration: what is read, what is refused, and with which sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import config
from cola_fast.errors import UserError
from cola_fast.methods import METHODS

LEAST: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}, "schedule": {"steps": 10}}


def build(*overrides: str) -> config.Config:
    return config.from_dict(LEAST, overrides)


def test_round_trip() -> None:
    made = build("schedule.lr=5e-4", "targets=[q_proj, up_proj]", "r=4")
    assert config.from_dict(yaml.safe_load(config.to_yaml(made))) == made
    assert made.schedule.lr == 5e-4  # YAML 1.1 calls it a string
    assert made.chain.targets == ("q_proj", "up_proj")


def test_cola_is_the_default_and_lora_is_one_link() -> None:
    assert build().chain.method == "cola"
    assert build().schedule.links == 3
    assert build("chain.method=lora").schedule.links == 1
    assert build("chain.method=lora", "links=2").schedule.links == 2  # what the user writes wins


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_valid_configuration(name: str) -> None:
    assert build(f"chain.method={name}").chain.method == name


def test_labels_may_be_numbers_or_truth_values() -> None:
    for words, keys in (({0: " bad", 1: " good"}, ["0", "1"]), ({False: " no", True: " yes"}, ["false", "true"])):
        made = config.from_dict({**LEAST, "data": {"train": "t.jsonl", "verbalisers": words}})
        assert list(made.data.verbalisers or {}) == keys


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule.lrr=1", r"Unknown key schedule.lrr. Did you mean schedule.lr,"),
        ("lrr=1", r"Unknown key lrr. Did you mean schedule.lr"),
        ("chain.lr=1", r"Unknown key chain.lr. Did you mean schedule.lr\?"),
        ("trian.seed=1", r"Unknown key trian.seed. Did you mean train.seed"),
        ("trian={}", r"Unknown key trian. Did you mean train"),
        ("data=3", r"Unknown key data"),
        ("r=eight", r"chain.r is 'eight' \(str\), but must be a whole number"),
        ("r=true", r"chain.r is True \(bool\), but must be a whole number"),
        ("lr=fast", r"schedule.lr is 'fast' \(str\), but must be a number"),
        ("lr=nan", r"schedule.lr is nan|schedule.lr is 'nan'"),
        ("packing=1", r"train.packing is 1 \(int\), but must be true or false"),
        ("betas=[0.9]", r"train.betas is \[0.9\] \(list\), but must be a list of 2 values"),
        ("targets=3", r"chain.targets is 3 \(int\), but must be"),
        ("dtype=bf17", r"model.dtype is 'bf17', but must be one of auto, bf16, fp32. Did you mean bf16"),
        ("method=colla", r"chain.method is 'colla', but must be one of .* Did you mean cola"),
        ("r=0", r"chain.r is 0, but a rank is at least 1"),
        ("chain.rank_pattern.x=0", r"chain.rank_pattern gives 'x' rank 0"),
        ("dropout=1.0", r"chain.dropout is 1.0"),
        ("alpha=-1", r"chain.alpha is -1"),
        ("alpha=1.0e+300", r"chain.alpha is 1e\+300, but it must be a finite number, in 32 bits"),
        ("accumulation=1000000000000", r"train.accumulation is 1000000000000, but it is at most 1,000,000"),
        ("targets=[]", r"chain.targets is empty"),
        ("links=0", r"schedule.links is 0"),
        ("links=1000000000000", r"schedule.links is 1000000000000, but a chain has at least 1 link and at most 10,000"),
        ("epochs=1", r"either schedule.epochs or schedule.steps, not both"),
        ("steps=null", r"either schedule.epochs or schedule.steps\."),
        ("steps=-5", r"schedule's length is -5"),
        ("plateau=2", r"schedule.plateau ends a link by its evaluations, but train.eval_every is not set"),
        ("template='{a} is'", r"data.template makes prompts, but neither data.verbalisers nor data.response is there"),
        ("shares=[1, 2]", r"schedule.shares has 2 entries, but schedule.links is 3"),
        ("schedule.ranks=[8, 4, 0]", r"schedule.ranks is \[8, 4, 0\]"),
        ("lr=0", r"schedule.lr is 0"),
        ("warmup=-1", r"schedule.warmup is -1"),
        ("lr_end=2", r"schedule.lr_end is 2"),
        ("batch_size=0", r"train.batch_size is 0"),
        ("clip=0", r"train.clip is 0"),
        ("plateau=0", r"schedule.plateau is 0"),
        ("max_length=1", r"data.max_length is 1"),
        ("eval_share=1", r"data.eval_share is 1"),
        ("format=classification", r"data.verbalisers does not give the words of at least two labels"),
        ("model.name=", r"model.name is None"),
        ("data.train=''", r"data.train is missing"),
        ("steps", r"'steps' is not an override: write key=value"),
        ("data.template={text} It was", r"is not valid YAML .* put the value in quotes"),
    ],
)
def test_bad_values_are_one_clear_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        build(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["response='{a}'", "verbalisers={0: a, 1: b}"], r"data\.response makes completions: leave data\.verbalisers"),
        (["response='{a}'", "format=text"], r"data\.response makes completions: .* data\.format auto or completion"),
        (["response='{a}'", "columns={text: a}"], r"data\.columns maps .* leave one of them out"),
        (["verbalisers={0: a, 1: b}", "columns={text: a}"], r"data\.columns maps .* leave one of them out"),
    ],
    ids=str,
)
def test_keys_of_the_data_that_do_not_go_together(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(*overrides)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1", r"line 1 is not valid YAML|line 2 is not valid YAML"),
        ("- a\n- b", r"holds a list, but a configuration is a mapping"),
        ("", r"model.name is missing"),
        ("chain: {method: [cola, lora]}\nschedule: 3", r"set schedule.links|schedule is 3"),
    ],
    ids=["broken", "list", "empty", "section"],
)
def test_bad_files(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        config.load(path)


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", home := str(tmp_path))
    made = build("out=~/run", "data.train=~/a.jsonl", "data.test=[~/b.jsonl, c.txt]")
    assert (made.out, made.data.train, made.data.test) == (
        f"{home}/run",
        f"{home}/a.jsonl",
        (f"{home}/b.jsonl", "c.txt"),
    )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no configuration file"):
        config.load(tmp_path / "none.yaml")


def test_the_demo_is_a_valid_configuration() -> None:
    demo = config.load(Path(config.__file__).with_name("commands") / "demo.yaml")
    assert (demo.chain.method, demo.schedule.links) == ("cola", 3)

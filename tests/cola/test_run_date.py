"""A template that prints the day: a run's data is of the day that it began on, whenever it is read."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import UserError, config, store
from cola_fast.chain.chain_json import read_record
from cola_fast.commands.report import score_run
from cola_fast.data.encode import Example
from cola_fast.data.rows import load_data
from cola_fast.training import run
from cola_fast.training.models import load_model, load_tokenizer
from cola_fast.training.prepare import read_data

from ..conftest import snapshot
from .conftest import sealed
from .test_data import CHAT, _own_cache, load, tokenizer, write  # noqa: F401
from .test_resuming import train, train_until

# As Llama 3.2's: the day is the template's default for a variable. The tokenizer has the words w0 to w56.
DAY = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d') %}"
    "{% else %}{% set date_string = '26' %}{% endif %}{% endif %}w{{ date_string }} {% for m in messages %}"
    "{{ m['content'] }} {% endfor %}"
)
TALK = [{"role": "user", "content": "it was"}, {"role": "assistant", "content": "good"}]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the clock, ours and transformers', to a day of the month."""
    from transformers.utils import chat_template_utils

    def on(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(2026, 11, day, 23, 59, 59)

        for module in (chat_template_utils, run):
            monkeypatch.setattr(module, "datetime", Clock)

    return on


@pytest.fixture
def chats(config_file: Callable[..., str], tiny_folder: Path, tmp_path: Path) -> str:
    """A configuration with 12 of 48 conversations held out, and a model whose template prints the day."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = load_tokenizer(config.ModelConfig(name=str(folder)))
    tokenizer.chat_template = DAY
    tokenizer.save_pretrained(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"w{i} was"}, {"role": "assistant", "content": f"w{i % 7} good"}]}
        for i in range(48)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = config_file(model__name=str(folder))
    raw = yaml.safe_load(Path(path).read_text())
    raw["data"] = {"train": str(tmp_path / "chats.jsonl"), "eval_share": 0.25, "max_length": 32}
    Path(path).write_text(yaml.safe_dump(raw))
    return path


def data_of(folder: Path) -> tuple[list[Example], list[Example]]:
    """As the run's data is read after it."""
    record, settings = run.read_run(folder)
    tokenizer = load_tokenizer(settings.model)
    data = read_data(settings, load_model(settings.model), tokenizer, run.begun(record))
    return data.train, data.eval


def forget_the_date(folder: Path) -> None:
    """As earlier versions left a run."""
    record = read_record(folder)
    del record["about"]["date"]
    store.write_sealed(folder / "chain.json", record)


def test_a_run_that_is_resumed_the_next_day(chats: str, tmp_path: Path, on: Callable[[int], None]) -> None:
    on(28)
    train(chats, f"out={tmp_path / 'whole'}")
    train_until(6, chats)
    on(29)
    train(chats)
    assert sealed(tmp_path / "run") == sealed(tmp_path / "whole")
    assert read_record(tmp_path / "run")["about"]["date"] == "2026-11-28T23:59:59"
    train(chats, f"out={tmp_path / 'later'}")
    assert sealed(tmp_path / "later") != sealed(tmp_path / "whole")  # a new run is of its own day


def test_a_run_that_is_scored_the_next_day(chats: str, tmp_path: Path, on: Callable[[int], None]) -> None:
    on(28)
    train(chats)
    same_day, scores = data_of(tmp_path / "run"), score_run(tmp_path / "run")
    on(29)
    assert data_of(tmp_path / "run") == same_day
    assert score_run(tmp_path / "run") == scores
    assert len(same_day[1]) == 12


def test_the_rows_decide_what_is_held_out(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    """Neither the tokenizer's template nor the day does."""
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": f"film {i}"}]} for i in range(20)]

    def held(template: str) -> set[str]:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        texts = [tokenizer.decode(example.input_ids) for example in load(tokenizer, path, eval_share=0.2).eval]
        return {text.partition("film")[2].strip().removesuffix("</s>") for text in texts}

    path = write(rows)
    assert len(held(CHAT)) == 4
    assert held(CHAT) == held(DAY) == held("{{ strftime_now('%c') }}" + CHAT)


def test_what_is_held_out_of_other_rows_is_what_it_was(tokenizer: Any, write: Any) -> None:
    """Or a run of an earlier version would be scored on what it was trained on."""
    texts = load(tokenizer, write([{"text": f"film {i}"} for i in range(20)]), eval_share=0.2).eval
    assert [tokenizer.decode(e.input_ids)[8:-4] for e in texts] == ["0", "3", "18", "19"]
    pairs = load(tokenizer, write([{"prompt": f"{i}:", "completion": "a"} for i in range(20)]), eval_share=0.2).eval
    assert [tokenizer.decode(e.input_ids)[3:-6] for e in pairs] == ["1", "4", "10", "12"]
    rows = [{"text": f"{i}:", "label": i % 2} for i in range(20)]
    labelled = load(tokenizer, write(rows), eval_share=0.2, verbalisers={"0": "a", "1": "b"}).eval
    assert [tokenizer.decode(e.input_ids)[3:-2] for e in labelled] == ["6", "13", "14", "15"]


def test_a_run_of_an_earlier_version(chats: str, tmp_path: Path) -> None:
    """What it has held out is not known, as the template was asked."""
    train_until(6, chats)
    forget_the_date(tmp_path / "run")
    before = snapshot(tmp_path / "run")
    sentence = "started by an earlier version, which chose the held-out conversations by what the chat template made"
    with pytest.raises(UserError, match=sentence):
        train(chats)
    with pytest.raises(UserError, match=sentence):
        score_run(tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": "w50 bad"}]}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = tmp_path / "run" / "config.yaml"
    raw = yaml.safe_load(written.read_text())
    raw["data"]["eval"] = str(tmp_path / "new.jsonl")
    written.write_text(yaml.safe_dump(raw))
    assert {row["examples"] for row in score_run(tmp_path / "run")} == {1}


def test_a_run_of_an_earlier_version_goes_on_without_a_date(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file()
    train_until(6, path)
    forget_the_date(tmp_path / "run")
    train(path)
    assert "date" not in read_record(tmp_path / "run")["about"]


@pytest.mark.parametrize("date", [7, "tomorrow", [], {}], ids=str)
def test_a_date_that_is_none(chats: str, tmp_path: Path, date: Any) -> None:
    train_until(6, chats)
    record = read_record(tmp_path / "run")
    record["about"]["date"] = date
    store.write_sealed(tmp_path / "run" / "chain.json", record)
    for action in (lambda: train(chats), lambda: score_run(tmp_path / "run")):
        with pytest.raises(UserError, match=r"chain.json is damaged \(about.date is .*\): restore it from a copy"):
            action()


# --- templates --------------------------------------------------------------------------------------------------------

ASKS = {
    "single quotes": "{{ strftime_now('%d %b %Y') }}",
    "double quotes": '{{ strftime_now( "%d %b %Y" ) }}',
    "named": "{{ strftime_now(format='%d %b %Y') }}",
    "in an expression": "{%- set today = 'x' ~ strftime_now('%d') + ' ' ~ strftime_now('%b %Y') -%}{{ today[1:] }}",
    "asked for first": "{% if strftime_now is defined %}{# strftime_now #}{{ strftime_now('%d %b %Y') }}{% endif %}",
}


@pytest.mark.parametrize("case", ASKS)
def test_a_template_is_told_the_date(
    tokenizer: Any, write: Any, case: str, monkeypatch: pytest.MonkeyPatch, on: Callable[[int], None]
) -> None:
    on(29)
    monkeypatch.setattr(tokenizer, "chat_template", ASKS[case] + CHAT)
    path = write([{"messages": TALK}])
    settings = config.DataConfig(train=path, eval_share=0.0)
    (example,) = load_data(settings, tokenizer, context=4096, seed=0, date=datetime(2024, 7, 26)).train
    assert tokenizer.decode(example.input_ids).startswith("26 Jul 2024<s>")
    today = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert today.startswith("29 Nov 2026<s>")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% set now = strftime_now %}{{ now('%Y') }}", "it asks for the date by other means"),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}", "it asks for the date by other means"),
        ("{{ strftime_now('\ud800') }}", "the chat template refuses it: .*surrogates not allowed"),
        ("{{ lipsum(n=1) }}", "chat template writes random text"),
        ("{{ [1, 2, 3] | random }}", "chat template writes random text"),
    ],
)
def test_a_template_whose_text_would_be_another_tomorrow(
    tokenizer: Any, write: Any, template: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template + CHAT)
    with pytest.raises(UserError, match=sentence):
        load(tokenizer, write([{"messages": TALK}]))

"""`cola data`: the rows as the model sees them, and counts that are those of the batches."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cola_fast import config, console
from cola_fast.cli import main
from cola_fast.commands.data_view import view
from cola_fast.commands.marked_rows import mark
from cola_fast.commands.ranks_report import measure
from cola_fast.data.batches import Feed
from cola_fast.training.models import load_tokenizer
from cola_fast.training.plan import plan_run

from ..conftest import snapshot, tiny_llama
from .test_cli import Cola, cola  # noqa: F401
from .test_data import CHAT, MARKED, _own_cache, load, tokenizer, write  # noqa: F401
from .test_heads import TASK, of_words, word_files  # noqa: F401
from .test_run_date import chats, on, train  # noqa: F401

ODD = "naïve 日本 \x1b[31mred\u202e <script>alert(1)</script>"


@pytest.fixture
def of_bytes(tokenizer: Any, config_file: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """A configuration of rows for a byte-level tokenizer, whose model has no weights."""
    folder = tmp_path / "bytes"
    settings: Any = tiny_llama().config
    settings.vocab_size = len(tokenizer)
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def make(rows: list[dict[str, Any]], **keys: Any) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(tmp_path / "rows.jsonl"), "max_length": 60, "eval_share": 0.0, **keys}
        return config_file(model__name=str(folder), data=data)

    return make


def facts_of(path: str, *overrides: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, fact in view(config.load(path, overrides)).facts:
        found[name] = f"{found[name]}\n{fact}" if name in found else fact
    return found


# --- rows -------------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a film"},
    {"role": "user", "content": "was it long"},
    {"role": "assistant", "content": "it was"},
]


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"text": "the film was great"}, None, ["<s>⟦the film was great</s>⟧"]),
        ({"prompt": "was it long?", "completion": " it was"}, None, ["<s>was it long?⟦ it was</s>⟧"]),
        ({"prompt": "naïve 日", "completion": "本 é\n"}, None, ["<s>naïve 日⟦本 é", "</s>⟧"]),
        (
            {"messages": TALK}, MARKED,
            ["<s><|user|>", "what is it?</s><|assistant|>", "⟦a film</s>⟧<|user|>", "was it long</s><|assistant|>",
             "⟦it was</s>⟧"],
        ),
        (
            {"messages": TALK}, CHAT,
            ["<s><|user|>", "what is it?</s>", "<|assistant|>", "⟦a film</s>⟧", "<|user|>", "was it long</s>",
             "<|assistant|>", "⟦it was</s>⟧", ""],
        ),
    ],
    ids=["text", "completion", "characters-of-several-bytes", "messages", "messages-with-line-breaks"],
)  # fmt: skip
def test_what_is_learned_is_marked(
    of_bytes: Callable[..., str], tmp_path: Path, cola: Cola, row: Any, template: str | None, says: list[str]
) -> None:
    path = of_bytes([row])
    if template:
        tokenizer = load_tokenizer(config.load(path).model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "bytes")
    shown = cola("data", path).stdout
    lines = [line.removeprefix("  | ") for line in shown.splitlines() if line.startswith("  | ")]
    assert lines == says
    assert "all rows of train end in </s>" in shown


def test_candidates_are_shown_with_the_right_one(config_file: Callable[..., str], cola: Cola) -> None:
    shown = cola("data", config_file(), "--row", "3").stdout
    assert re.search(r"^row 3 of \S+train.jsonl: \d+ tokens, 1 learned\n  \| [w\d ]+ it was⟦ (bad|good)⟧\n", shown)
    gold = re.search(r"⟦ (\w+)⟧", shown)[1]  # type: ignore[index]
    assert [line for line in shown.splitlines() if line.startswith("  *")] == [
        f"  * {['bad', 'good'].index(gold)}: '{gold}'"
    ]
    assert len(re.findall(r"^  - ", shown, re.MULTILINE)) == 1


def test_the_class_of_a_text(config_file: Callable[..., str], cola: Cola) -> None:
    shown = cola("data", config_file(**{**TASK, "model__labels": [0, 1]}), "--row", "1").stdout
    assert "its class learned" in shown
    assert "⟦" not in shown
    assert sorted(re.findall(r"^  ([*-]) ([01])$", shown, re.MULTILINE)) in (
        [("*", "0"), ("-", "1")],
        [("*", "1"), ("-", "0")],
    )


def test_the_class_of_each_word(config_file: Callable[..., str], word_files: dict[str, str], cola: Cola) -> None:
    shown = cola("data", config_file(**of_words(word_files)), "--row", "2").stdout
    row = json.loads(Path(word_files["train"]).read_text().splitlines()[1])
    pairs = list(zip(row["tokens"], row["label"], strict=True))
    assert re.findall(r"⟦ ?(w\d+)\|(\w+)⟧", shown) == pairs
    (again,) = view(config.load(config_file()), row=2).rows
    assert re.findall(r"<mark> ?(w\d+)<i>(\w+)</i></mark>", again.html()) == pairs
    assert re.findall(r"42m ?(w\d+)\x1b\[0m\x1b\[36m\|(\w+)\x1b\[0m", again.coloured()) == pairs


@pytest.mark.parametrize("words", [["--rows", "0"], ["--rows", "2"], ["--row", "5"]], ids=" ".join)
def test_which_rows(config_file: Callable[..., str], cola: Cola, words: list[str]) -> None:
    numbers = re.findall(r"^row (\d+) of", cola("data", config_file(), *words).stdout, re.MULTILINE)
    assert numbers == {"0": [], "2": ["1", "2"], "5": ["5"]}[words[1]]


def test_a_row_that_is_held_out_says_so(
    config_file: Callable[..., str], task_files: dict[str, str], cola: Cola
) -> None:
    """Rows keep the numbers of their file."""
    path = config_file(data__eval=None, data__test=None, data__eval_share=0.25)
    texts = [json.loads(line)["text"] for line in Path(task_files["train"]).read_text().splitlines()]
    shown = [cola("data", path, "--row", str(k)).stdout for k in range(1, 9)]
    assert all(f"  | {text} it was" in page for text, page in zip(texts, shown, strict=False))
    assert {", held out:" in page for page in shown} == {True, False}


def test_parts_add_up_to_the_text(tokenizer: Any, write: Any) -> None:
    """Also where a character's bytes are several tokens, or a row is cut."""
    path = write([{"prompt": f"{ODD} {i}", "completion": f"日{'é' * i} the film"} for i in range(6)])
    for example in load(tokenizer, path, max_length=70).train:
        row = mark(example, "completion", tokenizer, title="", labels=())
        assert "".join(part.text for part in row.parts) == tokenizer.decode(example.input_ids)
        assert row.parts[-1] == ("</s>", True, True, "")


# --- what files say is not obeyed -------------------------------------------------------------------------------------


def test_files_do_not_steer_the_terminal(of_bytes: Callable[..., str], tmp_path: Path, cola: Cola) -> None:
    path = of_bytes(
        [{"text": f"{ODD}\nkind       forged", "a\nkind       forged": 1}], max_length=64, too_long="truncate"
    )
    cola("data", path, "--html", str(tmp_path / "page.html"))
    config_ = config.load(path)
    for coloured in (False, True):
        text = view(config_).text(coloured=coloured)
        ours = re.sub(r"\x1b\[(0|2|30;42|36)m", "", text)
        assert "\\x1b[31mred\\u202e" in ours
        assert not set(ours) & {"\x1b", "\u202e"}
        assert len(re.findall(r"^kind ", text, re.MULTILINE)) == 1
    assert "\x1b" not in (tmp_path / "page.html").read_text()
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_colours_go_to_a_terminal_alone(
    config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, cola: Cola
) -> None:
    path = config_file()
    assert "\x1b" not in cola("data", path).stdout

    def on_a_terminal() -> str:
        master, slave = os.openpty()
        with monkeypatch.context() as patch, os.fdopen(slave, "w") as terminal:
            patch.setattr(sys, "stdout", terminal)
            assert main(["data", path, "--rows", "1"]) == 0
            said = os.read(master, 1 << 16).decode()
        os.close(master)
        return said

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert re.search(r"it was\x1b\[30;42m (bad|good)\x1b\[0m", on_a_terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦" in (said := on_a_terminal())
    assert "\x1b" not in said


def test_a_result_goes_to_a_stream_that_cannot_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.show("a ⟦b⟧")
    assert stream.buffer.getvalue() == b"a \\u27e6b\\u27e7\n"  # type: ignore[attr-defined]


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [{}, {"packing": True}, {"group_by_length": False, "batch_size": 7}], ids=["grouped", "packed", "shuffled"]
)
def test_padding_and_batches_are_the_feeds(config_file: Callable[..., str], keys: dict[str, Any]) -> None:
    path = config_file(**{f"train__{key}": value for key, value in keys.items()})
    settings = config.load(path)
    data = plan_run(settings).data
    feed = Feed(data.train, settings.train, max_length=data.max_length)
    batches = list(itertools.islice(feed, len(feed)))
    tokens = sum(batch.tokens for batch in batches)
    padding = sum(batch.input_ids.numel() for batch in batches) - tokens
    said = facts_of(path)
    assert f"batches: {len(feed)} of {settings.train.batch_size} rows; " in said["epoch"]
    assert f"tokens: {tokens}, and {padding} of padding" in said["epoch"]
    learned = sum(batch.labelled for batch in batches)
    assert said["train"].startswith(f"96 rows, {tokens} tokens, {learned} learned")


def test_lengths_and_the_longest(config_file: Callable[..., str], tmp_path: Path) -> None:
    """Rows of 1 to 20 words and EOS."""
    rows = [{"text": " ".join(["w1"] * count)} for count in range(1, 21)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = facts_of(config_file(data={"train": str(tmp_path / "rows.jsonl"), "eval_share": 0.0, "max_length": 64}))
    assert said["train"].endswith("a row's tokens: median 11.5, 95% have at most 20, longest 21")
    assert said["longest"] == "row 20 (21), row 19 (20), row 18 (19), row 17 (18), row 16 (17)"


def test_rows_that_repeat_are_named(of_bytes: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "new"}\n{"text": "it was long"}\n')
    rows = [{"text": text} for text in ("the film", "it was long", "the film", "the  film", "the film")]
    said = facts_of(of_bytes(rows, test=str(tmp_path / "held.jsonl")))
    assert said["repeats"].splitlines() == [
        "train: 2 rows repeat another (row 3 is row 1, row 5 is row 1)",
        "test: 1 of 2 rows are in train, too (row 2 is row 2 of train)",
    ]


def test_unknown_tokens_are_counted(
    config_file: Callable[..., str], of_bytes: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w1 nobody knows"}\n')
    said = facts_of(config_file(data={"train": str(tmp_path / "rows.jsonl"), "eval_share": 0.0}))
    assert said["unknown"] == "<unk> in train: 2 tokens (25.0%) (row 2)"
    said = facts_of(of_bytes([{"text": "\U0001f600"}]))
    assert said["unknown"] == "this tokenizer has no token of its own for what it does not know"


def test_rows_that_do_not_end_are_named(of_bytes: Callable[..., str]) -> None:
    path = of_bytes([{"text": "it was"}, {"text": "the film was great " * 9}], max_length=12, too_long="truncate")
    said = facts_of(path)
    assert said["ends"] == "1 of 2 rows of train do not end in </s> (row 2)"
    assert "1 longer than 12 tokens; 1 of these cut from the right" in said["read"]


def test_rows_that_are_too_long_are_counted(of_bytes: Callable[..., str]) -> None:
    path = of_bytes([{"text": "it was"}, {"text": "the film was great " * 9}], max_length=12, too_long="drop")
    assert "1 longer than 12 tokens; 1 of these dropped" in facts_of(path)["read"]


def test_rows_without_a_label_are_counted(config_file: Callable[..., str], word_files: dict[str, str]) -> None:
    """Of a head's data, too: the tokenizer makes nothing of a space."""
    path = config_file(**of_words(word_files))
    with open(word_files["train"], "a") as file:
        file.write('{"tokens": [" "], "label": ["low"]}\n')
    assert "96 of 97 rows, " in (said := facts_of(path)["read"])
    assert ", 1 dropped with no token to learn from" in said


# --- what is read, what is written ------------------------------------------------------------------------------------


def test_a_runs_data_is_of_its_day(chats: str, on: Callable[[int], None]) -> None:
    """Also in the plan of going on with it, and for its ranks."""
    on(28)
    train(chats)
    on(29)
    settings = config.load(chats)
    assert all("w28" in row.plain() for row in view(settings).rows)
    later = config.load(chats, ["out=later"])
    assert all("w29" in row.plain() for row in view(later).rows)
    assert measure(settings) != measure(later)
    assert plan_run(settings).data.train != plan_run(later).data.train


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.marked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_data(self, data: str) -> None:
        if self.seen[-1:] == ["mark"] and self.get_starttag_text() == "<mark>":
            self.marked.append(data)


def test_the_page(config_file: Callable[..., str], tmp_path: Path, cola: Cola) -> None:
    """Holds what is printed, runs and fetches nothing; nothing else is written; it may be written again."""
    path, page = config_file(data__template="<b>{text}</b> & it was"), tmp_path / "page.html"
    before = snapshot(tmp_path)
    said = cola("data", path, "--html", str(page)).stdout
    after = snapshot(tmp_path)
    assert {**before, "page.html": after["page.html"]} == after
    assert said.endswith(f"written to {page}\n")
    tags = Tags(page.read_text())
    assert {"mark", "pre", "table"} <= set(tags.seen)
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert [word for word in tags.marked if word in (" bad", " good")] == re.findall(r"⟦( \w+)⟧", said)
    assert "median" in page.read_text()
    cola("data", path, "--html", str(page), "--rows", "1")
    assert page.read_bytes() != after["page.html"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rows", "-1"], "--rows is -1, but a number of rows is 0 or more."),
        (["--row", "97"], "has no row of that number that is used"),
        (["--row", "0"], "rows count from 1"),
        (["--html", "config.yaml"], "config.yaml, which `cola data` did not write: name another file, or remove it."),
        (["--html", "."], "which `cola data` did not write"),
        (["--html", ""], "which `cola data` did not write"),
        (["--html", "no/page.html"], "there is no folder no"),
        (["data.train=no.jsonl"], "There is no file no.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    config_file: Callable[..., str], tmp_path: Path, cola: Cola, monkeypatch: pytest.MonkeyPatch, words: Any, says: str
) -> None:
    path = config_file()
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    printed = cola("data", path, *words, check=2)
    assert says in printed.stderr
    assert printed.stderr.startswith("cola: ")
    assert printed.stderr.count("\n") == 1
    assert printed.stdout == ""
    assert snapshot(tmp_path) == before


def test_no_weights_are_read(config_file: Callable[..., str], tiny_folder: Path, tmp_path: Path, cola: Cola) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "96 rows" in cola("data", config_file(model__name=str(tmp_path / "model"))).stdout

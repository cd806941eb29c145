"""Data that nobody means to give: files that crash their readers, templates that do not end, rows of odd types."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import json
import mmap
from pathlib import Path
from typing import Any

import pytest

from cola_fast.data import chat_template, json_file, time_limit
from cola_fast.data.encode import IGNORE
from cola_fast.errors import UserError

from .test_data import CHAT, MARKED, WORDS, _own_cache, load, tokenizer, write  # noqa: F401

TALK = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was great"}]


# --- files ------------------------------------------------------------------------------------------------------------

DEEP = "[" * 20_000 + "]" * 20_000
DEEP_OBJECT = '{"a":' * 20_000 + "1" + "}" * 20_000
GOOD = '{"text": "a"}\n'
UNREADABLE: dict[str, tuple[str, str, str]] = {
    "null": ("a.json", "null\n", "line 1 is null, but must be an object"),
    "null in front": ("a.json", "null " + GOOD, "line 1 is null "),
    "null on the first line": ("a.jsonl", "null\n" + GOOD, "line 1 is null, but must be an object"),
    "null on a later line": ("a.jsonl", GOOD * 3 + "null\n", "line 4 is null, but must be an object"),
    "null in a list": ("a.json", "[null, " + GOOD + "]", "line 1 is null, "),
    "null behind a list": ("a.json", f"[{GOOD}]\nnull", "line 3 is null, but must be an object"),
    "an object behind a list": ("a.json", f"[{GOOD}]\n{GOOD}", "line 3 is "),
    "text": ("a.jsonl", '"text"\n' + GOOD, 'line 1 is "text", but must be an object'),
    "lists": ("a.json", "[[1], [2]]", r"line 1 is \[1\], \[2\]\], but must be an object"),
    "deep lists": ("a.jsonl", GOOD + '{"text": ' + DEEP + "}\n", "line 2 has more than 50 lists and objects"),
    "deep objects": ("a.jsonl", '{"text": ' + DEEP_OBJECT + "}\n", "line 1 has more than 50 lists and objects"),
    "deep in a list": ("a.json", '[{"text": ' + DEEP + "}]", "line 1 has more than 50 lists and objects"),
    "deep and not closed": ("a.json", '{"a": ' + "[" * 20_000, "line 1 has more than 50 lists and objects"),
    "a long number": ("a.jsonl", '{"text": "a"}\n{"text": ' + "9" * 5000 + "}\n", "a.jsonl"),
    "two of a key": ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1: an object has the key 'text' twice"),
    "a truncated list": ("a.json", "[" + GOOD, "cannot be read as json"),
    "a truncated string": ("a.jsonl", GOOD + '{"text": "a', "cannot be read as jsonl: line 2"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_would_crash_its_reader_is_one_sentence(tokenizer: Any, write: Any, case: str) -> None:
    name, text, sentence = UNREADABLE[case]
    with pytest.raises(UserError, match=sentence) as caught:
        load(tokenizer, write(text, name))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_the_files_of_a_folder_are_looked_at_too(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write("null\n", "folder/train.jsonl")
    with pytest.raises(UserError, match=r"train.jsonl cannot be read as jsonl: line 1 is null"):
        load(tokenizer, str(tmp_path / "folder"))


READABLE = {
    "lines": GOOD * 3,
    "without a last line break": GOOD + GOOD.strip(),
    "a list": f"[{GOOD}, {GOOD}]",
    "an object over several lines": '\n\n{"text":\n  "a",\n "x": [[{}]]}\n' + GOOD,
    "several on a line": GOOD.strip() * 3,
    "a byte order mark": "\ufeff" + GOOD,
    "brackets and quotes in text": json.dumps({"text": '[[{"\\' * 30 + "null"}) + "\n" + GOOD,
    "a string that ends in backslashes": json.dumps({"text": "a\\\\"}) + "\nnull".replace("null", "") + GOOD,
    "shallow": '{"text": "a", "x": ' + "[" * 40 + "]" * 40 + "}\n",
    "many brackets, none deep": '{"text": "a", "x": [' + "[1]," * 200 + "[2]]}\n" + GOOD,
}


@pytest.mark.parametrize("case", READABLE)
def test_a_file_that_can_be_read_is(write: Any, case: str) -> None:
    assert json_file.refusal(Path(write(READABLE[case]))) is None


def test_strings_are_not_read_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of one long string costs a few searches, so that gigabytes are looked through."""
    data = mmap.mmap(-1, 1 << 20)
    data.write(b'{"text": "' + b"x" * ((1 << 20) - 14) + b'"\n}\n')
    searches: list[int] = []
    mark = json_file._MARK

    class Counted:
        def search(self, *args: Any) -> Any:
            searches.append(1)
            return mark.search(*args)

    monkeypatch.setattr(json_file, "_MARK", Counted())
    assert json_file._refusal(data) is None
    assert len(searches) < 20


# --- chat templates ---------------------------------------------------------------------------------------------------

ENDLESS = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}".replace("10**5", "99999")
TEMPLATES = {
    "loops": (ENDLESS, "It takes more than 0.5 s of computing"),
    "loops in generation marks": (MARKED + ENDLESS, "It takes more than 0.5 s of computing"),
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "It takes more than 0.5 s of computing",
    ),
    "text that doubles": (
        "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "It takes more than 0.5 s of computing, or more than|MemoryError",
    ),
    "lorem ipsum": ("{{ lipsum(n=100000000) }}", "writes random text"),
    "a huge range": ("{{ range(10000000) | list }}", "Range too big"),
    "much text": ("{{ 'x' * 20000000 }}", "it makes 20000000 characters of it"),
    "powers": ("{{ 9**9**9 }}", r"raises numbers to powers \(\*\*\)"),
    "division by zero": ("{{ 1 / 0 }}", "Row 1 .*the chat template refuses it: division by zero"),
    "a missing key": ("{{ messages[7]['role'] }}", "Row 1 .*the chat template refuses it: "),
    "recursion": (
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "Row 1 .*the chat template refuses it: maximum rec",
    ),
    "bad syntax": ("{% for %}", "Row 1 .*the chat template refuses it: "),
    "a call of nothing": ("{{ nothing() }}", "Row 1 .*the chat template refuses it: 'nothing' is undefined"),
    "bad arithmetic": ("{{ 'a' + 1 }}", "Row 1 .*the chat template refuses it: can only concatenate"),
    "its own complaint": ("{{ raise_exception('\x1b[2Jno') }}", r"the chat template refuses it: \\x1b\[2Jno"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_template_is_one_sentence(
    tokenizer: Any,
    write: Any,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template, sentence = TEMPLATES[case]
    monkeypatch.setattr(time_limit, "SECONDS", 0.5)
    monkeypatch.setattr(time_limit, "MEMORY", 500 << 20)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=sentence) as caught:
        load(tokenizer, write([{"messages": TALK}]))
    assert str(caught.value).isprintable()


def test_every_row_has_the_whole_limit(tokenizer: Any, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    restarts: list[int] = []
    monkeypatch.setattr(time_limit.Watch, "restart", lambda self: restarts.append(1) or setattr(self, "since", 1e9))
    monkeypatch.setattr(time_limit, "_peak_memory", lambda: 0)
    monkeypatch.setattr(time_limit.Watch, "peak", 0, raising=False)
    assert len(load(tokenizer, write([{"messages": TALK}] * 5)).train) == 5
    assert len(restarts) == 1 + 5


def test_a_long_conversation_is_rendered_as_far_as_it_is_looked_at(
    tokenizer: Any,
    write: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3,000 messages: linear, and the example that rendering every prefix gives."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    rendered: list[int] = []
    apply = type(tokenizer).apply_chat_template

    def counted(self: Any, messages: Any, **keys: Any) -> Any:
        rendered.append(len(messages))
        return apply(self, messages, **keys)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    path = write([{"messages": TALK * 1500}])
    found = load(tokenizer, path, max_length=100).train[0]
    assert sum(rendered) < 4 * 3000
    rendered.clear()
    looked_at = chat_template._looked_at
    monkeypatch.setattr(chat_template, "_looked_at", lambda *arguments: looked_at(*arguments[:-1], 10**9))
    assert found == load(tokenizer, write([{"messages": TALK * 100}]), max_length=100).train[0]
    assert len(rendered) == 1 + 2 * 100  # all of them
    assert sum(label != IGNORE for label in found.labels) > 20


def test_a_long_conversation_with_generation_marks_too(
    tokenizer: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    kept: list[int] = []
    looked_at = chat_template._looked_at

    def counted(*arguments: Any) -> Any:
        pieces = looked_at(*arguments)
        kept.append(len(pieces))
        return pieces

    monkeypatch.setattr(chat_template, "_looked_at", counted)
    found = load(tokenizer, write([{"messages": TALK * 1500}]), max_length=100).train[0]
    assert kept[0] < 200
    assert found == load(tokenizer, write([{"messages": TALK * 100}]), max_length=100).train[0]


# --- rows -------------------------------------------------------------------------------------------------------------

TOOLS = {"messages": TALK, "tools": "[" * 5000 + "]" * 5000}
ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a label that is a list": (
        [{"text": "a", "label": ["x"]}],
        WORDS,
        r"Row 1 .*label is \['x'\] \(list\), but must be",
    ),
    "a label that is an object": ([{"text": "a", "label": {"x": 1}}], WORDS, r"Row 1 .*label is \{'x': 1\} \(dict\)"),
    "a label without end": ([{"text": "a", "label": "x" * 10**6}], WORDS, r"Row 1 .*label is 'xxx"),
    "a label that is infinite": (
        '{"text": "a", "label": 1e400}\n',
        WORDS,
        r"Row 1 .*label is inf, which is not in data.verbalisers",
    ),
    "a label that is huge": ([{"text": "a", "label": "9" * 5000}], WORDS, r"Row 1 .*label is '999"),
    "deep tools": ([TOOLS], {}, r"Row 1 .*tools is '\[\[.* must be JSON that can be read \(.*recurs"),
    "tools that are no JSON": ([{**TOOLS, "tools": "[1"}], {}, r"Row 1 .*tools is '\[1' \(str\), but must be JSON"),
    "tools that are a number": ([{**TOOLS, "tools": 7}], {}, r"Row 1 .*the chat template refuses it"),
    "messages that are a list of lists": ([{"messages": [[1]]}], {}, r"Row 1 .*messages is \[\[1\]\] \(list\)"),
    "a message that holds much": (
        [{"messages": [{"role": "user", "content": ["x" * 1000] * 1000}]}],
        {},
        r"Row 1 .* must be text under role",
    ),
    "text that is an object": ([{"text": {"a": "b" * 10**6}}], {}, r"Row 1 .*text is \{'a': 'bbb"),
    "thousands of columns": ([{f"c{i}": 1 for i in range(3000)}], {}, r"has the columns c0, c1, .*, \.\.\., but needs"),
}


@pytest.mark.parametrize("case", ROWS)
def test_an_odd_row_is_one_sentence(tokenizer: Any, write: Any, case: str, monkeypatch: Any) -> None:
    rows, keys, sentence = ROWS[case]
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    with pytest.raises(UserError, match=sentence) as caught:
        load(tokenizer, write(rows), **keys)
    assert len(str(caught.value)) < 600


def test_columns_that_python_cannot_hold(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    years = pyarrow.array([10**18], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": years}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the column text cannot be read|text is .*, but must be text"):
        load(tokenizer, str(tmp_path / "a.parquet"))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"b\.parquet cannot be read as parquet"):
        load(tokenizer, str(tmp_path / "b.parquet"))

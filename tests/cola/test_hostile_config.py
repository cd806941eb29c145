"""Configuration files that nobody would write by hand: one sentence each, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import config, plain_yaml
from cola_fast.errors import LONGEST, UserError, listed, reason, shown

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
LEAST = "model: {name: m}\ndata: {train: t.jsonl}\n"

REFUSED: dict[str, tuple[str, str]] = {
    "laughs": (LAUGHS, r"line \d is not valid YAML: there are more than 100000 values"),
    "merged laughs": (MERGES, r"there are more than 100000 values"),
    "a list that holds itself": ("chain: &a [*a]", r"\*a stands for something that holds it"),
    "a mapping that holds itself": ("chain: &a {targets: *a}", r"\*a stands for something that holds it"),
    "a merge of itself": ("chain: &a {<<: *a}", r"\*a stands for something that holds it"),
    "deep lists": ("chain: " + "[" * 20_000, r"more than 50 deep"),
    "deep mappings": ("{a: " * 20_000, r"more than 50 deep"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(500)), r"more than 50 deep"),
    "deep aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)),
        r"line 49 .* more than 50 deep",
    ),
    "a merge of a number": ("chain: {<<: 3}", r"<< merges mappings, but this is none"),
    "python": ("out: !!python/object/apply:os.system [ls]", r"the tag !!python/object/apply:os.system is not for"),
    "binary": ("out: !!binary aGVsbG8=", r"the tag !!binary is not for"),
    "set": ("chain: {targets: !!set {q_proj, v_proj}}", r"the tag !!set is not for"),
    "omap": ("chain: !!omap [r: 8]", r"the tag !!omap is not for"),
    "own tag": ("out: !mine x", r"the tag !mine is not for"),
    "digits": (f"chain: {{r: {'9' * 5000}}}", r"a number has 5000 characters"),
    "hexadecimal digits": (
        f"chain: {{r: 0x{'f' * 300}}}",
        r"chain.r is a whole number of 1200 bits, but a number of 64",
    ),
    "a long number": (f"chain: {{alpha: 0x{'f' * 300}}}", r"chain.alpha is a whole number of 1200 bits"),
    "minutes without end": ("chain: {r: " + "1:" * 200_000 + "1}", r"a number has 400001 characters"),
    "no integer": ("chain: {r: !!int x}", r"'x' cannot be read as int"),
    "an empty integer": ("chain: {r: !!int ''}", r"'' cannot be read as int"),
    "no truth value": ("chain: {r: !!bool x}", r"'x' cannot be read as bool"),
    "no binary digits": ("chain: {r: 0b_}", r"'0b_' cannot be read as int"),
    "nan": ("chain: {alpha: .nan}", r"chain.alpha is nan \(float\), but must be a number"),
    "inf": ("schedule: {lr: .inf}", r"schedule.lr is inf \(float\), but must be a number"),
    "nan as a whole number": ("train: {seed: .nan}", r"train.seed is nan \(float\), but must be a whole number"),
    "a NUL": ("out: a\0b", r"the character '\\x00' is not allowed"),
    "an escape": ("out: \x1b[2Jrun", r"the character '\\x1b' is not allowed"),
    "a NUL, escaped": ('out: "a\\0b"', r"out is 'a\\x00b', which holds a character that no file name"),
    "half a character": ('out: "\\ud800"', r"out is '\\ud800', which holds a character"),
    "a list as a key": ("? [a]\n: 1", r"line 1 is not valid YAML: a key is a list or a mapping"),
    "an unknown alias": ("out: *gone", r"found undefined alias"),
    "two documents": ("a: 1\n---\nb: 2", r"but found another document"),
    "twice": ("chain: {r: 1, alpha: 2, r: 3}", r"'r' is there twice"),
    "twice, spelt apart": (
        "data: {verbalisers: {0: a, 'true': c, True: d}}",
        r"data.verbalisers gives 'true' twice",
    ),
    "twice, to Python": ("data: {verbalisers: {1: a, true: b}}", r"'true' is there twice"),
    "a number as a key": (f"0x{'f' * 300}: 1", r"Unknown key a whole number of 1200 bits"),
    "null as a key": ("null: 1", r"Unknown key None"),
    "a long key": (f"chain: {{{'k' * 900}: 1}}", r"Unknown key chain.kkk"),
    "a section that is a list": ("chain: [1]", r"chain is \[1\], but it is a section"),
    "a method that is a list in a list": ("chain: {method: [[[[cola]]]]}", r"chain.method is "),
    "escapes in a value": ('chain: {r: "\\e[2J"}', r"chain.r is '\\x1b\[2J' \(str\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_file_is_one_short_sentence(case: str, tmp_path: Path) -> None:
    text, sentence = REFUSED[case]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        config.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700 + len(str(path))


def test_a_hostile_override_is_one_sentence_too() -> None:
    raw = yaml.safe_load(LEAST)
    with pytest.raises(UserError, match=r"\*a stands for something that holds it\): put the value in quotes"):
        config.from_dict(raw, ["targets=&a [*a]"])
    with pytest.raises(UserError, match=r"is not an override: write key=value") as caught:
        config.from_dict(raw, ["k" * 100_000])
    assert len(str(caught.value)) < 300


def test_dates_are_text_and_anchors_merge(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"{LEAST}out: 2024-01-01\nschedule: {{steps: 3}}\n"
        "chain:\n  gelora: &g {<<: &h {examples: 5}, examples: 7}\n  targets: &t [q_proj]\n"
    )
    made = config.load(path)
    assert (made.out, made.chain.gelora.examples, made.chain.targets) == ("2024-01-01", 7, ("q_proj",))
    path.write_text(config.to_yaml(made))
    assert config.load(path) == made


def test_a_key_is_twice_only_where_it_is_written_twice() -> None:
    """Not where a merge that came first has brought it."""
    text = "a: {b: {c: &m {<<: &n {x: 1}, x: 2}}}\nd: {<<: *m, y: 3}"
    assert plain_yaml.parse(text) == {"a": {"b": {"c": {"x": 2}}}, "d": {"x": 2, "y": 3}}


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"/dev/zero has more than 1000000 characters"):
        config.load("/dev/zero")


def test_many_keys_are_compared_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 ranks for modules: a check of each key against each other would count them 400 million times."""
    compared = 0

    class Key(str):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, str(other))

        __hash__ = str.__hash__

    node = yaml.compose("{" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}", Loader=plain_yaml._Loader)
    for key, _ in node.value:
        key.value = Key(key.value)
    loader = plain_yaml._Loader("")
    loader.construct_object = lambda key: key.value  # type: ignore[method-assign]
    loader._check_keys([key for key, _ in node.value])
    assert compared < 4000


LOOP: list[Any] = []
LOOP.append(LOOP)
WIDE: Any = "x"
for _ in range(40):
    WIDE = [WIDE] * 10


@pytest.mark.parametrize(
    "value",
    [
        LOOP,
        WIDE,
        "x" * 10**7,
        b"x" * 10**7,
        1 << 10**6,
        {"a": WIDE},
        [1 << 10**6],
        {1 << 10**6: "\x1b"},
        set(range(99)),
    ],
    ids=["cyclic", "laughs", "text", "bytes", "number", "mapping", "list", "keys", "set"],
)
def test_a_value_is_cut_before_it_is_written_out(value: Any) -> None:
    assert len(shown(value)) <= 120
    assert shown(value).isprintable()


def test_ordinary_values_are_shown_as_python_writes_them() -> None:
    for value in (1, 0.5, None, True, "it's", [1, "a"], {"a": (1,)}):
        assert shown(value) == repr(value)


def test_a_sentence_is_bounded_and_cannot_command_a_terminal() -> None:
    sentence = str(UserError("\x1b]0;owned\x07 and \u202e and \ud800 " + "x" * 10**6))
    assert sentence.startswith(r"\x1b]0;owned\x07 and \u202e and \ud800 xxx")
    assert sentence.isprintable()
    assert len(sentence) <= LONGEST
    assert listed(range(100), 3) == "0, 1, 2, ..."
    assert reason(KeyError("weight_map")) == "KeyError: 'weight_map'"
    assert reason(ValueError("a\n  b.")) == "a b"
    assert reason(ZeroDivisionError()) == "ZeroDivisionError"

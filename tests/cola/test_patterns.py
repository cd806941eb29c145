"""Patterns for module names: the same answer as `re.fullmatch`, in bounded time."""

from __future__ import annotations

import random
import re

import pytest

from cola_fast import attach
from cola_fast.errors import UserError
from cola_fast.layers import name_patterns

from ..conftest import tiny_llama

NAMES = [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
ORDINARY = [
    r".*layers\.(0|1[01])\.self_attn\.[qv]_proj",
    r"^(?!.*mlp).*_proj$",
    r"(?i:.*Q_PROJ)",
    r"model\.layers\.\d{2,}\..+?(?<=up_)proj",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    r"[^0-9]*[3-5]\W\w+[^\d\s].*",
    r"model.layers.0.self_attn.q_proj",
]
ATOMS = [*"ab.1^$", "[ab]", "[^a]", r"\d", r"\w", r"\W", r"\b", r"\B", r"\.", r"\Z", r"\A", "[a-c1]", r"[^\d.]", r"\s"]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "+?", "{2,}"]


def draw(source: random.Random, depth: int) -> str:
    kind = source.random()
    if depth == 0 or kind < 0.35:
        return source.choice(ATOMS)
    one, other = draw(source, depth - 1), draw(source, depth - 1)
    if kind < 0.6:
        return one + other
    if kind < 0.72:
        return f"(?:{one}|{other})"
    if kind < 0.9:
        return f"(?:{one}){source.choice(REPEATS)}"
    return source.choice([f"(?={one})", f"(?!{one})", f"(?i:{one})", f"({one})", "(?<=ab)", "(?<!a)"])


@pytest.mark.parametrize("pattern", ORDINARY)
def test_patterns_as_people_write_them(pattern: str) -> None:
    expected = [name for name in NAMES if re.fullmatch(pattern, name)]
    assert 0 < len(expected) < len(NAMES)
    assert list(filter(name_patterns.compile(pattern), NAMES)) == expected
    ends = re.compile(rf"(.*\.)?({pattern})$")
    assert list(filter(name_patterns.compile_end(pattern), NAMES)) == list(filter(ends.match, NAMES))


def test_drawn_patterns_give_the_answer_of_re() -> None:
    source = random.Random(0)
    yes = 0
    for _ in range(1500):
        pattern = draw(source, source.randrange(1, 5))
        names = ["".join(source.choice("abB.1_ ") for _ in range(source.randrange(1, 7))) for _ in range(5)]
        found, expected = name_patterns.compile(pattern), re.compile(pattern)
        for name in names:
            answer = expected.fullmatch(name) is not None
            assert found(name) == answer, (pattern, name)
            yes += answer
    assert yes > 100


HOSTILE = {
    "nested repetitions": "(a*)*b",
    "nested repetitions of all": "((((.*)*)*)*)*x",
    "alternatives that overlap": "(a|aa|.)*x",
    "many repetitions": ".*" * 30 + "x",
    "counted": "(((.{0,99}){0,99}){0,99}){0,99}x",
    "counted to a million": "(.{0,1000000}){1000000}x",
    "in a look-ahead": "(?=(.*)*x).*",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pattern_takes_few_steps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`re` takes 2^30 steps and more for these."""
    monkeypatch.setattr(name_patterns, "STEPS", 2000)
    assert not name_patterns.compile(HOSTILE[case])("a" * 40)


REFUSED = {
    "a back reference": (r"(.*)\1", "it uses groupref, which is not supported"),
    "look-aheads at every place": (
        "(?:" + "(?=.*.*.*.*x)|" * 30 + ".)*",
        "it repeats repetitions, which takes too long",
    ),
    "groups without end": ("(" * 900 + "a" + ")" * 900, "its groups are too deep in each other"),
    "no end of characters": ("a" * 30_000, "it has more than 20000 characters"),
    "a group that is not closed": ("(a", r"missing \), unterminated subpattern"),
    "a group that was never opened": ("a)(b", "unbalanced parenthesis"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_pattern_is_refused(case: str) -> None:
    pattern, sentence = REFUSED[case]
    with pytest.raises(name_patterns.PatternError, match=sentence):
        name_patterns.compile_end(pattern)("a" * 60)


@pytest.mark.parametrize("key", ["targets", "rank_pattern"])
@pytest.mark.parametrize("pattern", ["(.*)*x", r"(.*)\1", "(q_proj"])
def test_the_sentence_names_the_pattern(pattern: str, key: str) -> None:
    keys = {key: pattern if key == "targets" else {pattern: 2}}
    with pytest.raises(UserError, match=rf"The (target|rank_pattern key) '{re.escape(repr(pattern)[1:-1])}' "):
        attach(tiny_llama(), r=2, **keys)

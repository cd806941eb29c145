"""messages.py: what a row of messages says is followed or refused, and never passed over."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import json
from pathlib import Path
from typing import Any

import pytest

from cola_fast.data.messages import with_objects
from cola_fast.errors import UserError

from .test_data import CHAT, MARKED, _own_cache, load, only, spoken, tokenizer, write  # noqa: F401

# As Qwen's and Llama's templates do it.
CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>\n{% if m.content %}"
    "{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def call(**arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]


ASK = {"role": "user", "content": "what is it"}


# --- null -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}], ids=["null", "absent", "empty"])
def test_a_call_of_a_tool_needs_no_content(tokenizer: Any, write: Any, content: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CALLS)
    talk = [ASK, {"role": "assistant", **content, "tool_calls": call(x=1), "refusal": None}]
    example = only(load(tokenizer, write([{"messages": talk}])))
    assert spoken(tokenizer, example) == '<call>{"name": "f", "arguments": {"x": 1}}</call></s>'


def test_nulls_that_the_row_wrote_stay(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    """And no others come in, whatever keys other rows have."""
    monkeypatch.setattr(tokenizer, "chat_template", CALLS)
    tools = [{"name": "f", "parameters": {"x": {"enum": ["a", None], "default": None}}}]
    rows = [
        {"messages": [ASK, {"role": "assistant", "tool_calls": call(x=None, y=[None])}], "tools": tools},
        {"messages": [ASK, {"role": "assistant", "tool_calls": call(z={"x": 1})}], "tools": json.dumps(tools)},
        {"messages": [ASK, {"role": "assistant", "content": "a film", "tool_calls": None}]},
    ]
    examples = load(tokenizer, write(rows)).train
    assert [spoken(tokenizer, example) for example in examples] == [
        '<call>{"name": "f", "arguments": {"x": null, "y": [null]}}</call></s>',
        '<call>{"name": "f", "arguments": {"z": {"x": 1}}}</call></s>',
        "a film</s>",
    ]
    described = '[{"name": "f", "parameters": {"x": {"enum": ["a", null], "default": null}}}]\n<|user|>'
    starts = [tokenizer.decode(example.input_ids)[: len(described)] for example in examples]
    assert starts[:2] == [described] * 2
    assert starts[2].startswith("<|user|>")


def test_nulls_that_a_table_filled_in_go(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import datasets

    monkeypatch.setattr(tokenizer, "chat_template", CALLS)
    rows = [[ASK, {"role": "assistant", "tool_calls": call(**{name: 1})}] for name in ("x", "y")]
    datasets.Dataset.from_dict({"messages": rows}).to_parquet(str(tmp_path / "a.parquet"))
    data = load(tokenizer, str(tmp_path / "a.parquet"))
    assert [spoken(tokenizer, example) for example in data.train] == [
        f'<call>{{"name": "f", "arguments": {{"{name}": 1}}}}</call></s>' for name in ("x", "y")
    ]


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_that_the_template_does_not_write_are_refused(tokenizer: Any, write: Any, key: str) -> None:
    talk = [ASK, {"role": "assistant", "content": "", key: call(x=1)}]
    with pytest.raises(UserError, match=rf"Row 1 of .* the chat template refuses it: it writes no {key}"):
        load(tokenizer, write([{"messages": talk}]))


BY_ITSELF = (
    "f({% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %})"
)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ call.function | tojson }}", '{"name": "f", "arguments": {"x": null}}'),
        ("{{ call.function['arguments'] | tojson }}", '{"x": null}'),
        ("{{ call['function']['name'] + call['function']['arguments'] }}", 'f{"x": null}'),
        ("{{ call.function.arguments }}", '{"x": null}'),
        ("{% for name, value in call.function.arguments | items %}{{ name }}={{ value }}{% endfor %}", "x=None"),
        (BY_ITSELF, 'f({"x": null})'),
    ],
)
def test_arguments_that_are_json_text(
    tokenizer: Any, write: Any, written: str, expected: str, monkeypatch: Any
) -> None:
    """As OpenAI has them. transformers' templates get objects: most would write text as a string in JSON."""
    monkeypatch.setattr(tokenizer, "chat_template", CALLS.replace("{{ call.function | tojson }}", written))
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}]
    talk = [ASK, {"role": "assistant", "content": None, "tool_calls": calls}]
    example = only(load(tokenizer, write([{"messages": talk}])))
    assert spoken(tokenizer, example) == f"<call>{expected}</call></s>"


@pytest.mark.parametrize("arguments", ["[1]", "not JSON", "", 7, {"x": 1}], ids=str)
def test_arguments_that_are_no_json_text_of_an_object_stay(
    tokenizer: Any, write: Any, arguments: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CALLS)
    talk = [ASK, {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]
    example = only(load(tokenizer, write([{"messages": talk}])))
    assert json.dumps({"arguments": arguments}) in spoken(tokenizer, example)


@pytest.mark.parametrize("calls", [7, "a", [1], [{"function": 1}], [{"function": {"name": "f"}}]], ids=str)
def test_odd_calls_are_the_templates_to_refuse(calls: Any) -> None:
    message = {"role": "assistant", "tool_calls": calls}
    assert with_objects(message) == message


def test_text_that_the_template_loses_is_refused(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    """As SmolVLM's does, which wants content in parts."""
    parts = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("{{ m['content'] }}", parts))
    with pytest.raises(UserError, match=r"Row 1 of .* refuses it: it writes nothing of what the assistant says"):
        load(tokenizer, write([{"messages": [ASK, {"role": "assistant", "content": "a film"}]}]))


# --- content in parts -------------------------------------------------------------------------------------------------


def test_text_in_parts_is_one_text(tokenizer: Any, write: Any) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "film", "image_url": None}]
    whole, in_parts = load(
        tokenizer,
        write([{"messages": [ASK, {"role": "assistant", "content": text}]} for text in ("a film", parts)]),
    ).train
    assert in_parts == whole


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": "text", "text": "a", "weight": 0},
        {"type": "input_audio", "text": "a"},
        "a",
    ],
    ids=str,
)
def test_other_parts_are_refused(tokenizer: Any, write: Any, part: Any) -> None:
    talk = [{"role": "user", "content": [{"type": "text", "text": "b"}, part]}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"Row 1 of .*must be text under role and under content \(or parts"):
        load(tokenizer, write([{"messages": talk}]))


# --- which turns are learned ------------------------------------------------------------------------------------------

SILENT = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"train_on_turn": False}]
SILENT += [{"loss": False}, {"weight": 0, "train": False}]
LOUD = [{"weight": 1}, {"train": True}, {"weight": None}, {"loss": True, "training": 1}]
TEMPLATES = pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation-marks"])


def talk_of(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    """Two turns of the assistant, with keys of their own."""
    texts = ("a film.", "it was.")
    return [
        message
        for text, keys in zip(texts, answers, strict=True)
        for message in (ASK, {"role": "assistant", "content": text, **keys})
    ]


@TEMPLATES
@pytest.mark.parametrize("keys", SILENT, ids=str)
def test_a_turn_that_is_not_to_be_learned(
    tokenizer: Any, write: Any, keys: Any, template: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [{"messages": talk_of(*answers)} for answers in ((keys, {}), ({}, keys), ({}, {}))]
    first, second, both = load(tokenizer, write(rows)).train
    assert spoken(tokenizer, first) == "it was.</s>"
    assert spoken(tokenizer, second) == "a film.</s>"
    assert spoken(tokenizer, both) == "a film.</s>it was.</s>"
    assert first.input_ids == second.input_ids == both.input_ids


@TEMPLATES
@pytest.mark.parametrize("keys", LOUD, ids=str)
def test_a_turn_that_is_to_be_learned(tokenizer: Any, write: Any, keys: Any, template: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    said, plain = load(tokenizer, write([{"messages": talk_of(keys, {})}, {"messages": talk_of({}, {})}])).train
    assert said == plain


def test_a_row_of_which_nothing_is_learned_is_counted(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write([{"messages": talk_of({"weight": 0}, {"weight": 0})}, {"messages": talk_of({}, {})}]))
    assert len(data.train) == 1
    assert "1 dropped with no token to learn from" in data.notes[0]


def test_a_users_turn_may_say_that_it_is_not_learned(tokenizer: Any, write: Any) -> None:
    talk = [{**ASK, "weight": 0, "train": False}, {"role": "assistant", "content": "a film."}]
    assert spoken(tokenizer, only(load(tokenizer, write([{"messages": talk}])))) == "a film.</s>"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "half": (
        {"weight": 0.5},
        r"messages is \{'weight': 0.5\} \(dict\), but must be 0 or 1, false or true under weight",
    ),
    "text": ({"train": "false"}, r"must be 0 or 1, false or true under train"),
    "two minds": ({"weight": 1, "train": False}, r"must be the same under weight and train"),
    "spans": (
        {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        r"must be without train_detail",
    ),
    "a prompt": ({"train_on_input": True}, r"must be without train_on_input, which is not followed: weight 0 leaves"),
    "a scale": ({"loss_scale": 2.0}, r"must be without loss_scale"),
    "ignored": ({"ignore": True}, r"must be without ignore"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_instruction_that_is_not_followed_is_refused(tokenizer: Any, write: Any, case: str) -> None:
    keys, sentence = REFUSED[case]
    rows = [{"messages": talk_of({}, {})}, {"messages": talk_of({}, keys)}]
    with pytest.raises(UserError, match="Row 2 of .*" + sentence):
        load(tokenizer, write(rows))


@pytest.mark.parametrize("keys", [{"weight": 1}, {"train": True}], ids=str)
def test_a_users_turn_cannot_be_learned(tokenizer: Any, write: Any, keys: Any) -> None:
    talk = [{**ASK, **keys}, {"role": "assistant", "content": "a film."}]
    with pytest.raises(UserError, match=r"Row 1 of .*'user'.* without that: only the assistant's turns are learned"):
        load(tokenizer, write([{"messages": talk}]))


def test_marks_that_are_not_one_a_turn(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    """Which are those of the turn to leave out? Without one, they are followed."""
    twice = "{% generation %}{{ m['content'] }}{% endgeneration %} {% generation %}</s>{% endgeneration %}"
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}" + twice + "{% endif %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert spoken(tokenizer, only(load(tokenizer, write([{"messages": talk_of({}, {})}])))) == "a film.</s>it was.</s>"
    with pytest.raises(UserError, match=r"Row 1 of .* marks are not one a turn, so that those not to learn cannot be"):
        load(tokenizer, write([{"messages": talk_of({}, {"weight": 0})}]))


def test_other_keys_are_the_templates(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT.replace("<|{{", "{{ m['mood'] }}<|{{"))
    talk = [{**ASK, "mood": "warm"}, {"role": "assistant", "content": "a film."}]
    assert tokenizer.decode(only(load(tokenizer, write([{"messages": talk}]))).input_ids).startswith("<s>warm<|user|>")


# --- beside the messages ----------------------------------------------------------------------------------------------


def test_variables_of_the_template(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    """As TRL has them, a row's own."""
    monkeypatch.setattr(tokenizer, "chat_template", "{% if think %}think{% endif %}" + CHAT)
    talk = talk_of({}, {})
    rows: list[dict[str, Any]] = [{"messages": talk, "chat_template_kwargs": {"think": True}}, {"messages": talk}]
    rows += [{"messages": talk, "chat_template_kwargs": '{"think": false}'}]
    texts = [tokenizer.decode(example.input_ids) for example in load(tokenizer, write(rows)).train]
    assert texts[0] == "think" + texts[1]
    assert texts[2] == texts[1]


@pytest.mark.parametrize("keys", [{"tokenize": True}, {"chat_template": "a"}, [1], 7, "[1]", "{"], ids=str)
def test_what_is_no_variable_of_the_template_is_refused(tokenizer: Any, write: Any, keys: Any) -> None:
    rows = [{"messages": talk_of({}, {}), "chat_template_kwargs": keys}]
    with pytest.raises(UserError, match=r"Row 1 of .*chat_template_kwargs is .*, but must be (an object of var|JSON)"):
        load(tokenizer, write(rows))


def test_columns_that_are_not_followed_are_named(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write([{"messages": talk_of({}, {}), "parallel_tool_calls": False, "functions": []}]))
    assert data.notes[-1] == "train: columns that nothing uses: parallel_tool_calls, functions"

"""shapes.py: data as people have it is read as what it is, and the notes say as what."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import cli
from cola_fast.data.shapes import alpaca_prompt
from cola_fast.errors import UserError

from .test_data import CHAT, MARKED, TALK, _own_cache, load, only, spoken, tokenizer, write  # noqa: F401

TURNS = [{"from": "human", "value": "what is this?"}, {"from": "gpt", "value": "a film."}]
CHATTED = "<|user|>\nwhat is this?</s>\n<|assistant|>\na film.</s>\n"
ALPACA = {"instruction": "Say it.", "output": " it was"}
ASK, SAY = [{"role": "user", "content": "what is this?"}], [{"role": "assistant", "content": "a film."}]

# rows, keys of `data`, kind, what is learned, the note (None: plain)
SHAPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, str, str | None]] = {
    "ShareGPT": ([{"conversations": TURNS}], {}, "messages", "a film.</s>", "read as ShareGPT (conversations)"),
    "ShareGPT, singular": ([{"conversation": TURNS}], {}, "messages", "a film.</s>", "ShareGPT (conversation)"),
    "ShareGPT with roles": ([{"conversations": [*ASK, *SAY]}], {}, "messages", "a film.</s>", "ShareGPT"),
    "ShareGPT as JSON text": ([{"conversations": json.dumps(TURNS)}], {}, "messages", "a film.</s>", "ShareGPT"),
    "messages": ([{"messages": [*ASK, *SAY]}], {}, "messages", "a film.</s>", None),
    "messages as JSON text": ([{"messages": json.dumps([*ASK, *SAY])}], {}, "messages", "a film.</s>", None),
    "messages of ShareGPT's turns": ([{"messages": TURNS}], {}, "messages", "a film.</s>", None),
    "TRL": ([{"prompt": ASK, "completion": SAY}], {}, "messages", "a film.</s>", "read as TRL's conversations"),
    "Alpaca": ([ALPACA], {}, "completion", " it was</s>", "read as Alpaca (instruction, output)"),
    "Alpaca with input": ([{**ALPACA, "input": "it"}], {}, "completion", " it was</s>", "(instruction, output, input)"),
    "Alpaca with response": (
        [{"instruction": "a", "input": "b", "response": " it"}], {}, "completion", " it</s>", "read as Alpaca",
    ),
    "prompt and completion": ([{"prompt": "a", "completion": " it"}], {}, "completion", " it</s>", None),
    "prompt and response": ([{"prompt": "a", "response": " it"}], {}, "completion", " it</s>", "(prompt, response)"),
    "question and answer": ([{"question": "a", "answer": " it"}], {}, "completion", " it</s>", "(question, answer)"),
    "instruction and response": (
        [{"instruction": "a", "response": " it"}], {}, "completion", " it</s>", "(instruction, response)",
    ),
    "input and output": ([{"input": "a", "output": " it"}], {}, "completion", " it</s>", "(input, output)"),
    "Capitalised": ([{"Prompt": "a", "Completion": " it"}], {}, "completion", " it</s>", "(Prompt, Completion)"),
    "Text": ([{"Text": "a film"}], {}, "text", "a film</s>", "read as text (Text)"),
    "text": ([{"text": "a film"}], {}, "text", "a film</s>", None),
    "content": ([{"content": "a film"}], {}, "text", "a film</s>", "read as content (content)"),
    "a labelled text, asked for": ([{"text": "a film", "label": 1}], {"format": "text"}, "text", "a film</s>", None),
    "columns": (
        [{"q": "a", "a": " it", "text": "b"}], {"columns": {"prompt": "q", "completion": "a"}}, "completion", " it</s>",
        "read as prompt and completion (q, a)",
    ),
    "columns of a conversation": (
        [{"chat": TURNS}], {"columns": {"messages": "chat"}}, "messages", "a film.</s>", "read as messages (chat)",
    ),
    "template and response": (
        [{"question": "a", "answer": "it"}], {"template": "Q: {question}\nA:", "response": " {answer}!"}, "completion",
        " it!</s>", None,
    ),
    "the first that fits": (
        [{**ALPACA, "text": "a film"}], {}, "text", "a film</s>", "read as text (text); its columns also fit Alpaca",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_a_shape_is_read_and_said(tokenizer: Any, write: Any, case: str) -> None:
    rows, keys, kind, learned, note = SHAPES[case]
    data = load(tokenizer, write(rows), **keys)
    assert data.kind == kind
    assert spoken(tokenizer, only(data)) == learned
    if kind == "messages":
        assert tokenizer.decode(only(data).input_ids) == "<s>" + CHATTED
    said = [line for line in data.notes if "read as" in line]
    assert [note in line for line in said] == [True] if note else said == []


@pytest.fixture(scope="module")
def chatty_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with a tokenizer that has a chat template."""
    from ..conftest import tiny_llama

    folder = tmp_path_factory.mktemp("model") / "chatty"
    model: Any = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", SHAPES)
def test_a_shape_is_trained_on(chatty_folder: Path, raw_config: dict[str, Any], write: Any, case: str) -> None:
    """One step by `cola train`."""
    rows, keys, *_ = SHAPES[case]
    raw_config["model"]["name"] = str(chatty_folder)
    raw_config["data"] = {"train": write(rows), "eval_share": 0.0, **keys}
    raw_config["schedule"] = {"links": 1, "steps": 1, "lr": 0.01}
    assert cli.main(["train", write(yaml.safe_dump(raw_config), "config.yaml")]) == 0
    assert Path(raw_config["out"], "links", "000", "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("row", [("a", " it"), ("a\n", "it"), ("a", "it")], ids=str)
def test_what_stands_between_a_question_and_its_answer_is_said(tokenizer: Any, write: Any, row: Any) -> None:
    notes = load(tokenizer, write([{"question": row[0], "answer": row[1]}])).notes
    assert any("answer follows directly" in note for note in notes) == (row == ("a", "it"))


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}, {"input": "it"}], ids=str)
def test_alpacas_template(tokenizer: Any, write: Any, given: dict[str, Any]) -> None:
    example = only(load(tokenizer, write([{**ALPACA, **given}])))
    prompt = tokenizer.decode(example.input_ids[1 : example.prompt_length])
    assert prompt.startswith("Below is an instruction that describes a task")
    assert prompt.endswith(
        "### Instruction:\nSay it.\n\n" + "### Input:\nit\n\n" * bool(given.get("input")) + "### Response:"
    )
    assert ("paired with an input" in prompt) == bool(given.get("input"))


def test_a_brace_in_an_instruction_is_text() -> None:
    assert "### Instruction:\n{input}\n" in alpaca_prompt("{input}", "")


@pytest.mark.parametrize("speaker", ["human", "user", "Human", "prompter"])
def test_names_of_the_user(tokenizer: Any, write: Any, speaker: str) -> None:
    turns = [{"from": speaker, "value": "what is this?"}, {"from": "assistant", "value": "a film."}]
    assert tokenizer.decode(only(load(tokenizer, write([{"conversations": turns}]))).input_ids) == "<s>" + CHATTED


@pytest.mark.parametrize("speaker", ["tool", "function", "observation"])
def test_names_of_a_tool_and_calls(tokenizer: Any, write: Any, speaker: str, monkeypatch: Any) -> None:
    call = "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}"
    monkeypatch.setattr(
        tokenizer, "chat_template", CHAT.replace("{{ m['content'] }}", "{{ m['content'] or '' }}" + call)
    )
    turns = [
        {"from": "human", "value": "what is this?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": speaker, "value": "long"},
        {"from": "gpt", "value": "a film."},
    ]
    example = only(load(tokenizer, write([{"system": "be warm", "conversations": turns}])))
    assert spoken(tokenizer, example) == '{"name": "f", "arguments": {"a": 1}}</s>a film.</s>'
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<s><|system|>\nbe warm</s>")
    assert "<|tool|>\nlong</s>" in text


def test_the_assistants_turns_of_a_prompt_are_not_learned(tokenizer: Any, write: Any) -> None:
    row = {"prompt": TALK[:4], "completion": TALK[4:5]}
    assert spoken(tokenizer, only(load(tokenizer, write([row])))) == "it was.</s>"


def test_turns_of_parquet_files(tokenizer: Any, tmp_path: Path) -> None:
    """Every struct has the keys of all rows there."""
    import datasets

    path = tmp_path / "a.parquet"
    rows = [{"conversations": [{**turn, "weight": None} for turn in TURNS], "system": None}]
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    assert tokenizer.decode(only(load(tokenizer, str(path))).input_ids) == "<s>" + CHATTED


def test_held_out_rows_do_not_depend_on_the_template(tokenizer: Any, write: Any) -> None:
    rows = [{"question": f"film {i}", "answer": f" {i}"} for i in range(30)]

    def held(template: str) -> list[str]:
        data = load(tokenizer, write(rows), eval_share=0.3, template=template, response="{answer}")
        return sorted(spoken(tokenizer, example) for example in data.eval)

    assert held("{question}") == held("Q: {question} A:")
    assert len(held("{question}")) == 9


# --- which turns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation-marks"])
@pytest.mark.parametrize("learn", ["assistant", "all", "last"])
def test_learn(tokenizer: Any, write: Any, template: str, learn: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    example = only(load(tokenizer, write([{"messages": TALK}]), learn=learn))
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    wanted = {"assistant": "a film.</s>it was.</s>", "all": whole, "last": "it was.</s>"}
    assert spoken(tokenizer, example) == wanted[learn]
    assert example.input_ids == only(load(tokenizer, write([{"messages": TALK}]))).input_ids
    quiet = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    left = {"assistant": "it was.</s>", "all": whole.replace("a film.</s>", ""), "last": "it was.</s>"}
    assert spoken(tokenizer, only(load(tokenizer, write([{"messages": quiet}]), learn=learn))) == left[learn]


def test_learn_all_of_trls_conversations(tokenizer: Any, write: Any) -> None:
    example = only(load(tokenizer, write([{"prompt": TALK[:4], "completion": TALK[4:5]}]), learn="all"))
    assert spoken(tokenizer, example) == tokenizer.apply_chat_template(TALK[:5], tokenize=False)


def test_learn_does_not_change_what_is_held_out(tokenizer: Any, write: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}, *SAY]} for i in range(20)]
    held = [
        [
            tokenizer.decode(example.input_ids)
            for example in load(tokenizer, write(rows), eval_share=0.3, learn=learn).eval
        ]
        for learn in ("assistant", "all", "last")
    ]
    assert held[0] == held[1] == held[2]


# --- what is refused --------------------------------------------------------------------------------------------------

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "preferences": ([PAIR], {}, r"holds preferences .* TRL's DPOTrainer with cola_fast\.ChainCallback"),
    "good and bad completions": (
        [{"prompt": "a", "completion": "b", "label": False}], {}, r"TRL's KTOTrainer .* data\.format to completion",
    ),
    "good and bad turns": (
        [{"prompt": ASK, "completion": SAY, "label": True}], {}, r"TRL's KTOTrainer .* data\.format to messages",
    ),
    "a capital label": ([{"Text": "a", "Label": 1}], {}, r"has Text and Label, and the label would not be learned"),
    "a label": ([{"text": "a", "label": 1}], {}, r"set data\.verbalisers or model\.task; .* data\.format to text"),
    "a context": (
        [{"context": "a", "question": "b", "answer": "c"}], {},
        r'data\.template to "\{context\} \{question\}" and data\.response to "\{answer\}"',
    ),
    "unknown": ([{"questions": "a", "answers": "b"}], {}, r"nearest is question and answer: .*\{question: qu"),
    "nothing near": ([{"x": "a", "y": "b"}], {}, r"ShareGPT \(conversations\).* data\.columns maps yours"),
    "a key of columns": ([{"text": "a"}], {"columns": {"promt": "text"}}, r"the key promt, .* Did you mean prompt"),
    "a column of columns": ([{"txt": "a"}], {"columns": {"text": "tex"}}, r"maps text to 'tex', .* mean txt\?"),
    "a speaker": ([{"conversations": [{"from": "me", "value": "a"}]}], {}, r"Row 1 .*conversations is .*'me'.* one of"),
    "a value": ([{"conversations": [{"from": "gpt"}]}], {}, r"Row 1 of .*: conversations is"),
    "a call": (
        [{"conversations": [TURNS[0], {"from": "function_call", "value": "f()"}]}], {}, r"function_call that is JSON",
    ),
    "two systems": (
        [{"system": "a", "conversations": [{"from": "system", "value": "b"}, *TURNS]}], {}, r"system is 'a'.* empty",
    ),
    "a question": ([{"question": 7, "answer": "a"}], {}, r"Row 1 of .*: question is 7 \(int\), but must be text"),
    "an instruction": ([{**ALPACA, "instruction": None}], {}, r"Row 1 of .*: instruction is empty"),
    "text after messages": ([{"prompt": ASK, "completion": "a"}], {}, r"completion is 'a' .* a list of"),
    "learn": ([{"text": "a"}], {"learn": "all"}, r"data\.learn is all, but .* holds no messages"),
    "response": ([{"q": "a"}], {"template": "{q}", "response": "{b}"}, r"data\.response names 'b'"),
    "response without a column": ([{"q": "a"}], {"template": "{q}", "response": "b"}, r"'b' names no column"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_would_be_wrong_is_one_sentence(tokenizer: Any, write: Any, case: str) -> None:
    rows, keys, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        load(tokenizer, write(rows), **keys)
    assert "\n" not in str(error.value)


def test_kinds_that_differ(tokenizer: Any, write: Any) -> None:
    train, other = write([ALPACA], "a.jsonl"), write([{"text": "a"}], "b.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl holds completion rows, but .*b\.jsonl text rows"):
        load(tokenizer, train, eval=other)
    both = write([{"question": "a", "answer": " it"}], "c.jsonl")
    assert len(load(tokenizer, train, eval=both).eval) == 1

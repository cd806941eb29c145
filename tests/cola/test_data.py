"""data.py: every kind of row becomes the tokens it should, and every bad file the sentence it should."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cola_fast.config import DataConfig
from cola_fast.data.encode import IGNORE, Example
from cola_fast.data.rows import Data, load_data
from cola_fast.errors import UserError

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNSTABLE = "{% for m in messages %}{{ m['content'] }}{{ '!' if loop.last else '|' }}{% endfor %}"
LINES = ["the film was great and it was warm", "the film was terrible, it was long", "what is this? it is a film."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE as small as they come, with BOS put first by the tokenizer itself, as Llama's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(LINES * 9, trainer)
    inner.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def load(tokenizer: Any, path: str, *, context: int = 4096, seed: int = 0, **keys: Any) -> Data:
    return load_data(DataConfig(**{"train": path, "eval_share": 0.0, **keys}), tokenizer, context=context, seed=seed)


def only(data: Data) -> Example:
    assert len(data.train) == 1
    return data.train[0]


def spoken(tokenizer: Any, example: Example) -> str:
    """The text that carries loss."""
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE]))


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_text_has_bos_once_eos_once_and_loss_everywhere_else(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write([{"text": LINES[0]}]))
    assert data.kind == "text"
    ids = only(data).input_ids
    assert tokenizer.decode(ids) == f"<s>{LINES[0]}</s>"
    assert only(data).labels == [IGNORE, *ids[1:]]


def test_completion_has_loss_on_the_completion_and_eos_only(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write([{"prompt": "what is this?", "completion": " it is a film."}]))
    example = only(data)
    assert data.kind == "completion"
    assert spoken(tokenizer, example) == " it is a film.</s>"
    # the prompt's tokens are exactly those of inference
    assert example.input_ids[: example.prompt_length] == tokenizer("what is this?")["input_ids"]
    assert example.labels[: example.prompt_length] == [IGNORE] * example.prompt_length


def test_a_prompt_whose_last_token_the_completion_would_swallow(tokenizer: Any, write: Any) -> None:
    alone = tokenizer("it was ")["input_ids"]
    assert tokenizer("it was great")["input_ids"][: len(alone)] != alone  # the case exists with this tokenizer
    data = load(tokenizer, write([{"prompt": "it was ", "completion": "great"}]))
    assert only(data).input_ids[: only(data).prompt_length] == alone
    assert tokenizer.decode(only(data).input_ids) == "<s>it was great</s>"
    assert "1 pieces tokenised apart" in data.notes[0]


TALK = [
    {"role": "system", "content": "be warm"},
    {"role": "user", "content": "what is this?"},
    {"role": "assistant", "content": "a film."},
    {"role": "user", "content": "was it long"},
    {"role": "assistant", "content": "it was."},
    {"role": "user", "content": "great"},
]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation-marks"])
def test_messages_have_loss_on_the_assistant_only(tokenizer: Any, write: Any, template: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    data = load(tokenizer, write([{"messages": TALK}]))
    assert data.kind == "messages"
    assert spoken(tokenizer, only(data)) == "a film.</s>it was.</s>"
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert only(data).input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]  # so BOS is there once


def test_tools_reach_the_template(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT
    monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = TALK[1:3]
    rows = [{"messages": talk, "tools": [{"name": "a", "b": 1}]}, {"messages": talk, "tools": [{"name": "c"}]}]
    texts = [tokenizer.decode(example.input_ids) for example in load(tokenizer, write(rows)).train]
    assert texts[0].startswith('{"name": "a", "b": 1}<s>') or texts[0].startswith('{"b": 1, "name": "a"}<s>')
    assert texts[1].startswith('{"name": "c"}<s>')
    as_json = [{"messages": talk, "tools": json.dumps([{"name": "c"}])}]
    assert tokenizer.decode(only(load(tokenizer, write(as_json, "b.jsonl"))).input_ids) == texts[1]


def test_a_text_that_begins_with_bos_has_it_once(tokenizer: Any, write: Any) -> None:
    plain, written = load(tokenizer, write([{"text": "a film"}, {"text": "<s>a film"}])).train
    assert written == plain
    pairs = [{"prompt": "a", "completion": " film"}, {"prompt": "<s>a", "completion": " film"}]
    plain, written = load(tokenizer, write(pairs, "b.jsonl")).train
    assert written == plain


def test_another_content_under_the_same_name_and_time_is_read(tokenizer: Any, write: Any) -> None:
    """As of a file that tar or rsync has put in the place of another."""
    path = Path(write([{"text": "this"}]))
    before = path.stat()
    load(tokenizer, str(path))
    write([{"text": "film"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tokenizer.decode(only(load(tokenizer, str(path))).input_ids) == "<s>film</s>"


def test_a_name_of_a_file_is_no_pattern(tokenizer: Any, write: Any) -> None:
    write([{"text": "another"}], "data1.jsonl")
    (example,) = load(tokenizer, write([{"text": "this"}], "data[1].jsonl")).train
    assert tokenizer.decode(example.input_ids) == "<s>this</s>"


def test_messages_without_an_assistant_are_dropped_and_counted(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write([{"messages": TALK}, {"messages": TALK[:2]}]))
    assert len(data.train) == 1
    assert "1 dropped with no token to learn from" in data.notes[0]


def test_classification_offers_every_candidate(tokenizer: Any, write: Any) -> None:
    path = write([{"text": "the film", "label": 1, "n": 7}])
    data = load(tokenizer, path, template="{n}: {text} was", verbalisers={"0": " terrible", "1": " great"})
    example = only(data)
    assert (data.kind, data.labels, example.answer) == ("classification", ("0", "1"), 1)
    assert tokenizer.decode(example.input_ids) == "<s>7: the film was great"
    assert spoken(tokenizer, example) == " great"
    assert [tokenizer.decode(list(c)) for c in example.candidates] == [" terrible", " great"]
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == "<s>7: the film was"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"text": "NA", "label": true}, {"text": "b", "label": false}]'),
        ("a.csv", "text,label\nNA,true\nb,false\n"),
        ("A.JSONL", '{"text": "NA", "label": "true"}\n{"text": "b", "label": "false"}\n'),
    ],
)
def test_file_kinds_and_label_spellings_agree(tokenizer: Any, write: Any, name: str, text: str) -> None:
    data = load(tokenizer, write(text, name), template="{text} was", verbalisers={"true": " great", "false": " long"})
    assert [tokenizer.decode(e.input_ids) for e in data.train] == ["<s>NA was great", "<s>b was long"]


def test_cells_of_a_csv_file_are_read_as_they_are_written(tokenizer: Any, write: Any) -> None:
    path = write("text,label\n007,1.0\n1.10,0.0\n,TRUE\n42,true\n", "a.csv")
    data = load(tokenizer, path, template="<{text}>", verbalisers={"0": " bad", "1": " good", "true": " fair"})
    assert [tokenizer.decode(e.input_ids) for e in data.train] == [
        "<s><007> good", "<s><1.10> bad", "<s><> fair", "<s><42> fair",
    ]  # fmt: skip


def test_parquet_with_class_names(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features).to_parquet(str(path))
    data = load(tokenizer, str(path), verbalisers={"good": " great", "bad": " long"})
    assert [e.answer for e in data.train] == [0, 1]


# --- length -----------------------------------------------------------------------------------------------------------


def test_max_length_is_capped_by_the_context_and_text_cut_on_the_right(tokenizer: Any, write: Any) -> None:
    path = write([{"text": " ".join(LINES)}])
    data = load(tokenizer, path, context=10)
    assert data.max_length == 10
    assert "the model's context" in data.notes[0]
    assert only(data).input_ids == only(load(tokenizer, path)).input_ids[:10]
    assert "1 longer than 10 tokens; 1 of these cut from the right" in data.notes[1]


@pytest.mark.parametrize("kind", ["completion", "classification"])
def test_the_prompt_is_cut_from_the_left_and_the_answer_never(tokenizer: Any, write: Any, kind: str) -> None:
    prompt = " ".join(LINES)
    path = write([{"prompt": prompt, "completion": " great", "label": "a"}])
    words = {"a": " great", "b": " a terrible, terrible film"} if kind == "classification" else None
    whole = only(load(tokenizer, path, template="{prompt}", verbalisers=words))
    cut = only(load(tokenizer, path, template="{prompt}", verbalisers=words, max_length=20))
    tail = max(map(len, whole.candidates), default=len(whole) - whole.prompt_length)  # the longest candidate must fit
    assert cut.prompt_length + tail == 20
    assert cut.input_ids == [tokenizer.bos_token_id, *whole.input_ids[whole.prompt_length - (20 - tail - 1) :]]
    assert spoken(tokenizer, cut) == spoken(tokenizer, whole)
    assert len(cut.labels) == len(cut.input_ids)
    assert cut.labels[: cut.prompt_length] == [IGNORE] * cut.prompt_length


def test_too_long_drop_and_a_completion_that_cannot_fit(tokenizer: Any, write: Any) -> None:
    rows = [{"prompt": "it is", "completion": " long"}, {"prompt": "it is", "completion": " ".join(LINES)}]
    for policy in ("drop", "truncate"):
        data = load(tokenizer, write(rows), max_length=12, too_long=policy)
        assert len(data.train) == 1
        assert "1 longer than 12 tokens; 1 of these dropped" in data.notes[-1]


def test_too_long_error_names_the_row(tokenizer: Any, write: Any) -> None:
    with pytest.raises(UserError, match=r"Row 2 of .*rows\.jsonl has \d+ tokens, more than the 12 allowed"):
        load(tokenizer, write([{"text": "it"}, {"text": " ".join(LINES)}]), max_length=12, too_long="error")


def test_messages_cut_before_the_answer_are_dropped(tokenizer: Any, write: Any) -> None:
    with pytest.raises(UserError, match=r"None of the 1 rows .* 1 dropped with no token to learn from"):
        load(tokenizer, write([{"messages": TALK}]), max_length=8)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_hold_out_is_seeded_and_independent_of_the_order(tokenizer: Any, write: Any) -> None:
    rows = [{"text": f"film {i}"} for i in range(40)]

    def held(rows: list[dict[str, str]], seed: int) -> set[str]:
        data = load(tokenizer, write(rows), eval_share=0.25, seed=seed)
        texts = [{tokenizer.decode(e.input_ids) for e in part} for part in (data.train, data.eval)]
        assert (len(texts[0]), len(texts[1])) == (30, 10)
        assert not texts[0] & texts[1]
        assert data.test is data.eval
        return texts[1]

    assert held(rows, 0) == held(rows[::-1], 0)
    assert held(rows, 0) != held(rows, 1)


def test_equal_rows_stay_on_one_side_and_training_rows_remain(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write([{"text": "a"}] * 5 + [{"text": "b"}] * 5), eval_share=0.1)
    assert {len(data.train), len(data.eval)} == {5}
    assert len({tuple(e.input_ids) for e in data.train}) == 1
    same = load(tokenizer, write([{"text": "a"}] * 5, "same.jsonl"), eval_share=0.5)
    assert (len(same.train), len(same.eval)) == (5, 0)


def test_eval_and_test_files_and_limit(tokenizer: Any, write: Any) -> None:
    rows = [{"text": f"film {i}"} for i in range(9)]
    files = {name: write(rows[start:], f"{name}.jsonl") for name, start in (("train", 0), ("eval", 2), ("test", 3))}
    data = load(tokenizer, files["train"], eval=files["eval"], test=files["test"], eval_share=0.5, limit=4)
    parts = [[tokenizer.decode(e.input_ids) for e in part] for part in (data.train, data.eval, data.test)]
    assert parts == [[f"<s>film {i}</s>" for i in range(start, start + 4)] for start in (0, 2, 3)]


# --- bad input --------------------------------------------------------------------------------------------------------

ROW = {"text": "a", "label": "x"}
WORDS = {"verbalisers": {"x": " great", "y": " long"}}
BAD: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "empty": ("a.jsonl", "", {}, r"a\.jsonl holds no rows"),
    "blank": ("a.jsonl", "\n\n", {}, r"holds no rows"),
    "header-only": ("a.csv", "text,label\n", {}, r"holds no rows"),
    "jsonl": ("a.jsonl", '{"text": "a"}\n\n{"text": oops}\n', {}, r"cannot be read as jsonl: line 3: Expecting value"),
    "not-objects": ("a.jsonl", "1\n2\n", {}, r"line 1 is 1, but must be an object"),
    "json": ("a.json", '[{"text": "a"},\n{"text": "b"', {}, r"cannot be read as json: .*line 2"),
    "csv-cells": ("a.csv", "text,label\na, b,1\nc, d,2\n", {}, r"cannot be read as csv: Length of header"),
    "csv": ("a.csv", "text\na\nb,c,d\n", {}, r"cannot be read as csv: .*line 3"),
    "parquet": ("a.parquet", "hello", {}, r"cannot be read as parquet"),
    "extension": ("a.xlsx", "hello", {}, r"is a \.xlsx file, but data is read from \.jsonl, \.json, \.csv, \.parquet"),
    "no-known-column": ("a.jsonl", [{"txt": "a"}], {}, r"has the columns txt, but needs text, or prompt"),
    "column": (
        "a.jsonl",
        [{"txt": "a", "b": 1}],
        {"format": "text"},
        r"no column 'text' \(it has txt, b\).*mean txt\?",
    ),
    "label-column": ("a.jsonl", [{"text": "a", "labels": 1}], WORDS, r"no column 'label' .*Did you mean labels\?"),
    "null-cell": (
        "a.jsonl",
        [ROW, {"text": None}],
        {"format": "text"},
        r"Row 2 of .*: text is empty, but must be text",
    ),
    "number-cell": ("a.jsonl", [{"text": 1}, {"text": 2}], {}, r"Row 1 of .*: text is 1 \(int\), but must be text"),
    "mixed-cell": ("a.jsonl", [{"text": "a"}, {"text": ["b"]}], {}, r"Row 2 of .*text is .*\(list\), but must be text"),
    "list-in-template": (
        "a.jsonl",
        [{"text": ["a"], "label": "x"}],
        WORDS,
        r"Row 1 .*\(list\), but must be text or a num",
    ),
    "label": ("a.jsonl", [ROW, {**ROW, "label": "z"}], WORDS, r"Row 2 of .*: label is 'z', which is not in .*\(x, y\)"),
    "null-label": ("a.jsonl", [ROW, {"text": "a"}], WORDS, r"Row 2 of .*: label is None, which is not in"),
    "template-column": ("a.jsonl", [ROW], {**WORDS, "template": "{txt}"}, r"names 'txt', but .*Did you mean text\?"),
    "template-brace": ("a.jsonl", [ROW], {**WORDS, "template": "{text"}, r"data\.template '\{text' is malformed"),
    "template-constant": ("a.jsonl", [ROW], {**WORDS, "template": "was"}, r"data\.template 'was' names no column"),
    "same-words": (
        "a.jsonl",
        [ROW],
        {"verbalisers": {"x": " a", "y": " a"}},
        r"' a', ' a', but .* are empty, equal",
    ),
    "empty-word": ("a.jsonl", [ROW], {"verbalisers": {"x": " a", "y": ""}}, r"some are empty"),
    "prefix-word": (
        "a.jsonl",
        [ROW],
        {"verbalisers": {"x": " a", "y": " a film"}},
        r"or the beginning of another, which could never win",
    ),
    "yes-and-no": (
        "a.jsonl",
        [{**ROW, "label": "yes"}],
        {"verbalisers": {"true": " a", "false": " b"}},
        r"label is 'yes'.* \(YAML reads yes, no",
    ),
    "template-format": (
        "a.jsonl",
        [ROW],
        {**WORDS, "template": "{text:.3}"},
        r"formats a column, but can only",
    ),
    "nan-cell": (
        "a.jsonl",
        '{"text": NaN, "label": "x"}\n{"text": 2.5, "label": "x"}\n',
        WORDS,
        r"Row 1 .*text is .*, but must be text or a number",
    ),
    "assistant-first": (
        "a.jsonl",
        [{"messages": [{"role": "assistant", "content": "hi"}]}],
        {},
        r"Row 1 .* begins with the assistant",
    ),
    "messages-text": ("a.jsonl", [{"messages": "hi"}], {}, r"Row 1 .*messages is 'hi' \(str\), but must be a list of"),
    "messages-role": ("a.jsonl", [{"messages": [{"content": "hi"}]}], {}, r"Row 1 .* must be text under role"),
    "messages-null": (
        "a.jsonl",
        [{"messages": [{"role": "user", "content": None}]}],
        {},
        r"Row 1 .* must be text under",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tokenizer: Any, write: Any, case: str) -> None:
    name, rows, keys, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        load(tokenizer, write(rows, name), **keys)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf_8(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl is not UTF-8|cannot be read as jsonl") as error:
        load(tokenizer, str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "/no/such/file", "./gone", "a/b/c", "not a name"])
def test_a_missing_file_is_said_at_once(tokenizer: Any, name: str, monkeypatch: Any) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"There is no file|neither a file or folder here"):
        load(tokenizer, name)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            ConnectionError("Couldn't reach\nthe Hub."),
            r"owner/set is not a .* the hub, which is unreachable .*reach the Hub\.$",
        ),
        (ValueError("Unknown split 'validation'"), r"owner/set \(configuration small, split dev\) .* Unknown split"),
    ],
    ids=["unreachable", "split"],
)
def test_hub_names(tokenizer: Any, write: Any, monkeypatch: Any, raised: Exception, message: str) -> None:
    import datasets

    asked = []
    rows = datasets.Dataset.from_dict({"text": ["a"]})

    def fake(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if split == "dev":
            raise raised
        return rows

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(UserError, match=message):
        load(tokenizer, "owner/set", eval="owner/set", hub_config="small", eval_split="dev")
    assert asked == [("owner/set", "small", "train"), ("owner/set", "small", "dev")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"the tokenizer has no chat template"),
        (UNSTABLE, r"Row 1 of .* renders message 3 or those before it differently"),
        ("{{ raise_exception('roles must alternate') }}", r"Row 1 of .*refuses it: roles must alternate"),
    ],
    ids=["none", "unstable", "raises"],
)
def test_chat_templates_that_cannot_serve(
    tokenizer: Any, write: Any, monkeypatch: Any, template: str | None, message: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message):
        load(tokenizer, write([{"messages": TALK}]))


def test_defaults_suffice(tokenizer: Any, write: Any) -> None:
    config = replace(DataConfig(), train=write([{"text": f"film {i}"} for i in range(3)]))
    data = load_data(config, tokenizer, context=64, seed=0)
    assert (len(data.train), len(data.eval)) == (2, 1)
    assert "eval: 1 rows held out" in data.notes[1]

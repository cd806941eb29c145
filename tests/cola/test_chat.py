"""chat.py: what carries loss is what the assistant writes, whatever the template and the tokenizer."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
from typing import Any

import pytest

from cola_fast.errors import UserError

from .test_data import MARKED, _own_cache, load, only, spoken, tokenizer, write  # noqa: F401

TALK = [
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "hello"},
]
TURN = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}"
TURN += "{{ m['content'] }}</s>{% endif %}"


# --- {% generation %} marks -------------------------------------------------------------------------------------------


def by_words() -> Any:
    """A tokenizer that knows the words it was trained on, and takes unknown text for one token."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.normalizer = normalizers.NFKC()
    inner.train_from_iterator(["A", "how are you", "hello", " "], trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def by_transformers(tokenizer: Any) -> str:
    """What the library's own mask gives the assistant."""
    found = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return str(tokenizer.decode([token for token, mark in pairs if mark]))


def test_a_token_that_is_partly_the_users_is_not_learned(write: Any) -> None:
    tokenizer = by_words()
    tokenizer.chat_template = "{% for m in messages %}" + TURN.replace("</s>", "") + "{% endfor %}"
    assert by_transformers(tokenizer) == "<unk>"  # one token of all three turns
    example = only(load(tokenizer, write([{"messages": TALK}])))
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["A", "how are you", "hello"]
    assert spoken(tokenizer, example) == "A hello"


WRITTEN = {
    "plain": "{% for m in messages %}<|{{ m['role'] }}|>\n" + TURN + "\n{% endfor %}",
    "by a macro": "{% macro turn(m) %}<|{{ m['role'] }}|>\n" + TURN + "\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "captured": "{% for m in messages %}<|{{ m['role'] }}|>\n{% set said %}" + TURN + "{% endset %}{{ said }}\n"
    "{% endfor %}",
    "in a filter": "{% for m in messages %}<|{{ m['role'] }}|>\n{% filter trim %}   " + TURN + "{% endfilter %}\n"
    "{% endfor %}",
    "over several lines": "{%- for m in messages %}\n    {{- '<|' + m['role'] + '|>\n' }}\n"
    "    {%- if m['role'] == 'assistant' -%}\n        {%- generation -%}\n            {{ m['content'] + '</s>' }}\n"
    "        {%- endgeneration -%}\n    {%- else %}\n    {{- m['content'] + '</s>' }}\n    {%- endif %}\n"
    "    {{- '\n' }}\n{%- endfor %}",
    "trimmed blocks": "{% for m in messages %}\n<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}\n"
    "    {% generation %}\n{{ m['content'] + '</s>' -}}\n    {% endgeneration %}\n\n{% else %}\n"
    "{{ m['content'] }}</s>\n{% endif %}\n{% endfor %}",
}


@pytest.mark.parametrize("case", WRITTEN)
def test_the_assistants_part_is_found_however_the_template_writes_it(
    tokenizer: Any, write: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", WRITTEN[case])
    if case == "by a macro":
        assert "hello" not in by_transformers(tokenizer)
    example = only(load(tokenizer, write([{"messages": TALK}])))
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole.replace("</s>\n", "</s>") == "".join(f"<|{m['role']}|>\n{m['content']}</s>" for m in TALK)
    assert tokenizer.decode(example.input_ids) == whole
    assert spoken(tokenizer, example) == "A</s>hello</s>"


def test_a_special_token_that_takes_white_space_with_it(write: Any) -> None:
    """As Phi-3's do: the header's token reaches into an answer that begins with a blank."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["<|user|>", "<|assistant|>"]
    inner.add_special_tokens([AddedToken(name, rstrip=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>" + TURN.replace("</s>", "") + "{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}]}]
    example = only(load(tokenizer, write(rows)))
    user, assistant = tokenizer.convert_tokens_to_ids(names)
    assert not {user, assistant} & set(example.labels)
    assert tokenizer.convert_ids_to_tokens(example.input_ids)[-1] == "b"
    assert example.labels[-1] == example.input_ids[-1]


def test_a_border_that_is_lost_in_a_token_is_the_only_one_to_be_tokenised_apart(
    tokenizer: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}" + TURN.replace("</s>", "") + "{% endfor %}"
    )
    talk = [{"role": "user", "content": "it was "}, {"role": "assistant", "content": "great"}]
    more = [{"role": "user", "content": " it was"}, {"role": "assistant", "content": " warm"}]
    data = load(tokenizer, write([{"messages": talk + more}]))
    parts = ["it was ", "great", " it was", " warm"]
    assert only(data).input_ids == [
        token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]
    assert spoken(tokenizer, only(data)) == "great warm"
    assert "1 pieces tokenised apart" in data.notes[0]


def test_marks_that_decide_what_is_written_are_refused(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    template = "{% set said %}{% generation %}a{% endgeneration %}{% endset %}{{ said }}{{ said | length }}"
    template += "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=r"Row 1 of .* it writes another text where its \{% generation %\} marks"):
        load(tokenizer, write([{"messages": TALK}]))


def test_the_template_for_tools_is_the_one_whose_marks_count(tokenizer: Any, write: Any, monkeypatch: Any) -> None:
    """Of several templates of a tokenizer, transformers takes `tool_use` for rows with tools."""
    templates = {"default": WRITTEN["plain"], "tool_use": "{{ tools | tojson }}" + MARKED}
    monkeypatch.setattr(tokenizer, "chat_template", templates)
    rows = [{"messages": TALK, "tools": [{"name": "f"}]}, {"messages": TALK}]
    called, plain = load(tokenizer, write(rows)).train
    assert tokenizer.decode(called.input_ids).startswith('[{"name": "f"}]<s>')
    assert tokenizer.decode(plain.input_ids).startswith("<|assistant|>")
    assert spoken(tokenizer, called) == spoken(tokenizer, plain) == "A</s>hello</s>"

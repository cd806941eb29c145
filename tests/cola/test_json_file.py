"""json_file.py: a JSON file says what its lines say, and columns that nothing uses say nothing."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import json
from pathlib import Path
from typing import Any

import pytest

from cola_fast.data import json_file
from cola_fast.data.encode import IGNORE
from cola_fast.errors import UserError

from .test_data import WORDS, _own_cache, load, spoken, tokenizer, write  # noqa: F401


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("text", ["2024-01-10", "2024-01-10T10:00:00Z", "2024-01-10 10:00", "10:30:00", "null", "1e5"])
def test_text_that_looks_like_something_else_is_text(tokenizer: Any, write: Any, name: str, text: str) -> None:
    rows = [{"prompt": "when?", "completion": text}] * 2
    data = load(tokenizer, write(json.dumps(rows) if name.endswith("json") else rows, name))
    assert [spoken(tokenizer, example) for example in data.train] == [text + "</s>"] * 2


def test_numbers_are_those_of_the_file(tokenizer: Any, write: Any) -> None:
    """A column of one type would make 7.0 of 7 beside 7.5, and lose the last digits of 2**53 + 1."""
    cells = [7, 7.5, 2**53 + 1, 2**80, "7", -0.5]
    rows = [{"n": cell, "label": "x"} for cell in cells]
    data = load(tokenizer, write(rows), template="<{n}>", verbalisers=WORDS["verbalisers"])
    texts = [tokenizer.decode(example.input_ids[1 : example.prompt_length]) for example in data.train]
    assert texts == [f"<{cell}>" for cell in cells]


def test_labels_that_differ_by_one_are_two(tokenizer: Any, write: Any) -> None:
    first, second = 2**53, 2**53 + 1
    rows = [{"text": "a", "label": first}, {"text": "a", "label": second}]
    data = load(tokenizer, write(rows), verbalisers={str(first): " great", str(second): " long"})
    assert [example.answer for example in data.train] == [0, 1]


UNUSED: dict[str, list[Any]] = {
    "numbers, then text": [1, "a"],
    "structs of other keys": [{"a": 1}, {"b": [2]}, {"a": {"c": 3}}],
    "a struct, then a list": [{"a": 1}, [1]],
    "null, then a list": [None, [None]],
    "infinite": [float("inf"), float("nan")],
    "dates, then text": ["2024-01-10", "no date"],
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_column_that_nothing_uses_may_be_anything(tokenizer: Any, write: Any, case: str) -> None:
    """Wherever it changes: behind 10 MB, what `datasets` reads at a time, too."""
    first, *later = UNUSED[case]
    filler = {"text": "a", "x": first, "y": "z" * 1_000_000}
    path = write([filler] * 11 + [{"text": "film", "x": cell} for cell in later])
    data = load(tokenizer, path)
    assert len(data.train) == 11 + len(later)
    assert data.notes[-1] == "train: columns that nothing uses: x, y"


def test_only_the_cells_of_used_columns_are_kept(write: Any) -> None:
    path = Path(write([{"text": "a", "x": "y" * 100}, {"z": 1}]))
    assert json_file.read(path, {"text", "label"}, None) == ([{"text": "a"}, {}], ["text", "x", "z"])


def test_rows_behind_the_limit_are_not_read(tokenizer: Any, write: Any) -> None:
    path = write('{"text": "a"}\n' * 3 + '{"text": oops}\n')
    assert len(load(tokenizer, path, limit=3).train) == 3
    with pytest.raises(UserError, match=r"rows\.jsonl cannot be read as jsonl: line 4: Expecting value"):
        load(tokenizer, path)


LAYOUTS = {
    "lines": '{"text": "a"}\n{"text": "b"}\n',
    "blank lines": '\n \t\n{"text": "a"}\r\n\r\n{"text": "b"}',
    "a byte order mark": '\ufeff{"text": "a"}\n{"text": "b"}',
    "several on a line": '{"text": "a"} {"text": "b"}',
    "old line ends": '{"text": "a"}\r{"text": "b"}\r',
    "over several lines": '{"x": {"y": 1}\n, "text": "a"}\n{\n"text":\n"b"\n}\n',
    "a list": '[{"text": "a"}, {"text": "b"}]',
    "a list over several lines": ' \n[\n{"text": "a"},\n{"text": "b"}\n]\n',
    "pairs of surrogates": '{"text": "a", "x": "\\ud83d\\ude00"}\n{"text": "b"}',
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(write: Any, layout: str) -> None:
    rows, _ = json_file.read(Path(write(LAYOUTS[layout])), {"text"}, None)
    assert rows == [{"text": "a"}, {"text": "b"}]


BAD = {
    "half a pair": ('{"text": "a"}\n{"text": "b\\ud83d"}\n', r"Row 2 of .*rows\.jsonl has half of a surrogate pair"),
    "not closed": ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', r"as jsonl: line 3: Expecting ',' delimiter"),
    "a list with a hole": ('[{"text": "a"},\n{"text": "b"} {"text": "c"}]', r"as jsonl: line 2: Expecting ',' or '\]'"),
    "a list that ends in a comma": ('[{"text": "a"},\n]', r"as jsonl: line 2: Expecting value"),
    "two of a key below": (
        '{"text": "a"}\n{"text": "b", "x": {"y": 1, "y": 2}}',
        r"line 2: an object has .* 'y' twice",
    ),
    "Latin-1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"rows\.jsonl is not UTF-8 text \(line 2 or later"),
    "columns in lists": ('{"text": ["a", "b"]}', r"Row 1 of .*: text is \['a', 'b'\] \(list\), but must be text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_said_with_its_place(tokenizer: Any, tmp_path: Path, case: str) -> None:
    text, sentence = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence) as caught:
        load(tokenizer, str(path))
    assert str(caught.value).isprintable()


def test_half_a_pair_in_a_column_that_nothing_uses(tokenizer: Any, write: Any) -> None:
    data = load(tokenizer, write('{"text": "a", "x": "\\udc00"}\n'))
    assert any(label != IGNORE for label in data.train[0].labels)


def test_a_date_in_a_folder_says_what_to_do(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    """`datasets` reads a folder's files, and takes the text for a time."""
    (tmp_path / "folder").mkdir()
    path = write([{"text": "2024-01-10"}], "folder/train.jsonl")
    with pytest.raises(UserError, match=r"text is datetime.* must be text\. If it is text in .*give the file itself"):
        load(tokenizer, str(tmp_path / "folder"))
    assert len(load(tokenizer, path).train) == 1

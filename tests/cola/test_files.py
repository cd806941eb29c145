"""files.py: packed files, plain text, patterns, lists and folders give the rows that are in them."""

from __future__ import annotations

# ruff: noqa: F811  fixtures that are imported are named again by the tests that use them
import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cola_fast import cli, config
from cola_fast.errors import UserError

from .test_data import _own_cache, load, tokenizer, write  # noqa: F401

PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
CONTENT = {
    "jsonl": '{"prompt": "a", "completion": " film"}\n{"prompt": "b", "completion": "007"}\n',
    "ndjson": '{"prompt": "a", "completion": " film"}\n{"prompt": "b", "completion": "007"}\n',
    "json": '[{"prompt": "a", "completion": " film"}, {"prompt": "b", "completion": "007"}]',
    "csv": "prompt,completion\na, film\nb,007\n",
    "tsv": "prompt\tcompletion\na\t film\nb\t007\n",
    "txt": "a film\n\nb007\n",
}


def texts(tokenizer: Any, given: Any, **keys: Any) -> list[str]:
    """What the examples say."""
    return [tokenizer.decode(e.input_ids[1:-1]) for e in load(tokenizer, given, **keys).train]


@pytest.mark.parametrize("packing", ["", *PACK])
@pytest.mark.parametrize("kind", CONTENT)
def test_kinds_of_files_packed_and_not(tokenizer: Any, tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"rows.{kind}{'.' * bool(packing)}{packing}"
    content = CONTENT[kind].encode()
    path.write_bytes(PACK[packing](content) if packing else content)
    assert texts(tokenizer, str(path)) == ["a film", "b007"]


def test_zstd(tokenizer: Any, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    for kind in ("jsonl", "csv"):
        path = tmp_path / f"rows.{kind}.zst"
        path.write_bytes(zstandard.ZstdCompressor().compress(CONTENT[kind].encode()))
        assert texts(tokenizer, str(path)) == ["a film", "b007"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_zstd_without_its_package(tokenizer: Any, tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / f"rows.{kind}.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=rf"rows\.{kind}\.zst is packed by zstd, .*the extra zstd.*zstd -d rows"):
        load(tokenizer, str(path))


UNITS = {"paragraph": ["a\nb", "c  \nd"], "line": ["a", "b", "c  ", "d"], "file": ["a\nb\n\n \n\nc  \nd"]}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_units_of_a_text_file(tokenizer: Any, tmp_path: Path, unit: str, end: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\na\nb\n\n \n\nc  \nd\n\n".replace("\n", end).encode())
    assert texts(tokenizer, str(path), text_unit=unit) == UNITS[unit]


@pytest.mark.parametrize(
    ("cells", "read"),
    [('"film', '"film'), ('a "film', 'a "film'), ('"a ""film"""', 'a "film"'), ('"a\tb"', "a\tb"), ('"a\nb"', "a\nb")],
    ids=["opens", "inside", "quoted", "tab", "line break"],
)
def test_quotes_in_a_tsv_file(tokenizer: Any, write: Any, cells: str, read: str) -> None:
    """A quote that never closes is one, and swallows no rows; what is in quotes may hold tabs and line breaks."""
    path = write(f"text\tn\n{cells}\t1\nlast\t2\n", "a.tsv")
    assert texts(tokenizer, path, format="text") == [read, "last"]


def test_a_unit_without_a_text_file(tokenizer: Any, write: Any) -> None:
    rows, text = write([{"text": "a"}]), write("b\nc", "b.txt")
    with pytest.raises(UserError, match=r"data\.text_unit is line, but \S*rows\.jsonl is no \.txt file"):
        load(tokenizer, rows, text_unit="line")
    assert texts(tokenizer, (rows, text), text_unit="line") == ["a", "b", "c"]
    assert len(load(tokenizer, rows, eval=text, text_unit="line").eval) == 2


def test_patterns_and_lists(tokenizer: Any, write: Any, tmp_path: Path) -> None:
    first, second = (write([{"text": name}], f"{name}.jsonl") for name in ("b1", "b0"))
    (tmp_path / "deep").mkdir()
    third = write("text\ndeep\n", "deep/c.csv")
    assert texts(tokenizer, str(tmp_path / "b*.jsonl")) == ["b0", "b1"]
    assert texts(tokenizer, str(tmp_path / "b[1].jsonl")) == ["b1"]
    assert texts(tokenizer, str(tmp_path / "**" / "*.[jc]*")) == ["b0", "b1", "deep"]
    assert texts(tokenizer, (first, third, second)) == ["b1", "deep", "b0"]
    assert texts(tokenizer, (first, third, second), limit=2) == ["b1", "deep"]
    data = load(tokenizer, (first, second), eval=(first,), test=str(tmp_path / "b*"))
    assert (len(data.train), len(data.eval), len(data.test)) == (2, 1, 2)
    assert data.notes[0].startswith(f"train: 2 rows of {first}, {second}")


def test_an_error_names_the_file_of_the_row(tokenizer: Any, write: Any) -> None:
    good = write([{"text": "a"}, {"text": "b"}], "good.jsonl")
    bad = write([{"text": "c"}, {"text": 7}], "bad.jsonl")
    with pytest.raises(UserError, match=r"^Row 2 of \S*bad\.jsonl: text is 7"):
        load(tokenizer, (good, bad))
    long = write([{"text": "a"}, {"text": "film " * 90}], "long.jsonl")
    with pytest.raises(UserError, match=r"^Row 2 of \S*long\.jsonl has \d+ tokens"):
        load(tokenizer, (good, long), max_length=20, too_long="error")
    odd = write([{"messages": [{"role": "assistant", "content": "a"}]}], "odd.jsonl")
    talk = write([{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}] * 3, "talk.jsonl")
    with pytest.raises(UserError, match=r"^Row 1 of \S*odd\.jsonl: the chat template"):
        load(tokenizer, (talk, odd))


def test_parquet_files_are_joined_if_they_are_alike(tokenizer: Any, tmp_path: Path, write: Any) -> None:
    import datasets

    paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c.parquet")]
    for path, row in zip(paths, [{"text": "a"}, {"text": "b"}, {"text": 7}], strict=True):
        datasets.Dataset.from_list([row]).to_parquet(path)
    assert texts(tokenizer, tuple(paths[:2])) == ["a", "b"]
    with pytest.raises(UserError, match=r"c\.parquet has the columns text, but .*a\.parquet text, or of other types"):
        load(tokenizer, tuple(paths))
    with pytest.raises(UserError, match=r"a\.parquet cannot be joined with JSON"):
        load(tokenizer, (paths[0], write([{"text": "a"}])))


@pytest.mark.parametrize("several", [False, True], ids=["one", "splits"])
def test_a_folder_of_save_to_disk(tokenizer: Any, tmp_path: Path, several: bool) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    folder = str(tmp_path / "saved")
    (datasets.DatasetDict(train=data) if several else data).save_to_disk(folder)
    assert texts(tokenizer, folder) == ["a", "b"]
    if several:
        with pytest.raises(UserError, match=r"saved has no split validation \(it has train\)"):
            load(tokenizer, folder, eval=folder)


def test_a_damaged_folder_of_save_to_disk(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"saved cannot be read as a data set that was saved by save_to_disk"):
        load(tokenizer, str(tmp_path / "saved"))


def test_folders(tokenizer: Any, tmp_path: Path) -> None:
    """Of text, packed or mixed files. What is another kind of file is left alone, and so is another split."""
    for name, files in {
        "plain": {"a.txt": "a\n\nb", "b.txt": "c", "notes.md": "no"},
        "packed": {"a.jsonl": '{"text": "a"}\n{"text": "b"}\n', "b.jsonl.gz": '{"text": "c"}\n', "LICENSE.txt": "no"},
        "splits": {"train.txt": "a\n\nb\n\nc", "test.txt": "no"},
        "as ever": {"a.jsonl": '{"text": "a"}\n{"text": "b"}\n', "b.jsonl": '{"text": "c"}\n', "LICENSE.txt": "no"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            content = text.encode()
            (tmp_path / name / file).write_bytes(gzip.compress(content) if file.endswith("gz") else content)
        assert texts(tokenizer, str(tmp_path / name)) == ["a", "b", "c"], name
    with pytest.raises(UserError, match=r"splits has no files of the split validation \(it has train, test\)"):
        load(tokenizer, str(tmp_path / "splits"), eval=str(tmp_path / "splits"))


BAD: dict[str, tuple[str, bytes, str]] = {
    "not packed": ("a.jsonl.gz", b"hello", r"a\.jsonl\.gz cannot be unpacked: "),
    "cut off": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9], r"a\.jsonl\.gz cannot be unpacked: "),
    "not packed by xz": ("a.txt.xz", b"hello", r"a\.txt\.xz cannot be unpacked: "),
    "a csv that is not packed": ("a.csv.gz", b"hello", r"a\.csv\.gz cannot be read as csv: "),
    "a line": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": oops}\n'), r"a\.jsonl\.gz .*line 2: Expecting"),
    "ndjson": ("a.ndjson", b'{"text": "a"}\n7\n', r"a\.ndjson cannot be read as ndjson: line 2 is 7"),
    "latin": ("a.txt", "a\nb\nné".encode("latin-1"), r"a\.txt is not UTF-8 text \(line 3: "),
    "blank": ("a.txt", b"\n \n\n", r"a\.txt holds no rows"),
    "nothing": ("a.txt.gz", gzip.compress(b""), r"a\.txt\.gz holds no rows"),
    "packed, but what": ("a.gz", gzip.compress(b"a"), r"a\.gz is a \.gz file, but data is read from \.jsonl"),
    "tsv": ("a.tsv", b"text\tn\na\t1\nb\t2\t3\n", r"a\.tsv cannot be read as tsv: .*line 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence(tokenizer: Any, tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tokenizer, str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_pattern_that_nothing_matches(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^No file matches \S*/\*\.txt: check the pattern"):
        load(tokenizer, str(tmp_path / "*.txt"))


@pytest.mark.parametrize("given", ["[]", "['']", "[a.jsonl, '']"])
def test_a_list_of_nothing(given: str, raw_config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.train is (missing|\(.*, but a list names at least one file)"):
        config.from_dict(raw_config, [f"data.train={given}"])


def test_a_list_is_trained_on_and_gone_on_with(tiny_folder: Path, tmp_path: Path, raw_config: dict[str, Any]) -> None:
    """By `cola train`; the second call finds the run and resumes it."""
    (tmp_path / "a.txt").write_text("w1 w2 w3\n\nw4 w5\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "it was good"}).encode()))
    raw_config["data"] = {"train": [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl.gz")], "eval_share": 0.0}
    raw_config["schedule"] = {"links": 1, "steps": 2, "lr": 0.01}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    assert cli.main(["train", str(file)]) == 0
    assert cli.main(["train", str(file)]) == 0
    assert cli.main(["train", str(file), "data.train=[nowhere.jsonl]"]) == 2

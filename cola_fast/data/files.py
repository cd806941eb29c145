"""Which files a source of data names, what kind each is, and files that are packed or plain text."""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, listed, told

BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".ndjson": "json", ".tsv": "csv",
    ".txt": "text",
}  # fmt: skip
PACKED = (".gz", ".xz", ".bz2", ".zst")
AS_EVER = (".jsonl", ".json", ".csv", ".parquet")  # what `datasets` reads of a folder just as we do


@dataclass(frozen=True)
class Source:
    """Where rows come from: its name, and each file with the number of its rows."""

    name: str
    files: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.name

    def row(self, number: int) -> str:
        """`Row 3 of a.jsonl`, of the row that is the number-th of all."""
        for file, count in self.files:
            if number <= count:
                return f"Row {number} of {file}"
            number -= count
        return f"Row {number} of {self.name}"

    @property
    def has_text(self) -> bool:
        """Whether a file of it is plain text."""
        return any(kind(file) == "text" for file, _ in (*self.files, (self.name, 0)))


def suffix(path: str | Path) -> str:
    """Without that of packing: .jsonl of a.jsonl.gz."""
    path = Path(str(path).lower())
    return path.with_suffix("").suffix if path.suffix in PACKED else path.suffix


def kind(path: str | Path) -> str | None:
    """json, csv, parquet or text; None of another file."""
    return BUILDERS.get(suffix(path))


def expand(source: str, split: str) -> list[str]:
    """The files that a pattern or a folder names; what is a file, or for `datasets` to find, is itself."""
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        return _of_folder(source, split)
    if glob.has_magic(source):
        found = sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
        if not found:
            raise UserError(f"No file matches {source}: check the pattern (relative paths start from {Path.cwd()}).")
        return found
    return [source]


def saved_to_disk(folder: str) -> bool:
    """Whether `save_to_disk` of datasets wrote it."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _of_folder(folder: str, split: str) -> list[str]:
    """Its files of the kind that most are of, unless `datasets` reads them as we do. It also decides, by names such as
    test.txt, which are of the split."""
    names = [str(path) for path in Path(folder).rglob("*") if path.is_file() and kind(path)]
    if not names or saved_to_disk(folder):
        return [folder]
    ((most, _),) = Counter(map(kind, names)).most_common(1)
    if all(Path(name).suffix.lower() in AS_EVER for name in names if kind(name) == most):
        return [folder]
    from datasets import data_files

    with told(f"The files of {folder} cannot be told apart"):
        patterns = data_files.get_data_patterns(os.path.abspath(folder))
        if split not in patterns:
            raise UserError(f"{folder} has no files of the split {split} (it has {listed(patterns)}).")
        found = data_files.DataFilesDict.from_patterns({split: patterns[split]}, os.path.abspath(folder))[split]
    return sorted(os.path.join(folder, os.path.relpath(file, folder)) for file in found if kind(file) == most)


# --- packed files -----------------------------------------------------------------------------------------------------


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The file, or a passing copy of what is packed in it. Errors name the file that is there."""
    if path.suffix.lower() not in PACKED:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.stem)
        with told(f"{path} cannot be unpacked"), _opened(path) as packed, copy.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from None


def require_unpacker(path: Path) -> None:
    if path.suffix.lower() == ".zst":
        _zstandard(path)


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path} is packed by zstd, which needs the package zstandard: install it (the extra zstd), or "
            f"unpack the file (zstd -d {path.name})."
        ) from None
    return zstandard


def _opened(path: Path) -> BinaryIO:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix.lower())
    opened: BinaryIO = (opener or _zstandard(path).open)(path, "rb")
    return opened


# --- plain text -------------------------------------------------------------------------------------------------------


def texts(path: Path, unit: str) -> list[dict[str, str]]:
    """The rows of a text file: its paragraphs (parted by blank lines), its lines, or the whole."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise UserError(f"{path} is not UTF-8 text (line {line}: {error.reason}): convert it.") from None
    border = {"paragraph": r"\n(?:[ \t]*\n)+", "line": r"\n", "file": r"\Z"}[unit]
    return [{"text": row.strip("\n")} for row in re.split(border, text) if row.strip()]

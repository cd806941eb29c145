"""Files that are either whole or absent: atomic writes, hashes, locks. Knows nothing of chains.

Every write goes to a temporary name in the same folder, is fsynced, and is renamed over its target; the folder is
fsynced after it. A process killed at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import UserError


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Create the folder `path` with these files, atomically; one left there by an interrupted run is replaced."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                _write_synced(temporary / name, data)
            _sync_folder(temporary)
            if path.exists():
                stale = path.with_name(f".{path.name}.old")
                shutil.rmtree(stale, ignore_errors=True)
                os.rename(path, stale)
            os.rename(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(path.with_name(f".{path.name}.old"), ignore_errors=True)


def make_folder(path: Path) -> None:
    """With those above it, if it is not there."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy.") from None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_checked(path: Path, digest: str) -> bytes:
    """The bytes of `path`, refused unless they hash to `digest`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it from a copy, the chain cannot be rebuilt without it.") from None
    if sha256(data) != digest:
        raise UserError(
            f"{path} is not the file this chain sealed (its sha256 differs): it was truncated or edited, "
            "restore it from a copy."
        )
    return data


def save_tensors(path: Path, value: Any) -> None:
    """A tree of tensors and plain values. Read back with `load_tensors`, which never unpickles code."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_file(path, buffer.getvalue())


def load_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. The operating system lets go of it if the process dies."""
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another process is training in {folder}: wait for it or stop it, or set `out` to another folder."
        ) from None
    try:
        yield
    finally:
        held.release()


def sweep(folder: Path) -> None:
    """Remove what an interrupted write left behind. Only for the process that holds the folder's lock."""
    for path in list(folder.rglob(".*.old")):  # before any is moved
        replaced = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        _remove(path) if replaced.exists() else path.rename(replaced)
    for path in list(folder.rglob(".*.tmp")):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses, as one sentence: no space, no permission."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}): free some space or fix its permissions and run "
            "the same command again; what was there before is untouched."
        ) from error

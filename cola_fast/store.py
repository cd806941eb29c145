"""Files that are either whole or absent: atomic writes, checksums, locks. Knows nothing of chains.

Every write goes to a temporary name in the same folder, is fsynced, and is renamed over its target; the folder is
fsynced after it. A process killed at any moment leaves the old file or the new one.

Whatever decides a result is checked when it is read. A JSON record carries the sha256 of its own content
(`write_sealed`), a file of tensors has it in its name (`save_tensors`), other files have theirs in such a record
(`read_checked`).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .errors import UserError, note, shown

SEAL = "sha256"  # the key of a record's own checksum
MARK = 16  # hex digits of a checksum in a file's name


# --- writing ----------------------------------------------------------------------------------------------------------


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically and durably."""
    with disk_errors(path):
        temporary = _temporary(path)
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Create the folder `path` with these files, atomically. Nobody may rely on one that is there already: an
    interrupted run has left it, and it is removed."""
    with disk_errors(path):
        temporary = _temporary(path)
        try:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                _write_synced(temporary / name, data)
            _sync_folder(temporary)
            remove(path)
            os.rename(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A private folder to be filled, which becomes `path` when the block ends, whole; after an error nothing is left.

    Raises UserError if there is something at `path` already, or has come there meanwhile: of several processes that
    write to one place the first is kept, and nothing is mixed.
    """
    refuse_existing(path)
    path = Path(os.path.realpath(path))  # an empty folder on another disk, behind a link
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_parts(path)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with _held(part):
            part.chmod(0o777 & ~_umask())  # mkdtemp's is closed to others
            yield part
            with disk_errors(path):
                for file in (p for p in part.rglob("*") if p.is_file()):
                    _sync_file(file)
                _sync_folder(part)
                _rename_new(part, path)
                _sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raises UserError where a new folder cannot be: at a file, at a folder that is not empty, or where one is."""
    with reading(path):
        if Path(os.path.realpath(path)) == Path.cwd():  # a folder is written as a whole, in place of an empty one
            raise UserError(f"{path} is the folder you are in: name one to be made in it.")
        if path.is_dir():
            if any(path.iterdir()):
                raise UserError(f"{path} already exists: choose another folder or remove it.")
        elif path.exists():
            raise UserError(f"{path} already exists and is no folder: choose another or remove it.")


def make_folder(path: Path) -> None:
    """With those above it, if it is not there."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link, but not what it leads to. Nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    """A JSON object with the checksum of its content."""
    write_file(path, to_json({**record, SEAL: content_hash(record)}))


def save_tensors(folder: Path, number: int, value: Any) -> Path:
    """A tree of tensors and plain values, as `folder/<number>-<sha256>.pt`. `load_tensors` reads it back."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = buffer.getvalue()
    path = folder / f"{number:08d}-{sha256(data)[:MARK]}.pt"
    write_file(path, data)
    return path


# --- paths and reading ------------------------------------------------------------------------------------------------


def given_path(path: str | os.PathLike[str]) -> Path:
    """A path that somebody has given, `~` as a shell reads it. Raises UserError for one that no file can have."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{shown(path)} is no path: give a folder or file as text or as a pathlib.Path.")
    found = Path(os.path.expanduser(path))
    with reading(found), suppress(FileNotFoundError, NotADirectoryError):
        found.lstat()
    if str(path).startswith("~") and str(found).startswith("~"):
        raise UserError(f"{path} names the home of a user that is not here: write the whole path.")
    return found


def read_file(path: Path) -> bytes:
    with reading(path):
        if path.exists() and not path.is_file():  # a device has no end, and a pipe waits
            raise UserError(f"{path} is no file: restore it from a copy.")
        return path.read_bytes()


def read_json(path: Path) -> Any:
    data = read_file(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise UserError(f"{path} is damaged ({error}): restore it from a copy.") from None


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """What `write_sealed` wrote, and whether it carries a checksum: earlier versions wrote none.

    Raises UserError if it is no JSON object, or if its content is not what was written.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object): restore it from a copy.")
    seal = record.pop(SEAL) if isinstance(record.get(SEAL), str) else None
    if seal is not None and seal != content_hash(record):
        raise UserError(
            f"{path} is not what was written (its checksum differs): it was damaged or edited, restore it from a copy."
        )
    return record, seal is not None


def content_hash(record: Any) -> str:
    """sha256 of a JSON value, however it is laid out."""
    return sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_checked(path: Path, digest: str) -> bytes:
    """The bytes of `path`, refused unless they hash to `digest`."""
    data = read_file(path)
    if sha256(data) != digest:
        raise UserError(
            f"{path} is not the file this chain sealed (its sha256 differs): it was truncated or edited, "
            "restore it from a copy."
        )
    return data


def load_tensors(path: Path) -> Any:
    """What `save_tensors` wrote, on the CPU; never unpickles code. A name without a checksum is one of an earlier
    version. Raises UserError if the file is damaged."""
    data = read_file(path)
    _, _, mark = path.stem.partition("-")
    if mark and mark != sha256(data)[:MARK]:
        raise UserError(f"{path} is damaged (its checksum differs).")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged zip or pickle raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}).") from None


# --- locks and leftovers ----------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. The operating system lets go of it if the process dies."""
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another process is training in {folder}: wait for it or stop it, or set `out` to another folder."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            with disk_errors(folder / ".lock"):
                raise
        note(f"The file system of {folder} knows no locks: take care that no other process trains there.")
    try:
        yield
    finally:
        held.release()


def sweep(folder: Path) -> None:
    """Remove what an interrupted write left behind. Only for the process that holds the folder's lock."""
    with disk_errors(folder):
        for path in list(folder.rglob(".*.tmp")):
            remove(path)


def _rename_new(part: Path, path: Path) -> None:
    try:
        os.rename(part, path)  # over an empty folder, but not over a full one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UserError(
            f"{path} has been written by another process meanwhile, and is left as it is: choose another folder."
        ) from None


def _sweep_parts(path: Path) -> None:
    """Remove what killed processes have left of a `new_folder` at this path; living ones hold theirs."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with _held(part) as ours:
            if ours:
                shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder until the block, or this process, ends. False if another process holds it, if the file system knows
    no locks, and on Windows."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except OSError:
            ours = False
        yield ours
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses, as one sentence: no space, no permission, a name too long."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} could not be written ({_reason(error)}): free some space or fix its permissions and run "
            "the same command again; what was there before is untouched."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """The same for what is read."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it from a copy.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} could not be read ({_reason(error)}): fix its permissions, or restore it.") from None


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)

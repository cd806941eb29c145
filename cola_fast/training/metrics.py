"""RUN/metrics.jsonl: one row a log step, an evaluation or a knot. The plot and the summary are drawn from it.

A log decides nothing, so nothing in it stops a run: what cannot be read is left out, what cannot be written is said
once.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .. import store
from ..errors import UserError, note

FILE = "metrics.jsonl"
EVENTS = ("train", "eval", "knot")


class Logger(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Rows behind the step a run resumes from are dropped first, so a resumed run has each step once.

    resume_step: -1 for a run that begins, whatever a killed one has left.
    """

    def __init__(self, run: Path, *, resume_step: int, link: int) -> None:
        self.path, self.failed = run / FILE, False
        kept = [r for r in read(run) if r["step"] <= resume_step and (r["event"] != "knot" or r["link"] < link)]
        with self._told_once():
            if self.path.exists():
                store.write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def log(self, row: dict[str, Any]) -> None:
        with self._told_once(), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        pass

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            if not self.failed:
                reason = getattr(error, "strerror", None) or error
                note(f"{self.path} could not be written ({reason}): the run goes on, but rows of its log are missing.")
            self.failed = True


class TensorBoard:
    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(f"{row['event']}/{key}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


class Trackio:
    def __init__(self, run: Path) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project="cola_fast", name=run.name)

    def log(self, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
        self.trackio.log({f"{row['event']}/{k}": v for k, v in numbers.items()}, step=row["step"])

    def close(self) -> None:
        self.trackio.finish()


LOGGERS: dict[str, Callable[[Path], Logger]] = {"tensorboard": TensorBoard, "trackio": Trackio}


def require(names: Iterable[str]) -> None:
    """Refuse a logger that is not installed, before anything is written."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"The logger {name} is not installed: pip install 'cola_fast[loggers]'.")


def read(run: Path) -> list[dict[str, Any]]:
    """All rows. A line that a crash has cut short is left out, and one that is no row of ours."""
    try:
        data = store.read_file(run / FILE)
    except UserError:
        return []
    rows = []
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_row(row):
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether it has an event, and a number wherever the plot and a resumed run look for one."""
    if not isinstance(row, dict) or row.get("event") not in EVENTS:
        return False
    counts = ("step", "link")
    numbers = [row.get(key) for key in ("loss", "accuracy", "lr") if row.get(key) is not None]
    numbers += [row.get("loss")] if row["event"] != "knot" else []
    return all(type(row.get(key)) is int for key in counts) and all(type(n) in (int, float) for n in numbers)

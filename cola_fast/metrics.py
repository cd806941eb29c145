"""RUN/metrics.jsonl: one row a log step, an evaluation or a knot. The plot and the summary are drawn from it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from . import store
from .errors import UserError

FILE = "metrics.jsonl"


class Logger(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Rows behind the step a run resumes from are dropped first, so a resumed run has each step once.

    resume_step: -1 for a run that begins, whatever a killed one has left.
    """

    def __init__(self, run: Path, *, resume_step: int, link: int) -> None:
        self.path = run / FILE
        if self.path.exists():
            kept = [
                row
                for row in read(run)
                if row["step"] <= resume_step and (row["event"] != "knot" or row["link"] < link)
            ]
            store.write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def log(self, row: dict[str, Any]) -> None:
        with store.disk_errors(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        with suppress(OSError):  # a row that did not fit is still in the buffer, and has been reported
            self.file.close()


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
    """All rows; a last line cut short by a crash is left out."""
    rows = []
    for line in (run / FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows

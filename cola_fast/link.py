"""A link: one low-rank update for a set of modules. Open while it is trained, sealed (immutable, hashed) ever after."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_kernels import FoldReport

from . import peft_format, store
from .errors import UserError
from .peft_format import Factors


@dataclass
class SealedLink:
    """Its factors are in `folder`, or in memory while the chain has not been saved anywhere."""

    index: int
    ranks: dict[str, int]
    files: dict[str, str]  # file name -> sha256
    contents: dict[str, bytes] | None  # the files themselves, while there is no folder
    folder: Path | None = None
    fold: dict[str, Any] = field(default_factory=dict)  # what folding it kept, see `summarise`; empty until then

    @classmethod
    def seal(cls, index: int, factors: Mapping[str, Factors], **peft: Any) -> SealedLink:
        """Refuses a link that is not finite: it would poison the base for good."""
        for name, f in factors.items():
            if not (torch.isfinite(f.a).all() and torch.isfinite(f.b).all()):
                raise UserError(
                    f"The open link ({folder_name(index)}) holds NaN or infinite values in {name} and was not tied: "
                    "go back to the last good state, and lower the learning rate."
                )
        contents = peft_format.encode(factors, **peft)
        ranks = {name: f.rank for name, f in factors.items()}
        return cls(index, ranks, {name: store.sha256(data) for name, data in contents.items()}, contents)

    @property
    def sha256(self) -> str:
        return self.files[peft_format.TENSOR_FILE]

    def write(self, folder: Path) -> None:
        """Durably, before anyone relies on the link. From then on it is read from there."""
        contents = self._read()
        store.write_folder(folder, contents)
        self.folder, self.contents = folder, None

    def detach(self) -> None:
        """Hold the files, checked, in memory: what happens to the folder no longer matters."""
        self.contents, self.folder = self._read(), None

    def factors(self) -> dict[str, Factors]:
        """Module -> factors on the CPU, checked against the hashes. Raises UserError for a damaged file."""
        return peft_format.decode(self._read())

    def record(self) -> dict[str, Any]:
        """Its entry in chain.json."""
        return {
            "index": self.index,
            "folder": folder_name(self.index),
            "ranks": self.ranks,
            "sha256": self.files,
            "fold": self.fold,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], run: Path) -> SealedLink:
        folder = run / record["folder"]
        return cls(record["index"], dict(record["ranks"]), dict(record["sha256"]), None, folder, dict(record["fold"]))

    def _read(self) -> dict[str, bytes]:
        if self.contents is not None:
            return self.contents
        assert self.folder is not None
        return {name: store.read_checked(self.folder / name, digest) for name, digest in self.files.items()}


def summarise(reports: Mapping[str, FoldReport]) -> dict[str, Any]:
    """Means over the modules, and the module that kept least."""
    worst = min(reports, key=lambda name: reports[name].retained)
    return {
        "retained": sum(r.retained for r in reports.values()) / len(reports),
        "error": sum(r.error for r in reports.values()) / len(reports),
        "least_retained": [worst, reports[worst].retained],
    }


def folder_name(index: int) -> str:
    return f"links/{index:03d}"


def initial_factors(shape: tuple[int, int], rank: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """COLA's and LoRA's start: A Kaiming-uniform as PEFT draws it, B = 0, so the model's function is unchanged.

    Drawn on the CPU from its own generator: the same on every device, and independent of what else used the global one.
    """
    n, k = shape
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(1 / k)  # kaiming_uniform_(a=sqrt(5)): gain sqrt(1/3) times sqrt(3 / fan_in)
    a = torch.empty(rank, k, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(n, rank, dtype=dtype)


def derive_seed(seed: int, *parts: str | int) -> int:
    """An independent 63-bit seed for each use: link 2 of q_proj in layer 5 always gets the same."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

"""A link: one low-rank update for a set of modules. Open while it is trained, sealed (immutable, hashed) ever after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cola_kernels import FoldReport

from .. import store
from ..errors import UserError
from ..layers.factors import Factors
from . import peft_format
from .chain_json import CHAIN_FILE, folder_name


@dataclass(repr=False)
class SealedLink:
    """Its factors are in `folder`, or in memory while the chain has not been saved anywhere."""

    index: int
    ranks: dict[str, int]
    files: dict[str, str]  # file name -> sha256
    contents: dict[str, bytes] | None  # the files themselves, while there is no folder
    difference: bool = False  # its second half takes out what it started from, see `open_link`
    folder: Path | None = None
    fold: dict[str, Any] = field(default_factory=dict)  # what folding it kept, see `summarise`; empty until then

    @classmethod
    def seal(cls, index: int, factors: Mapping[str, Factors], *, difference: bool = False, **peft: Any) -> SealedLink:
        """Refuses a link that is not finite: it would poison the base for good."""
        for name, f in factors.items():
            if not all(bool(part.isfinite().all()) for part in (f.a, f.b, f.magnitude) if part is not None):
                raise UserError(
                    f"The open link ({folder_name(index)}) holds NaN or infinite values in {name} and was not tied: "
                    "go back to the last good state, and lower the learning rate."
                )
        for name, tensor in peft.get("also", peft_format.Also()).tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{name}, which is trained beside the links, holds NaN or infinite values, so that link {index} "
                    "was not tied: go back to the last good state, and lower the learning rate."
                )
        contents = peft_format.encode(factors, **peft)
        ranks = {name: f.rank for name, f in factors.items()}
        return cls(index, ranks, {name: store.sha256(data) for name, data in contents.items()}, contents, difference)

    def __repr__(self) -> str:
        kept = f", kept {self.fold['retained']:.4f} in the fold" if self.fold else ""
        place = self.folder or "memory"
        modules = f"{len(self.ranks)} modules, rank {spread(self.ranks)}"
        return f"SealedLink({self.index}: {modules}, sha256 {self.sha256[:12]}{kept}, in {place})"

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
        """Module -> factors on the CPU, checked against the hashes. Raises UserError for a damaged file, and for one
        that holds other modules or ranks than the record says."""
        factors = peft_format.decode(self._read())
        if {name: f.rank for name, f in factors.items()} != self.ranks:
            raise UserError(
                f"{self.folder or folder_name(self.index)} and {CHAIN_FILE} do not agree on the modules and ranks of "
                f"link {self.index}: restore both from one copy."
            )
        return factors

    def also(self) -> dict[str, Tensor]:
        """What was trained beside the links, as it was at this one's end; see `chain.beside`."""
        return peft_format.decode_also(self._read())

    def require_fitting(self, modules: Mapping[str, Sequence[int]]) -> None:
        """Raises UserError unless its files are whole and fit weights of these shapes, module -> (N, K)."""
        for name, f in self.factors().items():
            shape = [f.b.shape[0], f.a.shape[1]]
            if shape != list(modules[name]):
                raise UserError(
                    f"{self.folder or folder_name(self.index)} holds factors of {shape} for {name}, which has "
                    f"{list(modules[name])}: restore it from a copy."
                )

    def steps(self) -> dict[str, tuple[Factors | None, Factors]]:
        """Module -> what to fold before the link is trained (taking its start out, if it has one), and after."""
        parts = {name: (f.halves() if self.difference else (f, None)) for name, f in self.factors().items()}
        return {name: (taken, trained) for name, (trained, taken) in parts.items()}

    def record(self) -> dict[str, Any]:
        """Its entry in chain.json."""
        return {
            "index": self.index,
            "folder": folder_name(self.index),
            "ranks": self.ranks,
            "sha256": self.files,
            "difference": self.difference,
            "fold": self.fold,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], run: Path) -> SealedLink:
        folder, files = run / record["folder"], dict(record["sha256"])
        difference, fold = bool(record.get("difference")), dict(record["fold"])
        return cls(record["index"], dict(record["ranks"]), files, None, difference, folder, fold)

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


def spread(ranks: Mapping[str, int]) -> str:
    """`8`, or `1-8` where modules differ."""
    return "-".join(map(str, sorted({min(ranks.values()), max(ranks.values())}))) if ranks else "none"

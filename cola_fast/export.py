"""Leaving the library: one PEFT adapter, or a merged checkpoint. Neither needs cola_fast to be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cola_kernels import merge_

from . import peft_format, store
from .adapters import cut_to_rank, error_table, vllm_notes
from .errors import UserError
from .peft_format import Factors

if TYPE_CHECKING:
    from .chain import Chain


@dataclass(frozen=True)
class ExportedAdapter:
    """Where an adapter was written, and what was lost. Stands for its path; `print` shows the rest."""

    path: Path
    rank: int  # the largest of its modules'
    errors: dict[str, float]  # module -> relative error of the update (Frobenius); 0 where it is exact
    notes: list[str]  # for those who want to serve it

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        exact = not any(self.errors.values())
        loss = ["exact"] if exact else ["relative error of the update, by kind of module:", *error_table(self.errors)]
        return "\n".join([f"{self.path}: rank {self.rank}, {loss[0]}", *loss[1:], *self.notes])


def export_adapter(chain: Chain, folder: Path, rank: int | None = None) -> ExportedAdapter:
    """`[s1·B1 | s2·B2 | ...]` and `[A1; A2; ...]`: exact, of the summed rank, with scale 1; cut to `rank` by SVD."""
    _refuse_existing(folder)
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}, but an adapter's rank is at least 1.")
    links = [link.factors() for link in chain.links]
    if chain.open_link is not None:
        links.append(chain.open_factors())
    factors = {name: concatenate([link[name] for link in links]) for name in chain.layers}
    errors = dict.fromkeys(factors, 0.0)
    if rank is not None:
        for name, f in factors.items():
            factors[name], errors[name] = cut_to_rank(f, rank)
    store.write_folder(folder, peft_format.encode(factors, **chain.peft_fields()))
    return ExportedAdapter(folder, max(f.rank for f in factors.values()), errors, vllm_notes(factors))


def concatenate(factors: list[Factors]) -> Factors:
    """One update equal to the sum of several."""
    a = torch.cat([f.a for f in factors])
    b = torch.cat([f.b * f.scale for f in factors], dim=1)
    return Factors(a, b, alpha=float(a.shape[0]))


def export_merged(chain: Chain, folder: Path, tokenizer: Any = None) -> Path:
    """Only the modules of a still open link are copied, to have it folded into the copy; the model is not touched."""
    _refuse_existing(folder)
    state = {k: v for k, v in chain.model.state_dict().items() if not k.endswith((".lora_A", ".lora_B"))}
    for name, f in chain.open_factors().items():
        weight = state[f"{name}.weight"].cpu().clone()
        merge_(weight, f.a, f.b, f.scale, rounding=chain.base.rounding)
        state[f"{name}.weight"] = weight
    _save_atomically(chain, folder, state, tokenizer)
    return folder


def _save_atomically(chain: Chain, folder: Path, state: Mapping[str, Any], tokenizer: Any) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model: Any = chain.model
        model.save_pretrained(temporary, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written ({error}): free some space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists: choose another folder or remove it.")

"""Leaving the library: one PEFT adapter, or a merged checkpoint. Neither needs cola_fast to be loaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cola_kernels import merge_

from . import peft_format, store
from .errors import UserError
from .peft_format import Factors

if TYPE_CHECKING:
    from .chain import Chain


def export_adapter(chain: Chain, folder: Path) -> Path:
    """`[s1·B1 | s2·B2 | ...]` and `[A1; A2; ...]`: exact, of the summed rank, with scale 1."""
    _refuse_existing(folder)
    links = [link.factors() for link in chain.links]
    if chain.open_link is not None:
        links.append(chain.open_factors())
    named = {name: [link[name] for link in links if name in link] for name in chain.layers}
    factors = {name: concatenate(parts) for name, parts in named.items() if parts}
    store.write_folder(folder, peft_format.encode(factors, **chain.peft_fields(factors)))
    return folder


def concatenate(factors: list[Factors]) -> Factors:
    """One update equal to the sum of several."""
    a = torch.cat([f.a for f in factors])
    b = torch.cat([f.b * f.scale for f in factors], dim=1)
    return Factors(a, b, alpha=float(a.shape[0]))


def export_merged(chain: Chain, folder: Path, tokenizer: Any = None) -> Path:
    """Only the modules of a still open link are copied, to have it folded into the copy; the model is not touched."""
    _refuse_existing(folder)
    state = {k: v for k, v in chain.model.state_dict().items() if not k.endswith((".lora_A", ".lora_B"))}
    for name, f in chain.live_factors().items():
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

"""Leaving the library: one PEFT adapter, or a merged checkpoint. Neither needs cola_fast to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import store
from ..errors import UserError, reason, shown
from ..layers import weights
from ..layers.factors import Factors
from ..layers.weights.dense import merge
from ..methods import wanted_by
from . import compare, peft_format
from .adapters import cut_to_rank, error_table
from .peft_format import CONFIG_FILE
from .save_pretrained import merged_state, write_state
from .vllm import vllm_notes
from .with_peft import as_parameters, with_peft
from .writing import peft_fields

if TYPE_CHECKING:
    from .chain import Chain


@dataclass(frozen=True, repr=False)
class ExportedAdapter:
    """Where an adapter was written, what it lost, what was compared. Stands for its path; `print` shows the rest."""

    path: Path
    rank: int  # the largest of its modules'
    errors: dict[str, float]  # module -> relative error of the update (Frobenius); 0 where it is exact
    compared: list[str]  # with the live model, and what was not
    obstacle: str | None  # what PEFT makes of it, if not what it is
    notes: list[str]  # for those who want to serve it

    @property
    def exact(self) -> bool:
        return self.obstacle is None and not any(self.errors.values())

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        loss = f"largest error {max(self.errors.values()):.1e}" if any(self.errors.values()) else "exact"
        return f"ExportedAdapter({self.path}: {len(self.errors)} modules, rank {self.rank}, {loss})"

    def __str__(self) -> str:
        if any(self.errors.values()):
            loss = ["relative error of the update, by kind of module:", *error_table(self.errors)]
        else:
            loss = ["exact" if self.exact else "but not for PEFT:"]
        obstacle = [] if self.obstacle is None else [self.obstacle]
        return "\n".join(
            [f"{self.path}: rank {self.rank}, {loss[0]}", *loss[1:], *obstacle, *self.compared, *self.notes]
        )


@dataclass(frozen=True)
class ExportedModel:
    """Where a merged checkpoint was written, and what was compared. Stands for its path; `print` shows the rest."""

    path: Path
    compared: list[str]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return "\n".join([str(self.path), *self.compared])


def export_adapter(chain: Chain, folder: Path, rank: int | None = None) -> ExportedAdapter:
    """`[s1·B1 | s2·B2 | ...]` and `[A1; A2; ...]`: exact, of the summed rank, with scale 1; cut to `rank` by SVD.

    Raises UserError for DoRA links, unless there is just one and it is not cut.
    """
    store.refuse_existing(folder)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UserError(f"rank is {rank!r}, but an adapter's rank is a whole number, at least 1.")
    links = [link.factors() for link in chain.links]
    if chain.open_link is not None:
        links.append(chain.open_factors())
    if any(f.magnitude is not None for link in links for f in link.values()) and (len(links) > 1 or rank is not None):
        raise UserError(
            f"This chain has {len(links)} links that scale whole rows of the weight (DoRA): only a single one is an "
            "adapter, of its own rank. Use export_merged (--to merged)."
        )
    named = {name: [link[name] for link in links if name in link] for name in chain.layers}
    factors = {name: concatenate(parts) for name, parts in named.items() if parts}
    if not factors:
        raise UserError("There is no link to export, sealed or open: tie one first, or load the chain with its links.")
    errors = dict.fromkeys(factors, 0.0)
    if rank is not None:
        for name, f in factors.items():
            factors[name], errors[name] = cut_to_rank(f, rank)
    with store.new_folder(folder) as part:
        files, notes = peft_format.encode(factors, **peft_fields(chain, factors)), []
        _write(part, files)
        compared = [compare.adapter(part, named, factors, chain.beside.values(), whole=rank is None)]
        if rank is None and _base_is_untouched(chain, factors):
            compared.append(compare.on_live_base(chain.layers, factors))
        reading = with_peft(chain.model, part, factors)
        if reading.lost:
            _write(part, {CONFIG_FILE: as_parameters(files[CONFIG_FILE], reading.lost & factors.keys())})
            again = with_peft(chain.model, part, factors)
            if again.lost:
                _write(part, files)
            else:
                reading = again
                notes.append("its linears that PEFT takes for experts are target_parameters, known since PEFT 0.17")
        compared += [] if reading.lost else [reading.sentence]
        compared.append("not compared: logits, which need the base without the links")
        notes += vllm_notes(chain.model, factors, store.read_json(part / CONFIG_FILE))
    largest = max(f.rank for f in factors.values())
    return ExportedAdapter(folder, largest, errors, compared, reading.sentence if reading.lost else None, notes)


def _base_is_untouched(chain: Chain, factors: Mapping[str, Factors]) -> bool:
    """Whether the layers' weights are still the base's, and the update is added to them."""
    if any(f.magnitude is not None for f in factors.values()) or any(
        not weights.of(layer).in_one_piece for layer in chain.layers.values()
    ):
        return False
    return chain.base.kind == "ledger" or not (chain.links or (chain.open_link is not None and chain.open_link.starts))


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        with store.disk_errors(folder):
            (folder / name).write_bytes(data)


def concatenate(factors: list[Factors]) -> Factors:
    """One update equal to the sum of several."""
    a = torch.cat([f.a for f in factors])
    b = torch.cat([f.scaled() for f in factors], dim=1)
    return Factors(a, b, alpha=float(a.shape[0]), magnitude=factors[-1].magnitude)


def export_merged(chain: Chain, folder: Path, tokenizer: Any = None, onto: nn.Module | None = None) -> ExportedModel:
    """What is written is dense. Only modules of a still open link, of a ledger or of 4-bit weights are copied for it;
    the chain's model is not touched, `onto` is changed."""
    store.refuse_existing(folder)
    target = chain.model if onto is None else onto
    if not hasattr(target, "save_pretrained"):
        raise UserError(
            f"A merged export is a transformers checkpoint, but the model is a {type(target).__name__}: save its "
            "state_dict yourself, or use export_adapter."
        )
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise UserError(f"tokenizer is {shown(tokenizer)}, but must be one of transformers, or None.")
    if onto is None:
        state = merged_state(chain.model, chain.base.merging)
        for name in chain.layers:
            _require_finite(state[f"{name}.weight"], name)
        compared = compare.layers(chain.layers, state)
    else:
        _fold_into(onto, chain)
        state = onto.state_dict()
        compared = "not compared: the live layers, whose weights are others than those the links went onto"
    return ExportedModel(folder, [compared, *_save_atomically(target, folder, state, tokenizer)])


def _fold_into(model: nn.Module, chain: Chain) -> None:
    """Every link, as it was trained, into the linears of the same names."""
    if wanted_by(chain.settings.init).corrects:
        raise UserError(
            f"The first link starts as a correction of the 4-bit weights (init {chain.settings.init}), which the "
            "original ones do not need: export onto the base."
        )
    modules = dict(model.named_modules())
    shapes = {name: tuple(getattr(modules.get(name), "weight", torch.empty(0)).shape) for name in chain.layers}
    for name, layer in chain.layers.items():
        if shapes[name] != (layer.out_features, layer.in_features):
            raise UserError(
                f"The links cannot go onto this model: {name} is {shapes[name] or 'missing'} there, but "
                f"{(layer.out_features, layer.in_features)} in the chain: give the model it was quantised from."
            )
    chain.beside.give(model)
    for link in [*(link.factors() for link in chain.links), chain.open_factors()]:
        for name, f in link.items():
            weight = modules[name].weight
            assert isinstance(weight, Tensor)
            merge(weight.data, f, rounding=chain.base.merging)
            _require_finite(weight, name)


def _require_finite(weight: Tensor, name: str) -> None:
    if not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"The merged weight of {name} would hold numbers that {dtype} cannot: load the model in bf16 or fp32, or "
            "use export_adapter."
        )


def _save_atomically(model: Any, folder: Path, state: dict[str, Any], tokenizer: Any) -> list[str]:
    saving = "model"
    try:
        with store.new_folder(folder) as part:
            write_state(model, part, dict(state))
            compared = [compare.files(part, state), compare.reloaded(model, part)]
            if tokenizer is not None:
                saving = "tokenizer"
                tokenizer.save_pretrained(part)
        return compared
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written ({error}): free some space or choose another folder."
        ) from error
    except Exception as error:  # transformers raises whatever its libraries do
        raise UserError(
            f"{folder} was not written: transformers cannot save this {saving} ({reason(error)})."
        ) from error

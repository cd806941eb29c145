"""Leaving the library: one PEFT adapter, or a merged checkpoint. Neither needs cola_fast to be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cola_kernels import nf4_dequantize

from . import peft_format, store
from .adapters import cut_to_rank, error_table, peft_notes, vllm_notes
from .bases import merge
from .errors import UserError, reason, shown
from .layer import PARTS, is_nf4
from .methods import wanted_by
from .models import forget_unpacking, generation_settings
from .peft_format import Factors

if TYPE_CHECKING:
    from .chain import Chain


@dataclass(frozen=True, repr=False)
class ExportedAdapter:
    """Where an adapter was written, and what was lost. Stands for its path; `print` shows the rest."""

    path: Path
    rank: int  # the largest of its modules'
    errors: dict[str, float]  # module -> relative error of the update (Frobenius); 0 where it is exact
    notes: list[str]  # for those who want to serve it

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        loss = f"largest error {max(self.errors.values()):.1e}" if any(self.errors.values()) else "exact"
        return f"ExportedAdapter({self.path}: {len(self.errors)} modules, rank {self.rank}, {loss})"

    def __str__(self) -> str:
        exact = not any(self.errors.values())
        loss = ["exact"] if exact else ["relative error of the update, by kind of module:", *error_table(self.errors)]
        return "\n".join([f"{self.path}: rank {self.rank}, {loss[0]}", *loss[1:], *self.notes])


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
        for name, data in peft_format.encode(factors, **chain.peft_fields(factors)).items():
            with store.disk_errors(folder):
                (part / name).write_bytes(data)
    notes = [*peft_notes(chain.model, factors), *vllm_notes(factors)]
    return ExportedAdapter(folder, max(f.rank for f in factors.values()), errors, notes)


def concatenate(factors: list[Factors]) -> Factors:
    """One update equal to the sum of several."""
    a = torch.cat([f.a for f in factors])
    b = torch.cat([f.b * f.scale for f in factors], dim=1)
    return Factors(a, b, alpha=float(a.shape[0]), magnitude=factors[-1].magnitude)


def export_merged(chain: Chain, folder: Path, tokenizer: Any = None, onto: nn.Module | None = None) -> Path:
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
        _save_atomically(chain.model, folder, _merged_state(chain), tokenizer)
    else:
        _fold_into(onto, chain)
        _save_atomically(onto, folder, onto.state_dict(), tokenizer)
    return folder


def _merged_state(chain: Chain) -> dict[str, Tensor]:
    """The model's state as it is now, every link in its weights, 4-bit weights dequantised."""
    state: dict[str, Tensor] = chain.beside.settled(chain.model.state_dict())
    state = {key: value for key, value in state.items() if key.rsplit(".", 1)[-1] not in PARTS}
    for name, module in chain.model.named_modules():
        if isinstance(module, nn.Linear) and is_nf4(module):
            own: Any = module.weight
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.weight.")}
            if name not in chain.layers:
                state[f"{name}.weight"] = nf4_dequantize(own, own.quant_state.dtype)
    factors = chain.live_factors()
    for name, layer in chain.layers.items():
        weight = layer.dense_weight().cpu()
        if name in factors:
            merge(weight := weight.clone(), factors[name], rounding=_rounding(chain))
        _require_finite(weight, name)
        state[f"{name}.weight"] = weight
    return state


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
            merge(weight.data, f, rounding=_rounding(chain))
            _require_finite(weight, name)


def _require_finite(weight: Tensor, name: str) -> None:
    if not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"The merged weight of {name} would hold numbers that {dtype} cannot: load the model in bf16 or fp32, or "
            "use export_adapter."
        )


def _rounding(chain: Chain) -> str:
    return "nearest" if chain.base.rounding == "nearest" else "stochastic"


@contextmanager
def _as_dense(model: Any) -> Iterator[None]:
    """transformers refuses to save a quantised model's weights as anything else."""
    kept = {key: vars(model)[key] for key in ("hf_quantizer", "is_quantized") if key in vars(model)}
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        yield
        return
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    try:
        yield
    finally:
        model.config.quantization_config = config
        vars(model).update(kept)


def _save_atomically(model: Any, folder: Path, state: Mapping[str, Any], tokenizer: Any) -> None:
    saving = "model"
    try:
        with store.new_folder(folder) as part:
            with _as_dense(model), generation_settings(model, part):
                forget_unpacking(model)
                model.save_pretrained(part, state_dict=state)
            if tokenizer is not None:
                saving = "tokenizer"
                tokenizer.save_pretrained(part)
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

"""`save_pretrained` of a model that carries a chain writes the trained model: every link in its weights, no factors.

Trainers save by the model's own method, which knows weights only: it would write factors that nobody reads, and leave
out what stands beside them (an open link, a ledger). So while a chain is attached, the model and every model inside it
have a `save_pretrained` of their own that gives the method a merged state. It refers to nothing but the model, so that
a copied or unpickled model has its own, too. `state_dict()` stays what it is, which a loop's own checkpoints need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError, note, reason
from ..layers import weights
from ..layers.factors import Factors
from ..layers.layer import PARTS, LoRALinear
from ..layers.trained_modules import settled
from ..layers.weights.dense import merge
from ..layers.weights.sharded import whole
from ..layers.weights.weight import Weight
from . import compare

OWN = "save_pretrained"


class Saves:
    """What a chain puts on its model, and takes off again."""

    def __init__(self, model: nn.Module, rounding: str) -> None:
        """rounding: of an open link, `nearest` or `stochastic`."""
        self.model = model
        for module in model.modules():
            if _carries(module) and callable(getattr(module, OWN, None)):
                setattr(module, OWN, partial(_save, module, rounding, vars(module).get(OWN)))
        self._guard: Any = None
        self.guard()

    def guard(self) -> None:
        """Refuse weights that have the open link in them already, where they are loaded into the model."""
        self.unguard()
        self._guard = self.model.register_load_state_dict_pre_hook(_refuse_merged)

    def unguard(self) -> None:
        if self._guard is not None:
            self._guard.remove()

    def remove(self) -> None:
        self.unguard()
        for module in self.model.modules():
            own = vars(module).get(OWN)
            if isinstance(own, partial) and own.func is _save:
                delattr(module, OWN)
                if own.args[2] is not None:
                    setattr(module, OWN, own.args[2])


def _carries(module: nn.Module) -> bool:
    return not isinstance(module, LoRALinear) and any(isinstance(inner, LoRALinear) for inner in module.modules())


def _save(model: Any, rounding: str, replaced: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """`model.save_pretrained(*args, **kwargs)`, with the links in the weights."""
    write = replaced or partial(getattr(type(model), OWN), model)
    known = inspect.signature(write).parameters
    if "state_dict" not in known:
        if any("state_dict" in inspect.signature(type(m).save_pretrained).parameters for m in _inside(model)):
            return write(*args, **kwargs)  # it has a model inside that does the writing
        raise UserError(
            f"save_pretrained of a {type(model).__name__} takes no state_dict and would write the weights without the "
            "links: call chain.tie() and chain.detach() before it, or use chain.export_adapter."
        )
    given = inspect.signature(write).bind(*args, **kwargs)
    if given.arguments.get("distributed_checkpoint"):
        raise UserError(
            "save_pretrained(distributed_checkpoint=True) would write the weights without the links: leave it out."
        )
    sharded = not all(weight.in_one_piece for _, weight in weights.in_model(model))
    theirs = given.arguments.get("state_dict")
    if given.arguments.get("is_main_process", True) or sharded:
        given.arguments["state_dict"] = state = merged_state(model, rounding, theirs)
        if theirs is None and not sharded:
            compare.layers({n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}, state)
    with as_dense(model):
        return write(*given.args, **given.kwargs)


def _inside(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if m is not model and _carries(m) and hasattr(type(m), OWN))


def write_state(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Save this state as the model's, as it is."""
    forget_unpacking(model)
    with as_dense(model), generation_settings(model, folder):
        getattr(type(model), OWN)(model, folder, state_dict=state)


def merged_state(model: nn.Module, rounding: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model's state, every link in its weights, quantised ones as dense. Copies only weights that change for it,
    on the CPU. `given`: a state of this model, such as one gathered from several processes.

    Raises UserError for a state without the open link, for quantised weights that cannot be read, and for a model that
    was left in the middle of a fold.
    """
    if len({module.folded for module in model.modules() if isinstance(module, LoRALinear)}) > 1:
        raise UserError(
            "Folding a link was interrupted, so some of the weights lack it: load the base anew, and the chain with "
            "load_chain."
        )
    state = settled(model, model.state_dict() if given is None else given)
    done: dict[nn.Module, Tensor] = {}  # one for all the names of a module
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        weight = weights.of(module)
        if not (isinstance(module, LoRALinear) or weight.quantised):
            continue
        prefix = f"{name}." if name else ""
        key = f"{prefix}weight"
        parts = [state.pop(f"{prefix}{part}", None) for part in PARTS] if isinstance(module, LoRALinear) else []
        if key not in state:
            continue
        for part in weight.state():
            state.pop(f"{prefix}{part}", None)
        if module not in done:
            if isinstance(module, LoRALinear):
                if module.lora_A is not None and parts[0] is None:
                    raise UserError(
                        f"The state_dict to be saved has {key} but not the open link ({prefix}lora_A): leave "
                        "state_dict out, and what is saved has all links in it."
                    )
                own = given is None or weight.quantised
                base = module.dense_weight() if own else module.with_ledger(whole(state[key].detach()))
                done[module] = _merged(module, base, parts, rounding)
            else:
                done[module] = _dequantised(weight, key)
        state[key] = done[module]
    _require_dense(model, state)
    return state


def merged_weight(layer: LoRALinear, rounding: str) -> Tensor:
    """`[N, K]` with every link in it: the layer's own weight where there is nothing to add, else a copy on the CPU."""
    return _merged(layer, layer.dense_weight(), [getattr(layer, part) for part in PARTS], rounding)


def _merged(layer: LoRALinear, base: Tensor, parts: Sequence[Tensor | None], rounding: str) -> Tensor:
    a, b, e, magnitude = (None if part is None else whole(part.detach()) for part in parts)
    if a is not None and b is not None:
        base = base.clone()  # it may be the live weight
        merge(base, Factors(a, b, layer.scale * len(a), e, magnitude), rounding=rounding)
    is_live = weights.of(layer).in_one_piece and base.data_ptr() == layer.weight.data_ptr()
    return base if is_live else base.cpu()


def _dequantised(weight: Weight, key: str) -> Tensor:
    try:
        return weight.dense().cpu()
    except ValueError as error:
        raise UserError(
            f"{key} cannot be saved as a dense weight ({reason(error)}): use chain.export_adapter."
        ) from None


def _require_dense(model: nn.Module, state: Mapping[str, Any]) -> None:
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return
    names = {name for name, _ in model.named_parameters()}
    for name, value in state.items():
        if name in names and (value.dtype.itemsize == 1 or not value.is_floating_point()):
            raise UserError(
                f"{name} is quantised to {str(value.dtype).removeprefix('torch.')} in a way that is not known here, "
                "which a model with links in its weights cannot be saved with: use chain.export_adapter."
            )


@contextmanager
def as_dense(model: Any) -> Iterator[None]:
    """transformers refuses to save a quantised model's weights as anything else."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        yield
        return
    kept = {key: vars(model)[key] for key in ("hf_quantizer", "is_quantized") if key in vars(model)}
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    try:
        yield
    finally:
        model.config.quantization_config = config
        del model.hf_quantizer, model.is_quantized
        vars(model).update(kept)


def _refuse_merged(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    for name, layer in model.named_modules():
        key = f"{prefix}{name}."
        if isinstance(layer, LoRALinear) and layer.lora_A is not None and f"{key}weight" in state:
            if f"{key}lora_A" in state:
                continue
            raise UserError(
                f"These weights have the links of a chain in them ({key}lora_A is not there): loaded into a model with "
                "an open link they would count twice. Load them into a model without a chain; a Trainer resumes with "
                "ChainCallback, a chain of your own with load_chain."
            )


def forget_unpacking(model: Any) -> None:
    """transformers keeps what it did to load a model, to undo it in `save_pretrained`, and stumbles over the unpacking
    of 4-bit weights, which it cannot undo and need not: a state dict holds them packed, or dense."""
    kept = getattr(model, "_weight_conversions", None)
    if kept:
        home = "transformers.integrations.bitsandbytes"
        unpack = [c for c in kept if any(type(op).__module__ == home for op in getattr(c, "operations", ()))]
        model._weight_conversions = [c for c in kept if c not in unpack]


@contextmanager
def generation_settings(model: Any, folder: Path) -> Iterator[None]:
    """transformers saves no model whose generation settings contradict each other (a temperature without sampling),
    which it loads with a warning. Inside this block it saves the model without them, and they are added as they are."""
    settings: Any = getattr(model, "generation_config", None)
    wrong = _contradiction(settings) if settings is not None and model.can_generate() else None
    if wrong is None:
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings
    settings.to_json_file(folder / "generation_config.json")
    note(f"The model's generation settings contradict each other, and are written as they are ({wrong}).")


def _contradiction(settings: Any) -> str | None:
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return reason(error)
    return None

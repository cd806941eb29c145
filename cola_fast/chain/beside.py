"""What is trained beside the links: whole modules (heads, embeddings, norms), and the rows of single tokens.

Their values do not add up as links do; the last ones count. So every sealed link holds them as they were at its end,
under PEFT's names (`modules_to_save`, `trainable_token_indices`), a state as they are, and `start.safetensors` as they
were when the chain was attached: a fresh head is in no checkpoint. What a chain's base is known by leaves them out.

Of a 16-bit module the parameters are kept and trained in 32 bits, so that small steps are not rounded away, and it
computes with them rounded to 16: what an export holds, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import store
from ..errors import UserError, listed, shown, told
from ..layers import weights
from ..layers.layer import LoRALinear
from ..layers.targets import matching, output_heads
from ..layers.trained_modules import ROWS, Changed, Wide, WithRows, become, go_back
from .chain_json import START_FILE
from .peft_format import TOKEN_ROWS, Also


class Beside:
    """`modules`: names of the modules that are trained whole, with those that share their parameters. `tokens`: whose
    rows of the embeddings are trained, in the output head too. `start`: the values at the beginning, on the CPU.

    Nothing is trained before `open`.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] = (), tokens: Sequence[int] = ()) -> None:
        self.model, self.modules, self.tokens = model, list(modules), list(tokens)
        self.start: dict[str, Tensor] = {}
        self._start_hash: str | None = None

    def __bool__(self) -> bool:
        return bool(self.modules or self.tokens)

    def __str__(self) -> str:
        rows = [f"rows of {len(self.tokens)} tokens"] if self.tokens else []
        return f"{listed([*self.modules, *rows], 4)}: {sum(p.numel() for p in self.parameters()):,} trained whole"

    # --- taking part in the model -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Let the model train them. All other parameters are left as they are."""
        owners = self._owners()
        narrow = {p: p.dtype for module in owners for p in module.parameters(recurse=False) if p.element_size() < 4}
        for module in owners:
            dtypes = [narrow[p] for p in module.parameters(recurse=False) if p in narrow]
            if dtypes:
                become(module, Wide, narrow=dtypes[0])
        for p in narrow:  # a shared one once
            p.data = p.data.float()
        for module in map(self.model.get_submodule, self.modules):
            module.requires_grad_(True)
        if self.tokens:
            self._open_rows()
        self.begin_at(self.values())

    def close(self) -> None:
        """Plain frozen modules again, with the trained values in them."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, Changed):
                module.settle()
                go_back(module)
        self.modules, self.tokens = [], []

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each once, a shared one under its first name."""
        seen = set()
        for name in self.modules:
            for key, parameter in self.model.get_submodule(name).named_parameters(name):
                if parameter not in seen:
                    seen.add(parameter)
                    yield key, parameter
        for name, module in self._rows().items():
            yield f"{name}.{ROWS}", cast(nn.Parameter, getattr(module, ROWS))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def held(self) -> set[nn.Module]:
        """All modules that are trained whole, with those that they consist of."""
        return {inner for name in self.modules for inner in self.model.get_submodule(name).modules()}

    def forgotten(self, targets: Mapping[str, nn.Module]) -> str | None:
        """A sentence if the model has a head that classifies and nothing trains it, a mistake if it is fresh."""
        names = {module: name for name, module in self.model.named_modules()}
        trained = {*self.held(), *targets.values(), *embeddings(self.model)}
        left = [names[m] for m in output_heads(self.model) if not trained & set(m.modules())]
        if not left:
            return None
        return f"{left[0]} is frozen: if no checkpoint has it, attach with train_also=({left[0]!r},)."

    def _owners(self) -> list[nn.Module]:
        """Every module that itself has a parameter of those trained whole."""
        trained = {p for name in self.modules for p in self.model.get_submodule(name).parameters()}
        return [m for m in self.model.modules() if any(p in trained for p in m._parameters.values() if p is not None)]

    def _open_rows(self) -> None:
        shared: dict[nn.Parameter, nn.Parameter] = {}  # a tied head takes the embedding's
        for module in self._with_rows():
            weight = cast(nn.Parameter, module.weight)
            if weight not in shared:
                rows = weight.detach()[torch.tensor(self.tokens, device=weight.device)]
                shared[weight] = nn.Parameter(rows.to(torch.promote_types(weight.dtype, torch.float32)))
            become(module, WithRows)
            module.register_parameter(ROWS, shared[weight])
            places = torch.full((len(weight),), -1, dtype=torch.long)
            places[self.tokens] = torch.arange(len(self.tokens))
            module.register_buffer("token_places", places.to(weight.device), persistent=False)
            module.register_buffer("token_ids", torch.tensor(self.tokens, device=weight.device), persistent=False)

    def _with_rows(self) -> list[Any]:
        return [m for m in embeddings(self.model) if m not in self.held()] if self.tokens else []

    def _rows(self) -> dict[str, Any]:
        """Name -> the embedding, and the head unless it is tied to it."""
        names = {module: name for name, module in self.model.named_modules()}
        first = {module.weight: module for module in reversed(self._with_rows())}
        return {names[module]: module for module in reversed(first.values())}

    # --- values -------------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """Copies on the CPU, buffers of the modules too, under the names that they have in an adapter of PEFT."""
        live = {name: value.detach() for name, value in self._live().items()}
        return {n: v.clone() if v.is_meta else v.to("cpu", copy=True) for n, v in live.items()}

    def set(self, values: Mapping[str, Tensor], where: str) -> None:
        """Bring back what `values` gave. where: what they were read from, for the sentence if they do not fit."""
        self.require_fitting(values, where)
        with torch.no_grad():
            for name, live in self._live().items():
                live.copy_(values[name])

    def require_fitting(self, values: Mapping[str, Tensor], where: str) -> None:
        """Raises UserError unless everything that is trained has a value of its shape, and nothing else has one."""
        shapes = {name: list(value.shape) for name, value in self._of_modules().items()}
        shapes |= {f"{n}.{TOKEN_ROWS}": [len(self.tokens), m.weight.shape[1]] for n, m in self._rows().items()}
        for name in dict.fromkeys([*shapes, *values]):
            given, expected = values.get(name), shapes.get(name)
            if given is None or list(given.shape) != expected:
                raise UserError(
                    f"{where} holds {'nothing' if given is None else list(given.shape)} for {name}, which is trained "
                    f"beside the links, but the model has {'no such thing' if expected is None else expected}: load it "
                    "as it was when the chain was attached (labels, size of the embeddings)."
                )

    def _of_modules(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name in self.modules
            for key, value in self.model.get_submodule(name).state_dict(keep_vars=True).items()
        }

    def _live(self) -> dict[str, Tensor]:
        return self._of_modules() | {f"{n}.{TOKEN_ROWS}": getattr(m, ROWS) for n, m in self._rows().items()}

    def tensors(self) -> list[Tensor]:
        """Live: all that `values` copies."""
        return list(self._live().values())

    def also(self) -> Also:
        """What an adapter holds of them, as they are now."""
        return Also(tuple(self.modules), {name: list(self.tokens) for name in self._rows()}, self.values())

    @torch.no_grad()
    def give(self, model: nn.Module) -> None:
        """Put the trained values into another plain model of the same architecture."""
        theirs = model.state_dict(keep_vars=True)
        for name, value in self.values().items():
            if name.endswith(f".{TOKEN_ROWS}"):
                weight = theirs[name.removesuffix(TOKEN_ROWS) + "weight"]
                weight[self.tokens] = value.to(weight)
            else:
                theirs[name].copy_(value)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """Its entry in chain.json."""
        if not self:
            return None
        if self._start_hash is None:
            self._start_hash = store.sha256(self.start_file())
        return {"modules": self.modules, "tokens": self.tokens, "start": self._start_hash}

    def start_file(self) -> bytes:
        data: bytes = safetensors.torch.save({name: self.start[name].contiguous() for name in sorted(self.start)})
        return data

    def read_start(self, folder: Path, entry: Mapping[str, Any] | None) -> dict[str, Tensor]:
        """What `start_file` gave, from a chain's folder and its entry in chain.json. The model is not touched."""
        if not entry:
            return {}
        path = folder / START_FILE
        with told(f"{path} is damaged, restore it from a copy"):
            values = dict(safetensors.torch.load(store.read_checked(path, entry["start"])))
        self.require_fitting(values, str(path))
        return values

    def begin_at(self, values: Mapping[str, Tensor]) -> None:
        """Begin with these, whatever the model at hand has there."""
        self.set(values, "The start")
        self.start, self._start_hash = dict(values), None


def recorded_beside(model: nn.Module, entry: Mapping[str, Any] | None) -> Beside:
    """What a chain's entry in chain.json means for this model."""
    names, tokens = (entry[key] if entry else () for key in ("modules", "tokens"))
    has = dict(model.named_modules())
    missing = next((name for name in names if name not in has), None)
    if missing is not None:
        raise UserError(
            f"The chain trains {missing} beside its links, but this model has no module of that name: load it as it "
            "was when the chain was attached."
        )
    return Beside(model, names, _tokens(model, tokens))


def choose_beside(model: nn.Module, names: str | Sequence[str], tokens: Sequence[int]) -> Beside:
    """What `train_also` and `train_tokens` mean for this model.

    Raises UserError for a name that matches nothing, for modules that cannot be trained, and for tokens that the model
    has no row of.
    """
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise UserError(f"train_also is {shown(names)}, but must be the name of a module, or a list of names.")
    modules = {name: module for name, module in model.named_modules() if name}
    for name in wanted:
        owner = name.rpartition(".")[0]
        if owner in modules and name.rpartition(".")[2] in modules[owner]._parameters:
            raise UserError(f"train_also has {name}, which is a parameter: name its module, {owner}.")
    found = {name for pattern in wanted for name in matching(pattern, modules, what="train_also name")}
    shared = {parameter for name in found for parameter in modules[name].parameters()}
    found |= {name for name, m in modules.items() if any(p in shared for p in m._parameters.values())}
    chosen = [n for n in modules if n in found and not any(n.startswith(f"{outer}.") for outer in found)]
    for name in chosen:
        _require_trainable(name, modules[name])
    beside = Beside(model, chosen, _tokens(model, tokens))
    if beside.tokens and embeddings(model)[0] in beside.held():
        raise UserError(
            "train_tokens has rows of the embeddings, which train_also trains whole: leave one of them out."
        )
    return beside


def require_apart(beside: Beside, targets: Mapping[str, nn.Module]) -> None:
    """Raises UserError for a module that would be trained twice. targets: those that get links."""
    held = beside.held()
    for name, module in targets.items():
        if module in held:
            raise UserError(f"{name} is a target of the chain and in train_also: leave one of them out.")
        if beside.tokens and any(module is one for one in embeddings(beside.model)):
            raise UserError(f"train_tokens trains rows of {name}, which is a target of the chain too: leave one out.")


def embeddings(model: nn.Module) -> list[nn.Module]:
    """The embedding of the input tokens, and the output head where there is one."""
    found = []
    for kind in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # of a model that reads no tokens
            found.append(getattr(model, f"get_{kind}_embeddings")())
    return [module for module in found if isinstance(module, nn.Embedding | nn.Linear)]


def _require_trainable(name: str, module: nn.Module) -> None:
    parameters = dict(weights.in_model(module))
    if not parameters:
        raise UserError(f"train_also has {name}, a {type(module).__name__} without parameters: leave it out.")
    for key, weight in parameters.items():
        if (why := weight.untrainable()) is not None:
            raise UserError(f"train_also has {name}, whose {key} is {why} and cannot be trained: leave it out.")
    if any(isinstance(inner, LoRALinear) for inner in module.modules()):
        raise UserError(f"train_also has {name}, which has links already: leave it out.")


def _tokens(model: nn.Module, tokens: Sequence[int]) -> list[int]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence | range) or not all(type(t) is int for t in tokens):
        raise UserError(f"train_tokens is {shown(tokens)}, but must be a list of token numbers.")
    if not tokens:
        return []
    found = embeddings(model)
    if not found or not isinstance(found[0], nn.Embedding):
        raise UserError("train_tokens has tokens, but the model has no embedding of tokens: leave it out.")
    weight = found[0].weight
    if weights.of(found[0]).untrainable() is not None:
        raise UserError("train_tokens has rows of embeddings that are sharded or quantised: leave it out.")
    if not 0 <= min(tokens) <= max(tokens) < len(weight):
        wrong = min(tokens) if min(tokens) < 0 else max(tokens)
        raise UserError(
            f"train_tokens has {wrong}, but the model's embeddings have {len(weight)} rows: call "
            "model.resize_token_embeddings(len(tokenizer)) before the chain is attached or loaded."
        )
    return sorted(set(tokens))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key

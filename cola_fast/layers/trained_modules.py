"""Modules that change their class to be trained beside the links, and go back the same way, as linears with a link do.

Nothing is re-registered or renamed: the object stays the one that the model, its hooks and its state dict know.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = "token_rows"  # the parameter of an embedding, or a head, that holds the trained rows


@torch.no_grad()
def settled(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the model as a plain model's: trained values rounded to what the model computes with, rows in
    their places."""
    plain = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, Wide):
            for key in module.rounded():
                if f"{prefix}{key}" in plain:
                    plain[f"{prefix}{key}"] = plain[f"{prefix}{key}"].detach().to(module.narrow)
        elif isinstance(module, WithRows):
            rows, weight = plain.pop(f"{prefix}{ROWS}", None), plain.get(f"{prefix}weight")
            if rows is not None and weight is not None:
                ids = module.token_ids.to(weight.device)
                plain[f"{prefix}weight"] = weight.detach().index_copy(0, ids, rows.detach().to(weight))
    return plain


class Changed:
    """A module whose class was exchanged for one that derives from it, see `become`."""

    mixin: type
    plain: type[nn.Module]

    def settle(self) -> None:
        """Give a plain module's parameters the trained values."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:  # copied and pickled by what it is made of
        return _empty, (self.mixin, self.plain), vars(self)


class Wide(Changed):
    """Keeps its own parameters in 32 bits and computes with them in 16."""

    narrow: torch.dtype

    def settle(self) -> None:
        for p in cast(nn.Module, self).parameters(recurse=False):
            p.data = p.data.to(self.narrow)  # of a shared one, once more what it is already

    def rounded(self) -> dict[str, Tensor]:
        """Its own parameters, as it computes with them."""
        return {key: p.to(self.narrow) for key, p in cast(nn.Module, self)._parameters.items() if p is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if self.plain is nn.Embedding:  # the rows that are looked up, not all of them
            return forward(*args, **kwargs).to(self.narrow)
        return _with(self, self.rounded(), lambda: forward(*args, **kwargs))


class WithRows(Changed):
    """An embedding or output head [V, K] with its own values, `token_rows` [n, K], for the rows of `token_ids`."""

    weight: Tensor
    token_rows: Tensor
    token_ids: Tensor  # [n]
    token_places: Tensor  # [V]: where in token_rows, or -1

    def settle(self) -> None:
        self.weight.data.index_copy_(0, self.token_ids, self.token_rows.detach().to(self.weight.dtype))

    def whole(self) -> Tensor:
        return self.weight.index_copy(0, self.token_ids, self.token_rows.to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        forward = super().forward  # type: ignore[misc]
        rows = self.token_rows.to(self.weight.dtype)
        if self.plain is nn.Embedding:
            place = self.token_places[input]
            mine = F.embedding(place.clamp(min=0), rows)
            return torch.where((place >= 0).unsqueeze(-1), mine, forward(input))
        if self.plain is nn.Linear and cast(Any, self).bias is None:
            y: Tensor = forward(input)
            return y.index_copy_(-1, self.token_ids, F.linear(input, rows))
        return cast(Tensor, _with(self, {"weight": self.whole()}, lambda: forward(input)))


def _with(module: Any, values: Mapping[str, Tensor], call: Any) -> Any:
    """`call()` while the module sees other tensors in place of its parameters: what is in an object's own dict is found
    before what nn.Module looks up."""
    vars(module).update(values)
    try:
        return call()
    finally:
        for key in values:
            del vars(module)[key]


@cache
def _derived(mixin: Any, plain: Any) -> Any:
    return type(plain.__name__, (mixin, plain), {"mixin": mixin, "plain": plain, "__module__": plain.__module__})


def _empty(mixin: Any, plain: Any) -> nn.Module:
    kind = _derived(mixin, plain)
    return cast(nn.Module, kind.__new__(kind))


def become(module: nn.Module, mixin: type, **attributes: Any) -> None:
    plain: Any = type(module)
    module.__class__ = _derived(mixin, plain)
    for key, value in attributes.items():
        setattr(module, key, value)


def go_back(module: Any) -> None:
    if isinstance(module, Wide):
        del module.narrow
    else:
        for key in (ROWS, "token_places", "token_ids"):
            delattr(module, key)
    module.__class__ = module.plain

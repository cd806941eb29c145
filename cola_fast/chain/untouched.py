"""What a chain does not train must stay as it was: whatever rebuilds the chain takes it from the base on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import weights
from .fingerprint import samples_of


class Untouched:
    """Samples of every parameter and kept buffer but those of the chain: `own`."""

    def __init__(self, model: nn.Module, own: Iterable[Tensor]) -> None:
        own = set(own)
        self._samples = {name: samples_of(t.detach()).cpu() for name, t in _kept(model) if t not in own}

    def require(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        """Raises UserError if something else than `trained` is to be trained, or has been."""
        trained = set(trained)
        free = next((name for name, p in model.named_parameters() if p.requires_grad and p not in trained), None)
        if free is not None:
            raise UserError(f"{free} is trained too (requires_grad), but is no part of the chain: {_remedy(free)}")
        now = dict(_kept(model))
        for name, before in self._samples.items():
            tensor = now.get(name)
            after = None if tensor is None else samples_of(tensor.detach()).cpu()
            if after is not None and after.dtype != before.dtype:  # model.half() and the like
                continue
            if after is None or not torch.equal(after, before):
                raise UserError(
                    f"{name} is not as it was when the chain was attached, but is no part of it: load the base anew, "
                    f"and {_remedy(name)}"
                )


def _kept(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint holds, which are there in one piece."""
    for path, module in model.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (module._parameters | buffers).items():
            if tensor is None or tensor.is_meta or not tensor.numel():
                continue
            if weights.of(module, tensor).in_one_piece:
                yield f"{path}.{key}" if path else key, tensor


def _remedy(name: str) -> str:
    module = name.rpartition(".")[0]
    return f"attach with train_also=({module!r},), which keeps it in states, links and exports, or leave it frozen."

"""What training will need, before it starts: counted on the meta device, where tensors have shapes but no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .chain import Chain

OPTIMIZER_BYTES = 16  # per trained parameter: fp32 value, gradient and AdamW's two moments


@dataclass(frozen=True)
class Estimate:
    trained: int  # parameters of one link
    total: int  # of the base model
    weights: int  # bytes of the frozen base
    link: int  # bytes of the link, its gradient and optimizer state
    activations: int | None  # bytes kept for backward by one forward pass; None if the model cannot run on meta

    @property
    def peak(self) -> int | None:
        return None if self.activations is None else self.weights + self.link + self.activations


def estimate(chain: Chain, model: nn.Module, *, dtype: torch.dtype, batch: int, length: int, logits: int) -> Estimate:
    """For a chain attached to a model on the meta device.

    batch, length: sequences and tokens per sequence in one forward pass. logits: positions that need logits.
    """
    model.to(dtype)
    for layer in chain.layers.values():  # the link stays fp32 whatever the base is
        for parameter in (layer.lora_A, layer.lora_B):
            if parameter is not None:
                parameter.data = parameter.data.float()
    trained = sum(p.numel() for p in chain.parameters())
    base = [p for name, p in model.named_parameters() if not name.endswith((".lora_A", ".lora_B"))]
    weights = sum(p.numel() * p.element_size() for p in base)
    activations = _saved_for_backward(model, batch, length, logits)
    return Estimate(trained, sum(p.numel() for p in base), weights, trained * OPTIMIZER_BYTES, activations)


def _saved_for_backward(model: nn.Module, batch: int, length: int, logits: int) -> int | None:
    """Bytes of the distinct tensors that autograd keeps, parameters aside."""
    known = {id(p) for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holding the storages keeps their identities unique

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known and not isinstance(tensor, nn.Parameter):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model(ids, use_cache=False, logits_to_keep=min(logits, length)).logits
            scores.float().logsumexp(-1).sum()
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    return sum(t.untyped_storage().nbytes() for t in kept.values() if not isinstance(t, nn.Parameter))

"""What training will need, before it starts: counted on fake tensors, which have shapes but no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .chain import Chain
from .layer import PARTS
from .targets import select_modules

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # per weight: its code, and its share of a scale quantised in blocks of 256
OPTIMIZER_BYTES = 16  # per trained parameter: fp32 value, gradient and AdamW's two moments


@dataclass(frozen=True)
class Estimate:
    trained: int  # parameters of one link
    total: int  # of the base model
    weights: int  # bytes of the frozen base
    link: int  # bytes of the link, its gradient and optimizer state
    activations: int | None  # bytes kept for backward by one forward pass; None if the model cannot run without data
    obstacle: str | None  # why it cannot

    @property
    def peak(self) -> int | None:
        return None if self.activations is None else self.weights + self.link + self.activations


def estimate(
    chain: Chain,
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
    logits: int,
    in_4bit: bool = False,
) -> Estimate:
    """For a chain attached to a model on the meta device, to be trained on `device`. The model is of no use afterwards.

    batch, length: sequences and tokens per sequence in one forward pass. logits: positions that need logits.
    in_4bit: the linear layers will be NF4, but for the output head.
    """
    model.to(dtype)
    for layer in chain.layers.values():  # the link stays fp32 whatever the base is
        for parameter in (getattr(layer, part) for part in PARTS):
            if parameter is not None:
                parameter.data = parameter.data.float()
    trained = sum(p.numel() for p in chain.parameters())
    base = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] not in PARTS]
    weights = sum(p.numel() * p.element_size() for p in base)
    if in_4bit:
        covered = select_modules(model, "all-linear").values()
        weights -= sum(round(m.weight.numel() * (m.weight.element_size() - NF4_BYTES)) for m in covered)
    activations = obstacle = None
    try:
        activations = _saved_for_backward(model, device, batch, length, logits)
    except Exception as error:  # a model's own code, which may look at values
        obstacle = str(error).strip().split("\n")[0]
    return Estimate(trained, sum(p.numel() for p in base), weights, trained * OPTIMIZER_BYTES, activations, obstacle)


def _saved_for_backward(model: nn.Module, device: torch.device, batch: int, length: int, logits: int) -> int:
    """Bytes of the distinct tensors that autograd keeps, parameters aside."""
    kept: dict[int, torch.Tensor] = {}  # holding the storages keeps their identities unique

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.train().to_empty(device=device)
        ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model(ids, use_cache=False, logits_to_keep=min(logits, length)).logits
            scores.float().logsumexp(-1).sum()
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)

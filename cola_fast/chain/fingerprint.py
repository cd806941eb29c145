"""Which base model a chain belongs to: its name, its revision, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import weights
from .beside import Beside, embeddings

SAMPLES = 64  # values read of every parameter


def base_identity(model: nn.Module, beside: Beside) -> dict[str, Any]:
    """Call on the untouched base, before any fold and before `beside` is opened."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(config, "_commit_hash", None),
        "quantisation": quantisation(model),
        "fingerprint": fingerprint(model, beside),
    }


def quantisation(model: nn.Module) -> str | None:
    """How its weights are quantised, for people: what `nf4, blocks of 64, double` says. None for a dense model."""
    return next(filter(None, (weight.describe() for _, weight in weights.in_model(model))), None)


def fingerprint(model: nn.Module, beside: Beside) -> str:
    """sha256 over names, shapes and `SAMPLES` evenly spaced values of every parameter but those trained beside the
    links, which may be fresh.

    Floating-point values are compared in bf16, so that a checkpoint has one fingerprint whether it is loaded as fp32 or
    bf16. Reading samples keeps it fast on any size; another checkpoint, or a fine-tune, differs in nearly all of them.
    """
    digest = hashlib.sha256()
    samples = []
    whole_modules = {p for name in beside.modules for p in model.get_submodule(name).parameters()}
    with_rows = {module.weight for module in embeddings(model)} if beside.tokens else set()
    for name, weight in sorted(weights.in_model(model), key=lambda pair: pair[0]):
        parameter = weight.tensor
        if parameter in whole_modules:
            continue
        without = beside.tokens if parameter in with_rows else []
        shape = (len(parameter) - len(without), *parameter.shape[1:]) if without else tuple(parameter.shape)
        digest.update(f"{name} {shape};".encode())
        samples += [_compared(samples_of(part, without)) for part in weight.parts()]
    if samples and not any(s.is_meta for s in samples):  # on the meta device there are shapes only
        digest.update(torch.cat([s.cpu() for s in samples]).numpy().tobytes())
    return digest.hexdigest()


def samples_of(tensor: Tensor, without: Sequence[int] = ()) -> Tensor:
    """`SAMPLES` evenly spaced values of a tensor, of all its rows or all but some."""
    rows = sorted(set(range(len(tensor))) - set(without)) if without else []
    width = tensor.numel() // len(tensor) if without else 1
    flat = tensor.reshape(-1)
    size = len(rows) * width if without else flat.numel()
    last, count = max(size - 1, 0), min(SAMPLES, size)
    where = torch.linspace(0, last, count, dtype=torch.float64, device="cpu").long()  # on every device the same
    if without:
        where = torch.tensor(rows, dtype=torch.long)[where // width] * width + where % width
    return flat[where.to(flat.device)]


def _compared(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float() if values.is_floating_point() else values.float()

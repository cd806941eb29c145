"""Which base model a chain belongs to: its name, its revision, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import whole

SAMPLES = 64  # values read of every parameter


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Call on the untouched base, before any fold."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(config, "_commit_hash", None),
        "quantisation": quantisation(model),
        "fingerprint": fingerprint(model),
    }


def quantisation(model: nn.Module) -> str | None:
    """How its weights are quantised, for people: what `nf4, blocks of 64, double` says. None for a dense model."""
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            return f"{state.quant_type}, blocks of {state.blocksize}{', double' if state.nested else ''}"
    return None


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and `SAMPLES` evenly spaced values of every parameter.

    Floating-point values are compared in bf16, so that a checkpoint has one fingerprint whether it is loaded as fp32 or
    bf16. Reading samples keeps it fast on any size; another checkpoint, or a fine-tune, differs in nearly all of them.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        samples.append(_samples(whole(parameter.detach())))
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:  # 4-bit codes mean nothing without their scales
            samples.append(_samples(state.absmax))
    if samples and not any(s.is_meta for s in samples):  # on the meta device there are shapes only
        digest.update(torch.cat([s.cpu() for s in samples]).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    last, count = max(flat.numel() - 1, 0), min(SAMPLES, flat.numel())
    where = torch.linspace(0, last, count, dtype=torch.float64, device="cpu")  # on every device the same
    values = flat[where.long().to(flat.device)]
    return values.to(torch.bfloat16).float() if values.is_floating_point() else values.float()

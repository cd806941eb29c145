"""Which base model a chain belongs to: its name, its revision, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

SAMPLES = 64  # values read of every parameter


def base_identity(model: nn.Module) -> dict[str, Any]:
    """Call on the untouched base, before any fold."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "revision": getattr(config, "_commit_hash", None),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and `SAMPLES` evenly spaced values of every parameter.

    Floating-point values are compared in bf16, so that a checkpoint has one fingerprint whether it is loaded as fp32 or
    bf16. Reading samples keeps it fast on any size; another checkpoint, or a fine-tune, differs in nearly all of them.
    """
    digest = hashlib.sha256()
    samples = []
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel():
            where = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
            values = flat[where.long().to(flat.device)]
            samples.append(values.to(torch.bfloat16).float() if values.is_floating_point() else values.float())
    if samples and not any(s.is_meta for s in samples):  # on the meta device there are shapes only
        digest.update(torch.cat([s.cpu() for s in samples]).numpy().tobytes())
    return digest.hexdigest()

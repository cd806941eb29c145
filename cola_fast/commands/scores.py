"""A table of scores, of models that are looked at one after the other. The same weights are never scored twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..data.encode import Example
from ..training.evaluate import Score, evaluate
from ..training.progress import Progress


class Scores:
    """`rows`: a dict a model, in order, with what `add` was given; `same_as` names the row whose score it shares."""

    def __init__(self, examples: Sequence[Example], *, batch_size: int, progress: Progress) -> None:
        self.examples, self.batch_size, self.progress = examples, batch_size, progress
        self.rows: list[dict[str, Any]] = []
        self._known: dict[str, tuple[str, Score]] = {}

    def add(self, name: str, model: nn.Module, **more: Any) -> None:
        key = digest(model)
        if key in self._known:
            twin, score = self._known[key]
            more["same_as"] = twin
        else:
            self.progress.start(name)
            score = evaluate(model, self.examples, batch_size=self.batch_size, tell=self.progress)
            self._known[key] = name, score
        self.rows.append({"model": name, **asdict(score), **more})


def digest(model: nn.Module) -> str:
    """sha256 over everything that decides a model's logits: every bit of its parameters and buffers by name, the scales
    of an open link, the class and its configuration. Two models with one digest say the same."""
    found = hashlib.sha256(f"{type(model).__name__} {_settings(model)}".encode())
    shared = dict(model.named_parameters(remove_duplicate=False))
    stored = {name: value for name, value in model.state_dict().items() if name not in shared}  # also 4-bit scales
    tensors: dict[str, Any] = {**dict(model.named_buffers()), **stored, **dict(model.named_parameters())}
    for name, tensor in sorted(tensors.items()):
        if torch.is_tensor(tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None) is not None:
            found.update(f"{name} {module.scale};".encode())
    return found.hexdigest()


def _settings(model: Any) -> str:
    """The model's configuration, but for where it came from and how it was stored."""
    values = model.config.to_dict() if hasattr(model, "config") else {}
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"):
        values.pop(key, None)
    return json.dumps(values, sort_keys=True, default=str)

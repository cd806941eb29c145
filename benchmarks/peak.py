"""The most memory that a training run holds at once: what PyTorch has handed out for tensors, temporaries included.

On a GPU that is `torch.cuda.max_memory_allocated`. On a CPU the same is counted from the allocator's own record of
every allocation and release, which the profiler keeps: exact, the same in every run, and without what Python, libraries
and the allocator's caches hold beside it. A process's resident memory has those in it, and moves by 100 MB from run to
run. A checkpoint's weights lie in the file, mapped, and pass by the allocator: they are counted apart, once each.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn


class Peak:
    """Give `watch` the model when it has been loaded; `bytes()` ends the measurement."""

    def __init__(self) -> None:
        self._profile: Any = None
        self.weights = 0  # bytes of the model as loaded

    def watch(self, model: nn.Module) -> nn.Module:
        gc.collect()
        self.weights = _bytes_of(model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.start()
        return model

    def bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        self._profile.stop()
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        return self.weights + most


def _bytes_of(model: nn.Module) -> int:
    """Of parameters and buffers, and of how 4-bit weights are quantised; what several share counts once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [t for t in vars(part).values() if isinstance(t, Tensor)] if part is not None else []
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

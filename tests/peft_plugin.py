"""A pytest plugin that makes the drop-in active in PEFT's own tests; CONTRIBUTING.md has the command.

Whenever PEFT puts adapters into a model (get_peft_model, from_pretrained, add_adapter, load_adapter, ...), the plugin
calls `accelerate_peft` on the layers. The summary says how many layers were replaced and how many calls were fused, so
that a run in which nothing was fused cannot pass for a success.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from cola_fast import UserError, accelerate_peft

COUNTS: Counter[str] = Counter()


def pytest_configure(config: Any) -> None:
    from peft.tuners.lora import LoraModel

    from cola_fast.layers import peft_layers

    LoraModel.inject_adapter = _then_accelerate(LoraModel.inject_adapter)
    peft_layers.lora_linear = _counted(peft_layers.lora_linear)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line("drop-in: " + ", ".join(f"{count} {what}" for what, count in sorted(COUNTS.items())))


def _then_accelerate(inject: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inject)
    def wrapped(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        try:
            COUNTS["layers replaced"] += len(accelerate_peft(model).replaced)
        except UserError as error:  # nothing in this model can be fused
            COUNTS[f"models left alone: {str(error).partition(': ')[2].partition(':')[0]}"] += 1
        return result

    return wrapped


def _counted(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        COUNTS["calls fused"] += 1
        return op(*args, **kwargs)

    return wrapped

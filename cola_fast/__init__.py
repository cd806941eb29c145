"""cola_fast: fine-tune a language model with a chain of LoRA links.

The names below are loaded when first used, so that `import cola_fast` and `cola --help` do not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import ChainCallback
    from .chain import Chain
    from .construct import attach, load_chain
    from .drop_in import accelerate_peft, restore_peft
    from .errors import UserError
    from .layer import LoRALinear
    from .ranks import gelora_ranks
    from .trainer import train

__version__ = "0.1.0"
__all__ = [
    "Chain",
    "ChainCallback",
    "LoRALinear",
    "UserError",
    "accelerate_peft",
    "attach",
    "gelora_ranks",
    "load_chain",
    "restore_peft",
    "train",
]

_HOMES = {
    "Chain": "chain",
    "ChainCallback": "callback",
    "LoRALinear": "layer",
    "UserError": "errors",
    "accelerate_peft": "drop_in",
    "attach": "construct",
    "gelora_ranks": "ranks",
    "load_chain": "construct",
    "restore_peft": "drop_in",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""cola_fast: fine-tune a language model with a chain of LoRA links.

The names below are loaded when first used, so that `import cola_fast` and `cola --help` do not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chain import Chain, attach, load_chain
    from .errors import UserError
    from .layer import LoRALinear
    from .ranks import gelora_ranks
    from .trainer import train

__version__ = "0.1.0"
__all__ = ["Chain", "LoRALinear", "UserError", "attach", "gelora_ranks", "load_chain", "train"]

_HOMES = {
    "Chain": "chain",
    "LoRALinear": "layer",
    "UserError": "errors",
    "attach": "chain",
    "gelora_ranks": "ranks",
    "load_chain": "chain",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""cola_fast: fine-tune a language model with a chain of LoRA links.

The names below are loaded when first used, so that `import cola_fast` and `cola --help` do not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chain.attach import attach, load_chain
    from .chain.chain import Chain
    from .errors import UserError
    from .layers.layer import LoRALinear
    from .layers.peft_drop_in import accelerate_peft, restore_peft
    from .methods.options import ChainOptions
    from .ranks import gelora_ranks
    from .training.callback import ChainCallback
    from .training.trainer import train

__version__ = "0.1.0"
__all__ = [
    "Chain",
    "ChainCallback",
    "ChainOptions",
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
    "Chain": "chain.chain",
    "ChainCallback": "training.callback",
    "ChainOptions": "methods.options",
    "LoRALinear": "layers.layer",
    "UserError": "errors",
    "accelerate_peft": "layers.peft_drop_in",
    "attach": "chain.attach",
    "gelora_ranks": "ranks",
    "load_chain": "chain.attach",
    "restore_peft": "layers.peft_drop_in",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

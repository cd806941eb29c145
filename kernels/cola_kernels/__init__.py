"""Fused LoRA kernels: needs torch (and triton on a GPU), nothing else.

`lora_linear` and `merge_` are the public ops; `reference` holds their specification in plain PyTorch.
"""

from . import reference
from .reference import FoldReport, lora_linear, merge_

__all__ = ["FoldReport", "lora_linear", "merge_", "reference"]

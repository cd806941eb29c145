"""Fused LoRA kernels: needs torch (and triton on a GPU), nothing else.

`lora_linear`, `lora_linear_group` and `merge_` are the public ops; `reference` holds their specification in plain
PyTorch, and `backend` says which of the two runs.
"""

from . import reference
from .linear import lora_linear, lora_linear_group
from .reference import FoldReport, merge_

__all__ = ["FoldReport", "lora_linear", "lora_linear_group", "merge_", "reference"]

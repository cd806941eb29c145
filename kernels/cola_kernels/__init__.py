"""Fused LoRA kernels: needs torch (and triton on a GPU), nothing else.

`lora_linear`, `lora_linear_group` and `merge_` are the public ops; `reference` holds their specification in plain
PyTorch, and `backend` says which of the two runs.
"""

from . import reference
from .nf4 import unpack_nf4_
from .ops import lora_linear, lora_linear_group, merge_, nf4_dequantize, nf4_merge_, nf4_merge_with_carry_
from .reference import FoldReport

__all__ = [
    "FoldReport",
    "lora_linear",
    "lora_linear_group",
    "merge_",
    "nf4_dequantize",
    "nf4_merge_",
    "nf4_merge_with_carry_",
    "reference",
    "unpack_nf4_",
]

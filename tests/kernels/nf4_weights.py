"""Real bitsandbytes weights for the NF4 tests."""

from __future__ import annotations

from typing import Any

import torch

from .conftest import DEVICE


def quantise(
    n: int,
    k: int,
    *,
    blocksize: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    quant_type: str = "nf4",
) -> Any:
    """A Params4bit of shape [n, k], with a block of zeros and blocks of very small values."""
    import bitsandbytes as bnb

    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.05
    dense.view(-1)[:blocksize] = 0
    dense.view(-1)[blocksize : 2 * blocksize] *= 1e-6
    weight = bnb.nn.Params4bit(
        dense.to(dtype),
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    return weight.to(DEVICE)


def dequantised(weight: Any) -> torch.Tensor:
    """By bitsandbytes itself, in the dtype the weight was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)

"""NF4 weights read on a CPU by the compiled loops of bitsandbytes, where it is loaded: `nf4.dequantize` says what they
must give, to the bit, and takes two to three times as long."""

from __future__ import annotations

import torch
from torch import Tensor

from . import nf4
from .nf4 import NF4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)  # its loops of larger blocks are inexact, so it has others for them
LARGER = 16  # tiles than in plain PyTorch: a call has no temporaries but its result


def dequantize(weight: NF4, out: Tensor) -> Tensor:
    """Write W into `out` [N, K], rounded once from fp32. Returns out."""
    ops = torch.ops.bitsandbytes
    if not _reads(weight, out, ops):
        return nf4.dequantize(weight, out)
    absmax, (blocksize, blocksize2) = weight.absmax, weight.layout
    if weight.absmax2 is not None:
        absmax = ops.dequantize_blockwise(absmax, weight.absmax2, weight.table, blocksize2, torch.float32)
        absmax += weight.offset
    for rows in nf4.tiles(weight, larger=LARGER):
        codes, scales = weight.codes[rows], absmax[rows.start * weight.blocks : rows.stop * weight.blocks]
        out[rows] = ops.dequantize_4bit(codes, scales, blocksize, "nf4", [len(codes), out.shape[1]], out.dtype)
    return out


def _reads(weight: NF4, out: Tensor, ops: object) -> bool:
    if out.device.type != "cpu" or torch.compiler.is_compiling():  # a compiler makes a loop of its own
        return False
    known = out.dtype in DTYPES and weight.layout.blocksize in BLOCKSIZES
    return known and hasattr(ops, "dequantize_4bit") and hasattr(ops, "dequantize_blockwise")

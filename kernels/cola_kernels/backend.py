"""Which implementation runs: the one place that reads the environment.

    COLA_KERNELS_BACKEND=auto     Triton on a GPU that can run it, PyTorch elsewhere (the default)
    COLA_KERNELS_BACKEND=triton   Triton or an error; on CPU tensors this needs TRITON_INTERPRET=1
    COLA_KERNELS_BACKEND=torch    PyTorch everywhere
    COLA_KERNELS_TUNED=0          ignore the tuned tables: every launch follows the built-in rules
    COLA_KERNELS_CACHE=DIR        where `python -m cola_kernels.tune` writes; default ~/.cache/cola_kernels

They are read once, at import, so that torch.compile sees constants.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

BACKEND = os.environ.get("COLA_KERNELS_BACKEND", "auto")
if BACKEND not in BACKENDS:
    raise ValueError(f"COLA_KERNELS_BACKEND is {BACKEND!r}, but it must be one of {', '.join(BACKENDS)}.")
TUNED = os.environ.get("COLA_KERNELS_TUNED", "1") != "0"
CACHE = Path(os.environ.get("COLA_KERNELS_CACHE") or Path.home() / ".cache" / "cola_kernels")

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides this when it decorates a kernel, so it is fixed for the process too.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton version of an op takes this tensor.

    Raises:
        RuntimeError: COLA_KERNELS_BACKEND=triton, but Triton cannot run it.
    """
    if BACKEND == "torch":
        return False
    obstacle = _obstacle(tensor)
    if obstacle is None:
        return BACKEND == "triton" or tensor.is_cuda
    if BACKEND == "triton":
        raise RuntimeError(f"COLA_KERNELS_BACKEND=triton, but {obstacle}; unset it to use PyTorch here.")
    return False


def _obstacle(tensor: Tensor) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if tensor.dtype not in TRITON_DTYPES:
        return f"the kernels take bf16, fp16 and fp32, not {tensor.dtype}"
    if tensor.is_cuda:
        # ROCm numbers its architectures from gfx9 on, so they pass.
        if torch.cuda.get_device_properties(tensor.device).major < 8:
            return "the kernels need an NVIDIA GPU of compute capability 8.0 or newer"
        return None
    return None if INTERPRET else f"the tensor is on {tensor.device} and TRITON_INTERPRET is not set"

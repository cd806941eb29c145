"""The NF4 weights of bitsandbytes: how they lie in memory, how they are read, in plain PyTorch.

    W[n, k] = LEVELS[code[n, k]] · absmax[n, k // blocksize]                         one fp32 product, then rounded
    absmax  = table[absmax_code] · absmax2[block // blocksize2] + offset             if the scales are quantised too

NF4 and double quantisation are from Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023. Two
codes share a byte, the even column in its high half. bitsandbytes is not imported: a weight is known by its
`quant_state`, and the values are to the bit those of its own `dequantize_4bit`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_LEVELS = torch.tensor(
    LEVELS, dtype=torch.float32
)  # made while compiling with dynamic=True, each float would become a symbol
TILE_ELEMENTS = 1 << 15  # worked on at a time in fp32, so that all temporaries together stay small
GPU_TILE_ELEMENTS = 1 << 22


class Layout(NamedTuple):
    """What is not a tensor: elements a scale, and scales a second-level scale (0 if the scales are fp32)."""

    blocksize: int
    blocksize2: int


class NF4(NamedTuple):
    """An NF4 weight [N, K], read in place."""

    codes: Tensor  # uint8 [N, K / 2], a view of the weight's storage
    absmax: Tensor  # [N · K / blocksize], fp32 or uint8
    absmax2: Tensor | None  # fp32, one for each blocksize2 scales
    table: Tensor | None  # fp32 [256]
    offset: Tensor | None  # fp32 scalar
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        n, half = self.codes.shape
        return n, 2 * half

    @property
    def blocks(self) -> int:
        """Scales a row."""
        return self.shape[1] // self.layout.blocksize


Weight = Tensor | NF4  # what lora_linear multiplies by, frozen


def as_weight(weight: Tensor) -> Weight:
    """`weight` itself if it is dense, or a view of its codes and scales if it is NF4.

    Raises:
        ValueError: an integer weight without a quant_state, and whatever `read` refuses.
    """
    if hasattr(weight, "quant_state"):
        return read(weight)
    if not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype}, but must be floating point or an NF4 weight of bitsandbytes; "
            "LLM.int8 weights are not supported."
        )
    return weight


def read(weight: Tensor) -> NF4:
    """A view of a bitsandbytes `Params4bit`, or any tensor with such a `quant_state`.

    Raises:
        ValueError: no quant_state, FP4, a shape [N, K] whose rows are not whole blocks, or codes repacked for the CPU.
    """
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)} without a quant_state, but NF4 is wanted: give the weight "
            "of a bitsandbytes Linear4bit that has been moved to its device, which quantises it."
        )
    if state.quant_type != "nf4":
        raise ValueError(f"weight is quantised to {state.quant_type}, but only NF4 is supported: load it as nf4.")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "weight was repacked by bitsandbytes for inference on the CPU, which rounded its scales to bf16: load the "
            "model again, or call unpack_nf4_(weight) to go on with the rounded scales."
        )
    shape, blocksize = tuple(state.shape), int(state.blocksize)
    size = weight.numel() * weight.element_size()  # nbytes cannot be traced once a compiled function saw two shapes
    if len(shape) != 2 or shape[1] % blocksize or 2 * size != shape[0] * shape[1]:
        raise ValueError(
            f"weight is NF4 of shape {list(shape)} in blocks of {blocksize}, {size} bytes, but must be [N, K] "
            "with K a multiple of the block and two elements a byte: choose another block size."
        )
    codes = weight.detach().view(-1).view(torch.uint8).view(shape[0], shape[1] // 2)
    second = getattr(state, "state2", None)
    if second is None:
        return NF4(codes, state.absmax.view(-1), None, None, None, Layout(blocksize, 0))
    layout = Layout(blocksize, int(second.blocksize))
    return NF4(codes, state.absmax.view(-1), second.absmax, second.code, state.offset, layout)


def split(weights: Sequence[Weight]) -> tuple[list[Tensor], list[Tensor | None], tuple[Layout | None, ...]]:
    """Weights as autograd wants its arguments, flat: the main tensor of each, the other tensors, the layouts."""
    mains = [w if isinstance(w, Tensor) else w.codes for w in weights]
    others = [t for w in weights if isinstance(w, NF4) for t in w[1:5]]
    return mains, others, tuple(None if isinstance(w, Tensor) else w.layout for w in weights)


def join(mains: Sequence[Tensor], others: Sequence[Any], layouts: Sequence[Layout | None]) -> list[Weight]:
    """The inverse of `split`."""
    rest = iter(others)
    return [
        main if layout is None else NF4(main, next(rest), next(rest), next(rest), next(rest), layout)
        for main, layout in zip(mains, layouts, strict=True)
    ]


def tiles(weight: NF4, *, larger: int = 1) -> list[slice]:
    """The rows, some at a time: as many as keep the temporaries small, yet a GPU busy; all at once while compiling.
    larger: times as many on a CPU."""
    n, k = weight.shape
    elements = TILE_ELEMENTS * larger if weight.codes.device.type == "cpu" else GPU_TILE_ELEMENTS
    rows = n if torch.compiler.is_compiling() else max(1, elements // k)
    return [slice(first, min(first + rows, n)) for first in range(0, n, rows)]


def scales(weight: NF4, rows: slice) -> Tensor:
    """absmax of some rows: fp32 [rows, K / blocksize]."""
    begin, end = rows.start * weight.blocks, rows.stop * weight.blocks
    absmax = weight.absmax[begin:end]
    if weight.absmax2 is not None and weight.table is not None and weight.offset is not None:
        block = torch.arange(begin, end, device=absmax.device) // weight.layout.blocksize2
        absmax = weight.table[absmax.int()] * weight.absmax2[block] + weight.offset
    return absmax.float().view(-1, weight.blocks)


def unpack(codes: Tensor) -> Tensor:
    """The codes of bytes [rows, K / 2]: uint8 [rows, K]."""
    return torch.stack((codes >> 4, codes & 15), dim=-1).view(codes.shape[0], -1)


def pack(codes: Tensor) -> Tensor:
    """The bytes of codes uint8 [rows, K]: [rows, K / 2]."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def values(codes: Tensor, absmax: Tensor) -> Tensor:
    """What bytes of codes [rows, K / 2] stand for, with absmax [rows, K / blocksize]: fp32 [rows, K].

    A byte's two levels are looked up as one word of 64 bits: a CPU gathers slowly.
    """
    levels = _LEVELS.to(codes.device)
    pairs = torch.stack((levels[:, None].expand(16, 16), levels.expand(16, 16)), dim=-1).view(torch.int64).view(-1)
    found = pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
    return found.view(*absmax.shape, -1).mul_(absmax[:, :, None]).view(codes.shape[0], -1)


def dequantize(weight: NF4, out: Tensor) -> Tensor:
    """Write W into `out` [N, K], any float dtype: rounded once from fp32. Returns out."""
    for rows in tiles(weight, larger=4):  # there are few temporaries here
        out[rows] = values(weight.codes[rows], scales(weight, rows))
    return out


_of_thread = threading.local()


def scratch(weight: NF4, dtype: torch.dtype) -> Tensor:
    """An uninitialised [N, K] to dequantise into and multiply by at once: the next call hands out the same memory.

    On a CPU there is one buffer a thread, as large as the largest weight asked for: fresh memory costs as much as
    filling it. Elsewhere PyTorch's allocator hands freed memory out again, in the order of the stream.
    """
    shape, size = weight.shape, weight.shape[0] * weight.shape[1] * dtype.itemsize
    if weight.codes.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=weight.codes.device)
    buffer = getattr(_of_thread, "scratch", None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, device=weight.codes.device)
        if type(buffer) is Tensor:  # not under FakeTensorMode
            _of_thread.scratch = buffer
    return buffer[:size].view(dtype).view(shape)


def unpack_nf4_(weight: Tensor) -> None:
    """Undo bitsandbytes' repacking of an NF4 weight for inference on the CPU, in place; leave any other as it is.

    On a CPU with AVX512-BF16, a `Linear4bit` repacks its weight when it first runs in eval mode, and trains wrongly
    from then on. The codes come back exactly. The scales do not: bitsandbytes has rounded them to bf16 and thrown the
    second level away, so they stay what it has computed with since, as fp32, one level.

    Raises:
        ValueError: no quant_state, or not NF4.
    """
    state: Any = getattr(weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or not getattr(state, "packing_format_for_cpu", False):
        read(weight)
        return
    with torch.inference_mode(False):  # else what is made here could not be trained with
        _unpack_(weight, state)


def _unpack_(weight: Tensor, state: Any) -> None:
    n, k = state.shape
    # 32 rows lie together. Of the 64 elements that they have in two columns, a byte holds j (low) and j + 32 (high).
    packed = weight.data.view(torch.uint8).view(-1, 32)
    pairs = torch.cat((packed & 15, packed >> 4), dim=1).view(n // 32, k // 2, 32, 2)
    codes = pack(pairs.transpose(1, 2).reshape(n, k))
    flat = codes.view(-1)
    weight.data = flat.view(getattr(state, "original_storage_type", torch.uint8)).view(-1, 1)
    state.absmax = state.absmax.t().reshape(-1).to(torch.float32, copy=True)
    state.nested, state.state2, state.offset = False, None, None
    state.dtype = state.original_dtype
    state.packing_format_for_cpu = False

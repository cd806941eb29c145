"""Calls every op with sizes that a launch compiles another kernel for, as a Hopper GPU would, but runs nothing.

Triton makes a constant of an argument that is 1, and notes which are multiples of 16. What a kernel does with a tensor
it cannot always do with a constant; neither the interpreter nor `cola_kernels.compile`, which is told the types, would
find that out. Prints how many kernels were compiled; raises what the compiler raises.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

import cola_kernels
from cola_kernels import backend, matmul, skinny, small, tuning


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads


class NoGPU:
    """What Triton asks of a driver, of a Hopper GPU on which launches do nothing."""

    utils = Utils()

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *args, **kwargs: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


SHAPES = [(1, 1, 1, 1), (1, 72, 40, 1), (5, 40, 1, 3), (2, 16, 16, 16)]  # M, K, N, R
DROPOUTS = [(0.0, 2**-16), (2**-16,), (0.0,), (0.0, 2**-16)]  # of each shape; 2^-16 is a threshold of 1


def linear(m: int, k: int, n: int, r: int, dtype: torch.dtype, dropout: float) -> None:
    x, a, b = (torch.empty(*shape, dtype=dtype, requires_grad=True) for shape in ((m, k), (r, k), (n, r)))
    bias = None if dropout else torch.empty(n, dtype=dtype)
    y = cola_kernels.lora_linear(x, torch.empty(n, k, dtype=dtype), a, b, 0.5, bias, dropout=dropout, seed=3)
    y.backward(torch.empty(1, dtype=dtype).expand(y.shape))


def gated(m: int, k: int, n: int, r: int) -> None:
    x, a, b = (torch.empty(*shape, requires_grad=True) for shape in ((m, k), (r, k), (n, r)))
    e, c = torch.ones(r, requires_grad=True), torch.ones(n, requires_grad=True)
    cola_kernels.lora_linear(x, torch.empty(n, k), a, b, 0.5, e=e, c=c).sum().backward()


def gemm(k: int, n: int, r: int) -> None:
    """By descriptors, in both directions, which a table may choose."""
    x, dy, w = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((9, k), (9, n), (n, k)))
    u, a, b = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((9, r), (r, k), (n, r)))
    config = next(filter(None, matmul.gemm_configs(tuning.Shape(x.device, x.dtype, 1024, n, 16, False), True)))
    if matmul._describable(w):
        matmul.run_gemm(config, x, w.t(), u, b.t(), 0.5, torch.empty(n, dtype=torch.bfloat16))
    if matmul._describable(dy):
        matmul.run_gemm(config, dy, w, u, a, 0.5, None)


def merge(k: int, n: int, r: int, dtype: torch.dtype, rounding: str) -> None:
    a, b, c = torch.zeros(r, k), torch.zeros(n, r), torch.ones(n)
    cola_kernels.merge_(torch.zeros(n, k, dtype=dtype), a, b, 0.5, rounding=rounding, seed=3, first_row=1)
    cola_kernels.merge_(torch.zeros(n, k, dtype=dtype), a, b, 0.5, rounding=rounding, seed=3, report=True, c=c)


def four_bit(n: int, k: int, nested: bool) -> None:
    from .nf4_weights import quantise

    backend.BACKEND = "torch"
    weight = quantise(n, k, nested=nested)
    backend.BACKEND = "triton"
    cola_kernels.nf4_dequantize(weight, torch.bfloat16)
    for rounding in ("nearest", "stochastic"):
        cola_kernels.nf4_merge_(weight, torch.zeros(1, k), torch.zeros(n, 1), 0.5, rounding=rounding)


def main() -> None:
    driver.set_active(NoGPU())
    backend.BACKEND, backend._obstacle = "triton", lambda tensor: None
    for module in (tuning, matmul, skinny):
        module.is_hopper = lambda device: True
    small.is_small = lambda x, weights: False
    compiled: set[str] = set()
    create = CompiledKernel.__init__

    def counted(self: Any, src: Any, metadata_group: Any, hash: str) -> None:
        create(self, src, metadata_group, hash)
        compiled.add(hash)

    CompiledKernel.__init__ = counted
    for (m, k, n, r), dropouts in zip(SHAPES, DROPOUTS, strict=True):
        for dropout in dropouts:
            linear(m, k, n, r, torch.bfloat16, dropout)
        merge(k, n, r, torch.bfloat16, "stochastic")
        gemm(k, n, r)
    ones = SHAPES[0]
    linear(*ones, torch.float32, 0.05)
    merge(*ones[1:], torch.float32, "nearest")
    gated(*ones)
    for nested in (False, True):
        four_bit(1, 64, nested)
    print(len(compiled))


if __name__ == "__main__":
    main()

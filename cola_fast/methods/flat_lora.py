"""Flat-LoRA: the loss is taken at weights with a little noise, so that training ends in a flat place of all of W."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .registry import PERTURB, Method, register

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import TrainConfig
    from ..layers.layer import LoRALinear

register(
    Method(
        "flat-lora",
        "arXiv 2409.14396",
        "the loss at W + sBA + noise, drawn anew each step; a row's norm is sigma times the merged weight's, and sigma "
        "grows from 0 by a cosine over the run. Ours: it is a term of the forward pass, since a 16-bit weight would "
        "not come back from adding and subtracting. The value of sigma is unverified",
        {"train": {"perturb": "flat-lora", "sigma": 0.05}},
    )
)


@PERTURB.fill("flat-lora")
@contextmanager
def flat_lora(layers: Mapping[str, LoRALinear], done: float, seed: int, config: TrainConfig) -> Iterator[None]:
    """Row i of W' [N, K] gets noise of variance `sigma² |W'_i|² / K`, W' with the open link in it."""
    from ..layers.weight_noise import WeightNoise
    from ..seeds import derive_seed

    sigma = config.sigma * (1 - math.cos(math.pi * done)) / 2
    hooks = [
        layer.register_forward_hook(
            WeightNoise(sigma / layer.in_features**0.5 * _row_norms(layer), derive_seed(seed, name))
        )
        for name, layer in layers.items()
        if sigma > 0 and layer.lora_A is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _row_norms(layer: LoRALinear) -> Tensor:
    """[N], of W'; with DoRA its magnitude is that norm."""
    from ..layers.output_gate import row_norms, row_squares

    if layer.lora_magnitude is not None:
        return layer.lora_magnitude.detach().abs()
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    weight = layer.dense_weight()
    return row_norms(weight, row_squares(weight), layer.lora_A, layer.lora_B, layer.scale, layer.lora_e)

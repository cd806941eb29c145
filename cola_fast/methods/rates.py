"""LoRA+ (rates) and rsLoRA (scale): one number each."""

from __future__ import annotations

import math

from .registry import SCALING, Method, register

register(
    Method(
        "lora+",
        "arXiv 2402.12354",
        "B learns faster than A: `schedule.lr` is A's rate, B's is `lr_ratio` times that",
        {"train": {"lr_ratio": 16.0}},
    ),
    Method("rslora", "arXiv 2312.03732", "scale alpha / sqrt(R)", {"chain": {"scaling": "rslora"}}),
)


@SCALING.fill("rslora")
def rslora(alpha: float, rank: int, r: int) -> float:
    return alpha * math.sqrt(rank)

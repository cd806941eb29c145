"""What does a knot in 16 bits cost?

Tying a trained link of SmolLM2-135M into bf16 weights and opening the next, beside PEFT's way: merge_and_unload,
get_peft_model, a new optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from cola_fast import attach
from cola_fast.commands.demo import demo_config
from cola_fast.config import ModelConfig
from cola_fast.training.models import load_model

from . import harness
from .registry import Options
from .report import Quoted, describe, markdown

ROUNDS = 5


def run(options: Options) -> dict[str, Any]:
    config = replace(demo_config().model, dtype="bf16")
    sides = {"ours": _ours(config), "peft": _peft(config)}
    samples = harness.interleave(
        {name: partial(harness.timed, knot) for name, knot in sides.items()}, rounds=2 if options.quick else ROUNDS
    )
    return harness.summarise(samples, "ours")


def _ours(config: ModelConfig) -> Callable[[], None]:
    chain = attach(load_model(config), r=8, targets="all-linear")

    def knot() -> None:
        _disturb(chain.model)
        chain.tie()
        chain.extend()
        torch.optim.AdamW(chain.parameters())

    return knot


def _peft(config: ModelConfig) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    held = [get_peft_model(load_model(config), settings)]

    def knot() -> None:
        _disturb(held[0])
        held[0] = get_peft_model(held[0].merge_and_unload(), settings)
        torch.optim.AdamW([p for p in held[0].parameters() if p.requires_grad])

    return knot


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """A link that has been trained; the same small work on both sides."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(1e-4)


def quoted(result: Mapping[str, Any]) -> dict[str, Quoted]:
    return {"knot-time": Quoted("cola_fast / PEFT", [result["ratio"]["peft"]["median"]])}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    ours, peft = (harness.Spread(**result["seconds"][name]) for name in ("ours", "peft"))
    ratio = harness.Spread(**result["ratio"]["peft"])
    lines = [
        ["tie, extend, new AdamW", f"{ours.median:.3f} ({ours.q1:.3f} to {ours.q3:.3f})", ""],
        [
            "PEFT: merge_and_unload, get_peft_model, new AdamW",
            f"{peft.median:.3f} ({peft.q1:.3f} to {peft.q3:.3f})",
            f"**{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})**",
        ],
    ]
    table = markdown(["a knot of SmolLM2-135M, 210 linears, bf16", "s", "cola_fast / this"], lines)
    return {"knot-time": f"{table}\n\n{describe(result)}"}

"""How long do a LoRA linear and a whole training step take, beside PEFT and transformers' Trainer?

**Layer**: forward and backward (dX, dA, dB) of the linears of SmolLM2-135M, for four sides:

    frozen      the linear alone, forward and dX: the floor, whatever is above it is the price of LoRA
    ours        LoRALinear; fp32 factors, multiplied in the dtype of x
    peft        PEFT's LoRA Linear as get_peft_model makes it: fp32 adapters, also under a bf16 base, where it casts x
                to fp32, multiplies there, and casts the sum back
    peft_bf16   the same with autocast_adapter_dtype=False, under a bf16 base only: bf16 adapters, which the optimizer
                then updates in bf16. Faster than PEFT's default, and another training

**Step**: see `trainers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_fast.layer import LoRALinear
from cola_fast.models import resolve_dtype

from . import harness, trainers
from .layers import our_noise, peft_layers
from .registry import Options
from .report import describe, markdown

RANK, ALPHA, ROW = 8, 16.0, 32  # ROW: tokens of a sequence
SHAPES = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}  # N, K
IN_A_BLOCK = {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (16 * ROW, 128 * ROW)  # M: the demo's batch, and one that fills the machine
DROPOUTS = (0.0, 0.05)
SAMPLE_SECONDS = 0.02

# relative, of the loss of each of the first steps: from the second on it tells of the gradients, too. In bf16, rounding
# turns the sign of small gradients, which is all that Adam's first step looks at.
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}


def run(options: Options) -> dict[str, Any]:
    return {"layer": _layers(options.quick), "step": _steps(options.quick)}


# --- layer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A LoRA linear. `noise(x)` is what dropout will multiply x by, if torch's generator is as it is now."""

    layer: Callable[[Tensor], Tensor]
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    noise: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    x: Tensor  # [B, T, K], wants a gradient
    dy: Tensor  # [B, T, N]
    weight: Tensor  # [N, K]
    a: Tensor  # [R, K] fp32
    b: Tensor  # [N, R] fp32

    @classmethod
    def draw(cls, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> Case:
        n, k = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        x, dy = normal(tokens // ROW, ROW, k), normal(tokens // ROW, ROW, n)
        weight, a, b = normal(n, k) / math.sqrt(k), normal(RANK, k) / math.sqrt(k), normal(n, RANK) / math.sqrt(n)
        x, dy, weight = (t.to(harness.device(), dtype) for t in (x, dy, weight))
        return cls(x.requires_grad_(), dy, weight, a.to(x.device), b.to(x.device))

    def linear(self) -> nn.Linear:
        n, k = self.weight.shape
        linear = nn.Linear(k, n, bias=False, device=self.weight.device, dtype=self.weight.dtype)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear


def ours(case: Case, dropout: float) -> Side:
    layer = LoRALinear.from_linear(case.linear())
    layer.open(case.a.clone(), case.b.clone(), scale=ALPHA / RANK, dropout=dropout)
    assert layer.lora_A is not None
    assert layer.lora_B is not None

    return Side(layer, layer.lora_A, layer.lora_B, partial(our_noise, dropout=dropout))


def peft(case: Case, dropout: float, *, fp32_adapters: bool = True) -> Side:
    (layer,) = peft_layers([case.linear()], [(case.a, case.b)], ALPHA, dropout, fp32_adapters=fp32_adapters)
    return Side(layer.module, layer.lora_a, layer.lora_b, layer.noise)


def passes(side: Side, case: Case) -> dict[str, Tensor]:
    """One forward and one backward pass: y, dX, dA, dB."""
    y = side.layer(case.x)
    return _named(y, torch.autograd.grad(y, (case.x, side.lora_a, side.lora_b), case.dy))


def plain(case: Case, noise: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula in plain PyTorch, everything in `dtype`: the truth in fp64, and the yardstick in the side's own."""
    x, a, b = (t.detach().to(dtype).requires_grad_() for t in (case.x, case.a, case.b))
    y = F.linear(x, case.weight.to(dtype)) + ALPHA / RANK * F.linear(F.linear(x * noise.to(dtype), a), b)
    return _named(y, torch.autograd.grad(y, (x, a, b), case.dy.to(dtype)))


def check(what: str, side: Side, case: Case) -> dict[str, float]:
    """The parity gate for one side: against fp64 with the very same dropout mask."""
    torch.manual_seed(0)
    noise = side.noise(case.x.detach())
    torch.manual_seed(0)
    found = passes(side, case)
    return harness.require_parity(what, found, plain(case, noise, case.x.dtype), plain(case, noise, torch.float64))


def _named(y: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("y", "dX", "dA", "dB"), (y.detach(), *gradients), strict=True))


def _sides(case: Case, dropout: float) -> dict[str, Side]:
    sides = {"ours": ours(case, dropout), "peft": peft(case, dropout)}
    if case.x.dtype == torch.bfloat16:
        sides["peft_bf16"] = peft(case, dropout, fp32_adapters=False)
    return sides


def _layers(quick: bool) -> list[dict[str, Any]]:
    cases = list(product(DTYPES, DROPOUTS, TOKENS[:1] if quick else TOKENS, SHAPES))
    rows = []
    for number, case in enumerate(cases, 1):
        harness.say(f"layer {number} of {len(cases)}")
        rows.append(_layer(*case, rounds=3 if quick else 15))
    return rows


def _layer(dtype: str, dropout: float, tokens: int, shape: str, *, rounds: int) -> dict[str, Any]:
    case = Case.draw(SHAPES[shape], tokens, DTYPES[dtype])
    sides = _sides(case, dropout)
    what = f"{shape}, {dtype}, dropout {dropout}, {tokens} tokens"
    parity = {name: check(f"{name}: {what}", side, case) for name, side in sides.items()}
    linear = case.linear()

    def frozen() -> None:
        torch.autograd.grad(linear(case.x), case.x, case.dy)

    work: dict[str, Callable[[], object]] = {"frozen": frozen}
    work |= {name: partial(passes, side, case) for name, side in sides.items()}
    samples = harness.sample(work, rounds=rounds, seconds=SAMPLE_SECONDS)
    return {
        "dtype": dtype,
        "dropout": dropout,
        "tokens": tokens,
        "shape": shape,
        "parity": parity,
        **harness.summarise(samples, "ours"),
    }


# --- whole step -------------------------------------------------------------------------------------------------------


def _steps(quick: bool) -> dict[str, Any]:
    harness.say("the losses of both trainers")
    gate_steps = 2 if quick else 4
    parity = {
        dtype: _same_losses(trainers.Problem(gate_steps, dtype), tolerance) for dtype, tolerance in TOLERANCES.items()
    }
    problem = trainers.Problem(3 if quick else 6, "auto")

    def side(train: Callable[[trainers.Problem], trainers.Times]) -> float:
        return train(problem).seconds / (problem.steps - 1)

    sides = {"ours": trainers.ours, "ours_all_logits": trainers.ours_all_logits, "peft": trainers.theirs}
    harness.say("both trainers, timed")
    samples = harness.interleave(
        # a run's first step is its warm-up
        {name: partial(side, train) for name, train in sides.items()},
        rounds=1 if quick else 7,
        warmup=0,
    )
    return {
        "dtype": str(resolve_dtype(problem.config.model.dtype, harness.device())).removeprefix("torch."),
        "attention": problem.attention,
        "parity": parity,
        "tokens_per_step": problem.tokens / (problem.steps - 1),
        "timed_steps": problem.steps - 1,
        **harness.summarise(samples, "ours"),
    }


def _same_losses(problem: trainers.Problem, tolerance: float) -> dict[str, Any]:
    """The parity gate for a step, gradients, clipping and optimizer included."""
    losses = {each.__name__: each(problem, each_loss=True).losses for each in (trainers.ours, trainers.theirs)}
    worst = harness.require_close("The losses of the first steps", *losses.values(), tolerance=tolerance)
    return {**losses, "difference": worst, "allowed": tolerance}


# --- tables -----------------------------------------------------------------------------------------------------------

NAMES = {
    "ours": "cola_fast",
    "ours_all_logits": "cola_fast, made to compute all logits",
    "peft": "transformers Trainer + PEFT",
}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    return {
        "step_time-layer": f"{_layer_table(result['layer'])}\n\n{_LAYER_NOTE} {describe(result)}",
        "step_time-shapes": f"{_shape_table(result['layer'])}\n\n{describe(result)}",
        "step_time-step": f"{_step_table(result['step'])}\n\n{_step_note(result['step'])} {describe(result)}",
    }


_LAYER_NOTE = (
    "Forward and backward of the seven linears of a SmolLM2-135M block, R = 8, fp32 adapters (PEFT's default) on both "
    "sides; last column: PEFT with bf16 adapters. Medians; ratios of interleaved pairs, with quartiles; worst: the "
    "least favourable shape of the four."
)


def _layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A whole block: each round's times of the four shapes, added up as often as a block has them."""
    lines = []
    for dtype, dropout, tokens in dict.fromkeys((r["dtype"], r["dropout"], r["tokens"]) for r in rows):
        shapes = [r for r in rows if (r["dtype"], r["dropout"], r["tokens"]) == (dtype, dropout, tokens)]
        block = {
            name: [
                sum(IN_A_BLOCK[r["shape"]] * r["samples"][name][i] for r in shapes)
                for i in range(len(shapes[0]["samples"][name]))
            ]
            for name in shapes[0]["samples"]
        }
        against = {name: harness.Spread.of_ratio(block["ours"], block[name]) for name in block if name != "ours"}
        worst = max(shapes, key=lambda r: r["ratio"]["peft"]["median"])
        lines.append(
            [
                f"{dtype}, dropout {dropout:g}, M = {tokens}",
                *(f"{1e3 * harness.Spread.of(block[name]).median:.2f}" for name in ("frozen", "ours", "peft")),
                _ratio(against["frozen"]),
                f"**{_ratio(against['peft'])}**",
                f"{worst['ratio']['peft']['median']:.2f} ({worst['shape']})",
                _ratio(against["peft_bf16"]) if "peft_bf16" in against else "",
            ]
        )
    header = ["", "frozen, ms", "ours, ms", "PEFT, ms", "ours / frozen", "ours / PEFT", "worst", "ours / PEFT bf16"]
    return markdown(header, lines)


def _shape_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            f"{r['dtype']}, dropout {r['dropout']:g}, M = {r['tokens']}: {r['shape']}",
            "{} x {}".format(*SHAPES[r["shape"]]),
            *(f"{1e3 * r['seconds'][name]['median']:.2f}" for name in ("frozen", "ours", "peft")),
            _ratio(harness.Spread(**r["ratio"]["peft"])),
        ]
        for r in rows
    ]
    return markdown(["", "N x K", "frozen, ms", "ours, ms", "PEFT, ms", "ours / PEFT"], lines)


def _step_table(step: Mapping[str, Any]) -> str:
    lines = []
    for name, title in NAMES.items():
        seconds = harness.Spread(**step["seconds"][name])
        lines.append(
            [
                title,
                f"{seconds.median:.3f} ({seconds.q1:.3f} to {seconds.q3:.3f})",
                f"{step['tokens_per_step'] / seconds.median:,.0f}",
                "" if name == "ours" else f"**{_ratio(harness.Spread(**step['ratio'][name]))}**",
            ]
        )
    return markdown(["", "s / step", "tokens / s", "cola_fast / this"], lines)


def _step_note(step: Mapping[str, Any]) -> str:
    agreed = " and ".join(f"{p['difference']:.0e} in {dtype}" for dtype, p in step["parity"].items())
    steps = len(step["parity"]["fp32"]["ours"])
    return (
        f"SmolLM2-135M on the demo's sentences, {step['dtype']} with fp32 adapters on all linears, "
        f"{step['attention']} attention, "
        f"{step['tokens_per_step']:.0f} tokens a step, the same batches, optimizer and clipping in all; "
        f"{len(step['samples']['ours'])} interleaved runs of {step['timed_steps']} timed steps. Before any timing, the "
        f"losses of the first {steps} steps agreed to {agreed} (relative)."
    )


def _ratio(spread: harness.Spread) -> str:
    return f"{spread.median:.2f} ({spread.q1:.2f} to {spread.q3:.2f})"

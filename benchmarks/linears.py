"""How long do the LoRA linears of a small model take on a CPU, beside PEFT's?

Forward and backward (dX, dA, dB) of the linears of SmolLM2-135M, one by one, for four sides:

    frozen      the linear alone, forward and dX: the floor, whatever is above it is the price of LoRA
    ours        LoRALinear; fp32 factors, multiplied in the dtype of x
    peft        PEFT's LoRA Linear as get_peft_model makes it: fp32 adapters, also under a bf16 base, where it casts x
                to fp32, multiplies there, and casts the sum back
    peft_bf16   the same with autocast_adapter_dtype=False, under a bf16 base only: bf16 adapters, which the optimizer
                then updates in bf16. Faster than PEFT's default, and another training

In bf16 and fp32; in fp32 alone on a CPU without instructions for bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_fast.layers.layer import LoRALinear

from . import harness
from .charts import Bar, Chart
from .layers import our_noise, peft_layers
from .registry import Options
from .report import Quoted, describe, markdown, spread

RANK, ALPHA, ROW = 8, 16.0, 32  # ROW: tokens of a sequence
SHAPES = {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}  # N, K
IN_A_BLOCK = {"q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (16 * ROW, 128 * ROW)  # M: the demo's batch, and one that fills the machine
DROPOUTS = (0.0, 0.05)
SAMPLE_SECONDS = 0.02


def run(options: Options) -> dict[str, Any]:
    return {"rows": _layers(options.quick)}


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


def all_sides(case: Case, dropout: float) -> dict[str, Side]:
    sides = {"ours": ours(case, dropout), "peft": peft(case, dropout)}
    if case.x.dtype == torch.bfloat16:
        sides["peft_bf16"] = peft(case, dropout, fp32_adapters=False)
    return sides


def _layers(quick: bool) -> list[dict[str, Any]]:
    dtypes = dict.fromkeys((harness.native_dtype(), "fp32"))
    cases = list(product(dtypes, DROPOUTS, TOKENS[:1] if quick else TOKENS, SHAPES))
    rows = []
    for number, case in enumerate(cases, 1):
        harness.say(f"layer {number} of {len(cases)}")
        rows.append(_layer(*case, rounds=3 if quick else 15))
    return rows


def _layer(dtype: str, dropout: float, tokens: int, shape: str, *, rounds: int) -> dict[str, Any]:
    case = Case.draw(SHAPES[shape], tokens, DTYPES[dtype])
    sides = all_sides(case, dropout)
    what = f"{shape}, {dtype}, dropout {dropout}, {tokens} tokens"
    parity = {name: check(f"{name}: {what}", side, case) for name, side in sides.items()}
    linear = case.linear()

    def frozen() -> None:
        torch.autograd.grad(linear(case.x), case.x, case.dy)

    work: dict[str, Callable[[], object]] = {"frozen": frozen}
    work |= {name: partial(passes, side, case) for name, side in sides.items()}
    samples = harness.sample(work, rounds=rounds, seconds=SAMPLE_SECONDS)
    return {
        "case": what,
        "dtype": dtype,
        "dropout": dropout,
        "tokens": tokens,
        "shape": shape,
        "parity": parity,
        **harness.summarise(samples, "ours"),
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    return {
        "linears-block": f"{_block_table(result['rows'])}\n\n{_BLOCK_NOTE} {describe(result)}",
        "linears-shapes": f"{_shape_table(result['rows'])}\n\n{describe(result)}",
    }


def quoted(result: Mapping[str, Any]) -> dict[str, Quoted]:
    ratios = [harness.Spread.of_ratio(block["ours"], block["peft"]).median for _, _, block in _blocks(result["rows"])]
    return {"linears-block": Quoted("ours / PEFT", ratios)}


_BLOCK_NOTE = (
    "Forward and backward of the seven linears of a SmolLM2-135M block, R = 8, fp32 adapters (PEFT's default) on both "
    "sides; last column: PEFT with bf16 adapters. Medians; ratios of interleaved pairs, with quartiles; worst: the "
    "least favourable shape of the four."
)


def _blocks(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]], dict[str, list[float]]]]:
    """A whole block: each round's times of the four shapes, added up as often as a block has them."""
    for dtype, dropout, tokens in dict.fromkeys((r["dtype"], r["dropout"], r["tokens"]) for r in rows):
        shapes = [r for r in rows if (r["dtype"], r["dropout"], r["tokens"]) == (dtype, dropout, tokens)]
        block = {
            name: [
                sum(IN_A_BLOCK[r["shape"]] * r["samples"][name][i] for r in shapes)
                for i in range(len(shapes[0]["samples"][name]))
            ]
            for name in shapes[0]["samples"]
        }
        yield f"{dtype}, dropout {dropout:g}, M = {tokens}", shapes, block


def _block_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name, shapes, block in _blocks(rows):
        against = {side: harness.Spread.of_ratio(block["ours"], block[side]) for side in block if side != "ours"}
        ratios = {side: spread(asdict(ratio)) for side, ratio in against.items()}
        worst = max(shapes, key=lambda r: r["ratio"]["peft"]["median"])
        lines.append(
            [
                name,
                *(f"{1e3 * harness.Spread.of(block[side]).median:.2f}" for side in ("frozen", "ours", "peft")),
                ratios["frozen"],
                f"**{ratios['peft']}**",
                f"{worst['ratio']['peft']['median']:.2f} ({worst['shape']})",
                ratios.get("peft_bf16", ""),
            ]
        )
    header = ["", "frozen, ms", "ours, ms", "PEFT, ms", "ours / frozen", "ours / PEFT", "worst", "ours / PEFT bf16"]
    return markdown(header, lines)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    titles = {"ours": "cola_fast", "peft": "PEFT, fp32 adapters", "peft_bf16": "PEFT, bf16 adapters"}
    rows = []
    for name, _, block in _blocks(result["rows"]):
        above = {side: harness.Spread.of_ratio(block[side], block["frozen"]) for side in titles if side in block}
        rows.append((name, [Bar(titles[side], r.median, r.q1, r.q3) for side, r in above.items()]))
    title = "The linears of a SmolLM2-135M block, forward and backward"
    return [Chart(title, "time / the frozen linears' time", rows, floor=(1.0, "the frozen linears alone"))]


def _shape_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            f"{r['dtype']}, dropout {r['dropout']:g}, M = {r['tokens']}: {r['shape']}",
            "{} x {}".format(*SHAPES[r["shape"]]),
            *(f"{1e3 * r['seconds'][name]['median']:.2f}" for name in ("frozen", "ours", "peft")),
            spread(r["ratio"]["peft"]),
        ]
        for r in rows
    ]
    return markdown(["", "N x K", "frozen, ms", "ours, ms", "PEFT, ms", "ours / PEFT"], lines)

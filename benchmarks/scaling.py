"""What the costs of a chain come to by their formulas, for shapes that were not measured. Computed, never timed.

Letters: M tokens, K in_features, N out_features, R rank of the open link, L rank of all tied links in a ledger.

    frozen linear       forward and dX                    4 M N K FLOPs
    open link           S, sS Bᵀ, dS, dX, dA, dB          6 M R (N + K), and at least 2 M N + 4 M K bytes in 16 bits:
                        x is read for S and for dA, dY for dS and dB together
    ledger              the same without dA and dB        4 M L (N + K); 2 L (N + K) bytes, in 16 bits
    fold                B A, and each weight once         2 N K R FLOPs, 4 N K bytes in 16 bits; nothing afterwards

Seconds are the larger of FLOPs over the arithmetic peak and bytes over the bandwidth of the data sheet: no run reaches
them, so they are floors, and only their ratios are of use.
"""

from __future__ import annotations

from typing import NamedTuple

from .report import markdown
from .workloads import SHAPES

NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes a weight, double quantisation
RANK = 16
GB = 1e9


class Device(NamedTuple):
    name: str
    flops: float  # bf16, dense, a second
    bandwidth: float  # bytes a second
    memory: float  # bytes
    link: float  # bytes a second to the other GPUs of a machine, one way


H200 = Device("H200 (data sheet: 989 TFLOP/s, 4.8 TB/s, 141 GB, NVLink 450 GB/s one way)", 989e12, 4.8e12, 141e9, 450e9)
MODELS = {
    **{name: shape for name, shape in SHAPES.items() if name != "tiny"},
    "Llama-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


class Model(NamedTuple):
    """Numbers of parameters."""

    linears: list[tuple[int, int]]  # N, K of each linear of one block
    blocks: int
    hidden: int
    weights: int  # of all blocks' linears
    embeddings: int  # with the head

    @classmethod
    def named(cls, name: str) -> Model:
        s = MODELS[name]
        hidden, inner = s["hidden_size"], s["intermediate_size"]
        kv = hidden * s["num_key_value_heads"] // s["num_attention_heads"]
        linears = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        linears += [(inner, hidden), (inner, hidden), (hidden, inner)]
        blocks = s["num_hidden_layers"]
        embeddings = hidden * s["vocab_size"] * (1 if s["tie_word_embeddings"] else 2)
        return cls(linears, blocks, hidden, blocks * sum(n * k for n, k in linears), embeddings)

    def link(self, rank: int) -> int:
        return self.blocks * sum(rank * (n + k) for n, k in self.linears)

    @property
    def break_even(self) -> float:
        """The rank at which factors of all linears multiply as slowly as the linears themselves."""
        return self.weights / self.link(1)


def tables() -> dict[str, str]:
    return {
        "scaling-linear": f"{_linears()}\n\nComputed for bf16, {H200.name}.",
        "scaling-links": f"{_links()}\n\nComputed; R = {RANK} on all linears, 16-bit ledger.",
        "scaling-models": f"{_models()}\n\nComputed; R = {RANK} on all linears, fp32 factors and AdamW.",
        "scaling-gpus": f"{_gpus()}\n\nComputed for 4,096 tokens on each GPU, {H200.name}.",
    }


def _linears() -> str:
    """The price of an open link over its frozen linear, from both bounds."""
    lines = []
    for n, k in ((2048, 2048), (4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192)):
        for m in (512, 8192):
            floor = max(4 * m * n * k / H200.flops, (2 * n * k * 2 + 4 * m * (n + k)) / H200.bandwidth)
            prices = []
            for rank in (8, 16, 64):
                traffic = (2 * m * n + 4 * m * k) / H200.bandwidth
                prices.append(f"{max(6 * m * rank * (n + k) / H200.flops, traffic) / floor:.1%}")
            lines.append([f"N = {n}, K = {k}, M = {m}", f"{1e6 * floor:.0f}", *prices])
    return markdown(["", "frozen linear, us", *(f"link of R = {rank}" for rank in (8, 16, 64))], lines)


def _links() -> str:
    """What tied links cost, kept in a ledger or folded, by their number."""
    lines = []
    for name in ("Llama-1B", "Llama-8B", "Llama-70B"):
        model = Model.named(name)
        for links in (1, 3, 7, 15, 31):
            rank = links * RANK
            lines.append(
                [
                    f"{name}, {links} tied",
                    f"{rank / model.break_even:.1%}",
                    f"{2 * model.link(rank) / GB:.2f}",
                    f"{2 * model.link(rank) / (NF4 * model.weights):.1%}",
                    f"{4 * model.link(rank) / GB:.2f}",
                ]
            )
    header = ["", "ledger: more FLOPs a step", "ledger, GB", "of the NF4 weights", "on disk (fp32), GB"]
    return markdown(header, lines)


def _models() -> str:
    """Memory without activations, and the ranks at which a ledger stops paying."""
    lines = []
    for name in MODELS:
        model = Model.named(name)
        trained = model.link(RANK)
        full = 2 * model.embeddings
        lines.append(
            [
                name,
                f"{(model.weights + model.embeddings) / GB:.2f}",
                f"{(2 * model.weights + full) / GB:.1f}",
                f"{(NF4 * model.weights + full) / GB:.1f}",
                f"{16 * trained / GB:.2f}",
                f"{model.break_even:,.0f}",
                f"{(2 - NF4) * model.weights / (2 * model.link(1)):,.0f}",
            ]
        )
    header = ["", "parameters, 10^9", "bf16, GB", "NF4, GB", "link with AdamW, GB"]
    return markdown(
        [*header, "L where the ledger doubles the FLOPs", "L where NF4 + ledger is as large as bf16"], lines
    )


def _gpus() -> str:
    """8B and 70B on one GPU and on eight: what has to fit, what has to travel."""
    tokens, lines = 4096, []
    for name in ("Llama-8B", "Llama-70B"):
        model = Model.named(name)
        compute = tokens * 4 * (model.weights + model.embeddings / 2) / H200.flops
        kept = 2 * tokens * model.hidden * model.blocks  # with checkpointing: what enters each block
        state = 16 * model.link(RANK)
        for base, size in (("bf16", 2.0), ("NF4", NF4)):
            weights = size * model.weights + 2 * model.embeddings
            gradients = 2 * 7 / 8 * 4 * model.link(RANK)
            plans = {
                "1 GPU": (weights + state + kept, 0.0),
                "8, replicated": (weights + state + kept, gradients),
                "8, sharded": ((weights + state) / 8 + kept, gradients + 2 * 7 / 8 * weights),
            }
            for plan, (held, moved) in plans.items():
                fits = "" if held < H200.memory else " (does not fit)"
                lines.append(
                    [
                        f"{name} {base}, {plan}",
                        f"{held / GB:.1f}{fits}",
                        f"{1e3 * compute:.0f}",
                        f"{moved / GB:.2f}",
                        f"{1e3 * moved / H200.link:.0f}",
                        f"{1e3 * _fold(model, size) / (8 if 'sharded' in plan else 1):.0f}",
                    ]
                )
    header = ["", "held a GPU, GB", "arithmetic a step, ms", "moved a GPU and step, GB", "over NVLink, ms", "fold, ms"]
    return markdown(header, lines)


def _fold(model: Model, size: float) -> float:
    """Seconds to read and write every weight once."""
    return max(2 * size * model.weights / H200.bandwidth, 2 * model.weights * RANK / H200.flops)

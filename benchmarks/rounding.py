"""How much of a young link reaches the outputs of 16-bit layers?

A link starts at B = 0, so that its term of Y is at first far below half the spacing of Y's 16-bit values. Whoever
rounds x Wᵀ and then adds the term mostly gets the same Y back; dX alike. For terms of several sizes: the share that is
in what a layer returns, by projection on the exact term. 1 is all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import linears
from .linears import ALPHA, RANK, Case
from .registry import Options
from .report import describe, markdown

SIZES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # norm of the term over that of x Wᵀ
SHAPE, TOKENS = (1536, 576), 512
QUICK = (256, 256), 512
TITLES = {"ours": "cola_fast", "peft": "PEFT, fp32 adapters", "peft_bf16": "PEFT, bf16 adapters"}


def run(options: Options) -> dict[str, Any]:
    """In bf16, whatever the device multiplies: this is about rounding, not time."""
    shape, tokens = QUICK if options.quick else (SHAPE, TOKENS)
    case = Case.draw(shape, tokens, torch.bfloat16)
    parity = {name: linears.check(name, side, case) for name, side in linears.all_sides(case, 0.0).items()}
    rows = [_row(case, size) for size in SIZES[:: 4 if options.quick else 1]]
    return {"parity": parity, "shape": shape, "tokens": tokens, "rows": rows}


def _row(case: Case, size: float) -> dict[str, Any]:
    frozen, term = _parts(case)
    case = replace(case, b=case.b * (size * float(frozen["y"].norm() / term["y"].norm())))
    frozen, term = _parts(case)
    kept = {}
    for name, side in linears.all_sides(case, 0.0).items():
        found = linears.passes(side, case)
        kept[name] = {what: _share(found[what].double() - frozen[what], term[what]) for what in term}
    return {"size": size, "of_dx": float(term["dX"].norm() / frozen["dX"].norm()), "kept": kept}


def _parts(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of Y and dX, in fp64: what the frozen weight gives, and the link's term."""
    x, dy, weight, a, b = (t.detach().double() for t in (case.x, case.dy, case.weight, case.a, case.b))
    frozen = {"y": x @ weight.t(), "dX": dy @ weight}
    scale = ALPHA / RANK
    return frozen, {"y": scale * (x @ a.t() @ b.t()), "dX": scale * (dy @ b @ a)}


def _share(change: Tensor, term: Tensor) -> float:
    return float((change * term).sum() / term.square().sum())


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    sides = [name for name in TITLES if name in result["rows"][0]["kept"]]
    header = ["the term over the rest, in Y", *(f"{TITLES[name]}: Y" for name in sides)]
    header += ["in dX", *(f"{TITLES[name]}: dX" for name in sides)]
    lines = []
    for row in result["rows"]:
        shares = {what: [f"{row['kept'][name][what]:.2f}" for name in sides] for what in ("y", "dX")}
        lines.append([f"{row['size']:g}", *shares["y"], f"{row['of_dx']:.0e}", *shares["dX"]])
    (n, k), tokens = result.get("shape", SHAPE), result.get("tokens", TOKENS)
    note = f"One linear, {n} x {k}, bf16, R = {RANK}, {tokens} tokens, random weights and inputs; share of the term."
    return {"rounding": f"{markdown(header, lines)}\n\n{note} {describe(result)}"}

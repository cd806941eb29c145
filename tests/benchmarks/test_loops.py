"""The machine code of the kernels asks of a GPU no more than memory's speed leaves it: no GPU is needed to see that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import loops


def test_the_longest_loop() -> None:
    code = [
        (0x00, "MOV R1, c[0x0][0x28]"),
        (0x10, "SYNCS.PHASECHK"),
        (0x20, "@!P0 BRA 0x10"),
        (0x30, "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P2"),
        (0x40, "HMMA.16816.F32.BF16 R8, R12, R18, R8"),
        (0x50, "FADD R1, R1, R2"),
        (0x60, "@P1 BRA 0x30"),
        (0x70, "BRA 0x70"),
    ]
    assert loops.longest_loop(code) == [text for _, text in code[3:7]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LDSM.16.M88.4 R4, [R2]", 512),
        ("@P0 LDSM.16.MT88.2 R4, [R2]", 256),
        ("STSM.16.M88 [R2], R4", 128),
        ("LDS.128 R4, [R2+UR4]", 512),
        ("LDS.U16 R4, [R2]", 64),
        ("@!P1 STS [R2], R4", 128),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P2", 512),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4].tnspB, R24", (64 * 16 + 16 * 16) * 2 / 4),
        ("HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24", 16 * 16 * 2 / 4),
        ("LDG.E.128 R4, desc[UR4][R2.64]", 0),
        ("FFMA R4, R5, R6, R7", 0),
    ],
)
def test_bytes_of_shared_memory(text: str, expected: float) -> None:
    assert loops.shared_bytes(text) == expected


def test_the_smallest_ratio_bounds() -> None:
    budget = 2 / loops.MEMORY_A_CYCLE * 128  # what a processor can start, or move, while memory delivers 2 bytes
    assert loops.Cost(budget / 2, budget / 2, 2).share(2) == pytest.approx(1)
    assert loops.Cost(2 * budget, 0, 2).share(2) == pytest.approx(1 / 2)
    assert loops.Cost(0, 4 * budget, 2).share(2) == pytest.approx(1 / 4)
    assert loops.Cost(0, 0, 2.5).share(2) == pytest.approx(0.8)


def test_no_rule_stands_in_memorys_way(tmp_path: Path) -> None:
    """What a GPU without a tuned table runs. A tile that every warp loads, or a mask made four times, fall below."""
    out = tmp_path / "loops.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # there is nothing to compile in it
    command = [sys.executable, "-m", "benchmarks", "run", "loops", "--quick", "--out", str(out)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    best: dict[str, float] = {}
    for row in rows:  # of the rules for few tokens and for many
        best[row["name"]] = max(row["share"], best.get(row["name"], 0))
    assert {"project", "project, dropout", "output_grads", "factor_grad, dropout", "seed, dropout"} < set(best)
    least = {"output_grads": 0.79, "seed, dropout": 0.8, "merge, stochastic, report": 0.75}
    assert {name: share for name, share in best.items() if share < least.get(name, 0.95)} == {}
    assert min(row["share"] for row in rows) > 0.6

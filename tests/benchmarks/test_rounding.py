"""The suite of what 16 bits keep of a young link."""

from __future__ import annotations

from benchmarks import rounding
from benchmarks.registry import Options


def test_ours_keeps_what_peft_rounds_away() -> None:
    smallest, largest = rounding.run(Options(quick=True))["rows"]
    for what in ("y", "dX"):
        assert abs(smallest["kept"]["ours"][what] - 1) < 0.1
        assert smallest["kept"]["peft"][what] < 0.3
        assert all(abs(kept[what] - 1) < 0.05 for kept in largest["kept"].values())

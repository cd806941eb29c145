"""What an arm costs: the counters behind the figures, and the table."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from benchmarks import harness, quality_cost
from benchmarks.quality_arms import ARMS

# without a GPU the peak is that of the process, which only Linux lets us read and reset
on_linux = pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own counters"
)


@on_linux
def test_the_peak_is_of_the_steps_alone() -> None:
    size = 200 * quality_cost.MIB
    _fill(size)  # before, and gone
    quality_cost._forget_peak()
    before = quality_cost._resident("VmRSS")
    assert quality_cost._peak() - before < 0.2 * size
    _fill(size)
    assert 0.9 * size < quality_cost._peak() - before < 1.1 * size


def _fill(size: int) -> None:
    """Memory of the system's own: PyTorch might be given some that an earlier test has left in the process."""
    memory = mmap.mmap(-1, size)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def test_the_table_sets_every_arm_beside_lora() -> None:
    row = {"model": "minilm", "seconds": [], "trained": 1000, "peak": 300 * quality_cost.MIB}
    rows = [{**row, "arm": "lora", "step": 0.1, "knot": None}, {**row, "arm": "cola-3", "step": 0.11, "knot": 0.05}]
    result = {"rows": rows, "environment": harness.environment(), "quick": False}
    table = quality_cost.tables(result)["quality_cost-steps"]
    assert f"| MiniLM, {ARMS['lora'].label} | 1,000 | 100 | 1.00 |  | 300 |" in table
    assert f"| MiniLM, {ARMS['cola-3'].label} | 1,000 | 110 | 1.10 | 50 | 300 |" in table

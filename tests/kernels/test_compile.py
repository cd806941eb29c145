"""Ahead-of-time compilation: a few rows here, in a process that does not interpret; CI runs the whole table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from cola_kernels import compile as aot


def run(*arguments: str, module: str = "cola_kernels.compile", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore", **variables}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_compiles_without_a_gpu(tmp_path):
    output = tmp_path / "aot.json"
    result = run("--targets", "sm_90", "--only", "sum", "--jobs", "1", "--output", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_90: 2 compiled, 0 failed" in result.stdout
    rows = json.loads(output.read_text())["rows"]
    assert [row[0] for row in rows] == ["sm_90"] * 2
    assert all(registers > 0 and not spilled and not failure for _, registers, spilled, _, _, failure in rows)


def test_a_bad_row_fails_the_run():
    """More shared memory than the target has, told without compiling anything else."""
    program = (
        "import sys; from cola_kernels import compile as aot\n"
        "case = next(c for c in aot.cases() if c.name == 'project')\n"
        "aot.SHARED_LIMITS['sm_90'] = 1\n"
        "row = aot.check(case, 'sm_90')\n"
        "assert 'EXCEEDS 1 bytes' in row.failure and row.failure in str(row), row\n"
        "row = aot.check(case._replace(constants={}), 'sm_90')\n"
        "assert 'FAILED' in row.failure and row.usage is None and row.failure in str(row), row\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_record_is_believed_of_the_same_sources_and_compiler_only(tmp_path, monkeypatch):
    row = aot.Row("sm_90", "sum fp32", aot.Usage(40, 0, 1024), "")
    path = tmp_path / f"aot-triton-{'.'.join(aot.triton.__version__.split('.')[:2])}.json"
    aot.write(path, [row, row._replace(target="sm_80", failure="SPILLS")])
    assert aot.recorded(tmp_path, ["sm_90"]) == [row]
    assert aot.recorded(tmp_path, ["sm_90", "sm_100"]) is None
    arguments = ["--recorded", str(tmp_path), "--targets"]
    assert [aot.main([*arguments, targets]) for targets in ("sm_90", "sm_90,sm_80")] == [0, 1]
    monkeypatch.setattr(aot, "sources", lambda: "0" * 64)
    assert aot.recorded(tmp_path, ["sm_90"]) is None
    monkeypatch.undo()
    monkeypatch.setattr(aot.triton, "__version__", aot.triton.__version__ + ".1")
    assert aot.recorded(tmp_path, ["sm_90"]) is None


def test_unknown_target_is_named():
    result = run("--targets", "sm_75")
    assert result.returncode == 2
    assert "sm_75" in result.stderr


def test_the_table_holds_every_kernel_and_few_configurations():
    cases = aot.cases()
    assert {c.name for c in cases} == {
        *("project", "output_grads", "factor_grad", "sum", "seed", "gemm", "merge"),
        *("dequantize", "nf4_codes", "nf4_block", "gate_grads"),
    }
    assert len({c.label() for c in cases}) == len(cases)
    without_rank = {"sum", "dequantize", "nf4_block", "gate_grads"}
    assert {c.name for c in cases if c.odd} == {c.name for c in cases} - without_rank


def test_launches_with_sizes_of_one_compile(tmp_path):
    """Those of which a launch makes constants."""
    pytest.importorskip("bitsandbytes")
    result = run(module="tests.kernels.launch_worker", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) > 50

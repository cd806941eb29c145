"""What do the compiled kernels ask of an H200, and how near to the speed of memory does that let them come?

Computed, not timed, and without a GPU. Each kernel that memory should bound is compiled for sm_90 and read back as
machine code: its loop, or all of it where the loop runs once. For each element of the large operand we count

    instructions    of one thread. A processor starts 128 a cycle
    shared memory   bytes written and read, by copies and by the tensor cores. A processor moves 128 a cycle
    memory          bytes moved, partial sums included

and compare with the cycles in which memory delivers the least bytes the product can do with. The smallest ratio is a
bound, not a prediction: latency, and what is around the loop, are left out. `kernels` measures the same launches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from cola_kernels import backend
from cola_kernels import compile as aot

from . import harness
from .registry import Options
from .report import markdown

TARGET = "sm_90"
DEVICE = "H200: a copy at 4.3 TB/s, 132 processors at 1.98 GHz"
MEMORY_A_CYCLE = 4.3e12 / 132 / 1.98e9  # of one processor, from and to memory
THREADS_A_CYCLE, SHARED_A_CYCLE = 128, 128
WARP = 32
R = 16


class Cost(NamedTuple):
    """For one element."""

    instructions: float
    shared: float  # bytes
    memory: float  # bytes

    def share(self, least: float) -> float:
        """Of the speed at which memory moves `least` bytes an element, at most."""
        cycles = max(self.instructions / THREADS_A_CYCLE, self.shared / SHARED_A_CYCLE, self.memory / MEMORY_A_CYCLE)
        return least / MEMORY_A_CYCLE / cycles


class Work(NamedTuple):
    """A launch for ranks up to 16, in bf16."""

    case: aot.Case
    tile: int  # elements
    least: float  # bytes an element that have to move
    partial: float = 0.0  # and those of partial sums
    loop: bool = True  # the work is in a loop


def run(options: Options) -> dict[str, Any]:
    if backend.INTERPRET:
        raise SystemExit("TRITON_INTERPRET is set, so there is nothing to compile: unset it.")
    rows = []
    for work in works():
        if work.case.rule or not options.quick:
            cost = measure(work)
            row = {"name": _name(work.case), "rule": work.case.rule, "config": work.case.config, **cost._asdict()}
            rows.append(row | {"share": cost.share(work.least)})
            harness.say(f"{work.case.label()}: {rows[-1]['share']:.0%}")
    return {"target": TARGET, "triton": triton.__version__, "rows": rows}


def works() -> Iterator[Work]:
    for case in aot.cases():
        if case.dtype != "bf16" or case.odd or not aot.runs_on(case, TARGET) or case.constants.get("BR", R) != R:
            continue
        flags, c = case.constants, case.config
        if case.name == "project" and "stride_ak" in flags:
            yield Work(case, c["BM"] * c["BK"], 2)
        elif case.name == "factor_grad":
            yield Work(case, c["BM"] * c["BC"], 2)
        elif case.name == "output_grads":  # each strip of columns writes a dS in fp32, which is read again
            yield Work(case, c["BM"] * c["BC"], 2, 2 * 4 * R / c["BC"])
        elif case.name == "seed" and "stride_vp" in flags:
            yield Work(case, c["BM"] * c["BP"], 2, loop=False)
        elif case.name == "merge" and not flags["GATED"]:
            yield Work(case, c["BN"] * c["BK"], 4, loop=False)


def _name(case: aot.Case) -> str:
    flags = {"DROPOUT": "dropout", "DROPPED": "stochastic", "REPORT": "report"}
    return ", ".join([case.name, *(word for flag, word in flags.items() if case.constants.get(flag))])


def measure(work: Work) -> Cost:
    code = _machine_code(aot.build(work.case, TARGET).asm["cubin"])
    counted = longest_loop(code) if work.loop else [text for _, text in code]
    counted = [text for text in counted if not text.startswith("@!PT") and text != "NOP"]  # never executed, padding
    warps = work.case.config["num_warps"] / work.tile
    shared = sum(shared_bytes(text) for text in counted)
    return Cost(len(counted) * WARP * warps, shared * warps, work.least + work.partial)


def _machine_code(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of each instruction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), line.strip()) for address, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]


def longest_loop(code: Sequence[tuple[int, str]]) -> list[str]:
    """What lies between the farthest jump back and where it leads."""
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0])
    return [text for at, text in code if first <= at <= last]


def shared_bytes(text: str) -> float:
    """What one warp moves to and from shared memory by this instruction."""
    name, *rest = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")
    width = next((int(part.lstrip("US")) for part in rest if part.lstrip("US") in ("128", "64", "16", "8")), 32)
    if name in ("LDSM", "STSM"):  # matrices of 8 x 8 x 16 bits
        return 128 * int(rest[-1] if rest[-1] in ("2", "4") else 1)
    if name in ("LDS", "STS", "LDGSTS"):
        return WARP * width / 8
    if name == "HGMMA":  # for four warps: A of M x K, unless it is in registers, and B of N x K, of 16 bits
        m, n, k = map(int, rest[0].split("x"))
        in_registers = re.search(r"HGMMA\S+ R\d+, R\d+", text) is not None
        return ((0 if in_registers else m * k) + n * k) * 2 / 4
    return 0


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = []
    for row in sorted(result["rows"], key=lambda row: (row["name"], not row["rule"])):
        config = ", ".join(f"{key} {value}" for key, value in row["config"].items())
        cells = [f"{row['instructions']:.1f}", f"{row['shared']:.1f}", f"{row['share']:.0%}"]
        lines.append([f"{row['name']}{' (rule)' if row['rule'] else ''}", config, *cells])
    header = ["", "configuration", "instructions an element", "shared memory, bytes", "of memory's speed, at most"]
    note = (
        f"Computed for {result['target']}, R up to {R}, bf16, Triton {result['triton']}; {DEVICE}. Nothing was timed.\n"
        "A rule is what runs without a tuned table; of two, the smaller tile is for few tokens or older GPUs."
    )
    return {"loops": f"{markdown(header, lines)}\n\n{note}"}

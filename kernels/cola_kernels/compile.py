"""Compile every kernel and configuration ahead of time, for GPUs that need not be there.

    python -m cola_kernels.compile --targets sm_80,sm_90,sm_100,gfx942 [--jobs 2] [--only project] [--output FILE]

Prints registers, shared memory and spilled bytes of each; exits 1 if one does not compile, spills, or asks for more
shared memory than the target has. The first candidate of a kernel is also the rule for GPUs without a tuned table, so
on sm_80 it must fit the 99 KiB of the smaller chips of that family (sm_86, sm_89).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import backend, dequantize, gate_grads, matmul, merge, nf4_fold, nf4_merge, skinny
from .tuning import Config, Shape, rank_block

KIB = 1024
SHARED_LIMITS = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
SMALL_AMPERE = 99 * KIB

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # fp16 takes bf16's tiles and registers
DTYPES = ("bf16", "fp32")
RANKS = (1, 32, 64, 128)  # one of each block the ranks are padded to
ROWS = (512, 8192)


class Case(NamedTuple):
    """One kernel under one configuration. `types` holds the signature where it differs from `_type`'s rule."""

    kernel: Any
    name: str
    dtype: str
    types: dict[str, str]
    constants: dict[str, Any]
    config: Config
    rule: bool  # a first candidate
    hopper: bool | None = None  # for such GPUs only, for others only, or for all
    odd: bool = False  # M and R are no multiples of 16, which a launch finds out and compiles for

    def label(self) -> str:
        flags = [f"{k}={v}" for k, v in self.constants.items() if v is not None and v is not False]
        blocks = [f"{k}={v}" for k, v in self.config.items()]
        return " ".join([self.name, self.dtype, *flags, *blocks, *(["odd"] if self.odd else [])])


class Usage(NamedTuple):
    registers: int
    spilled: int  # bytes
    shared: int  # bytes


class Row(NamedTuple):
    """What became of one case on one target; `usage` is None where it did not compile."""

    target: str
    kernel: str
    usage: Usage | None
    failure: str

    def __str__(self) -> str:
        numbers = "   -      -       -" if self.usage is None else "{:>4} {:>6} {:>7}".format(*self.usage)
        return f"{self.target:<7} {numbers}  {self.kernel}" + (f"  {self.failure}" if self.failure else "")


def cases() -> list[Case]:
    """Everything the launchers can ask for, with K and N multiples of 16, and M and R both or neither."""
    found: dict[str, Case] = {}
    for case in itertools.chain(_skinny_cases(), _matmul_cases(), _merge_cases(), _gate_cases(), _nf4_cases()):
        earlier = found.get(case.label(), case)  # for another number of tokens, or another GPU
        hopper = case.hopper if case.hopper == earlier.hopper else None
        found[case.label()] = case._replace(rule=case.rule or earlier.rule, hopper=hopper)
    odd = [case._replace(odd=True) for case in found.values() if "R" in case.kernel.arg_names]
    return [*found.values(), *odd]


def _shapes(largest: int) -> Iterator[Shape]:
    for dtype, m, rank, dropout in itertools.product(NAMES, ROWS, RANKS, (False, True)):
        yield Shape(torch.device("cpu"), dtype, m, 4096, rank_block(rank, dtype, largest), dropout)


def _dropout(shape: Shape) -> dict[str, Any]:
    return {"DROPOUT": True} if shape.dropout else {"DROPOUT": False, "p_seed": None}


def _skinny_cases() -> Iterator[Case]:
    for shape in _shapes(skinny.MAX_RANK_BLOCK):
        dtype = NAMES[shape.dtype]
        common = {**_dropout(shape), "BR": shape.rank, "stride_xk": 1}
        for i, config in enumerate(skinny.project_configs(shape)):
            # A is read as it lies; where dS alone is wanted, B is read as its transpose, and nothing is dropped.
            for unit in ("stride_ak",) if shape.dropout else ("stride_ak", "stride_ar"):
                yield Case(skinny._project_kernel, "project", dtype, {}, {**common, unit: 1}, config, i == 0)
        for i, config in enumerate(map(_without_rows, skinny.factor_grad_configs(shape))):
            constants, types = {**common, "stride_dsr": 1}, {"p_da": "*fp32"}
            yield Case(skinny._factor_grad_kernel, "factor_grad", dtype, types, constants, config, i == 0)
        if not shape.dropout and shape.rank <= skinny.MAX_RANK_BLOCK_OUTPUT:
            constants = {"stride_dyn": 1, "stride_br": 1, "stride_sr": 1, "BR": shape.rank}
            types = {"p_ds": "*fp32", "p_db": "*fp32"}
            for hopper in (False, True):
                for i, config in enumerate(map(_without_rows, skinny.output_grads_configs(shape, hopper))):
                    kernel = skinny._output_grads_kernel
                    yield Case(kernel, "output_grads", dtype, types, constants, config, i == 0, hopper)
        yield Case(skinny._sum_kernel, "sum", dtype, {"p_parts": "*fp32"}, {}, skinny.SUM_CONFIG, True)


def _without_rows(config: Config) -> Config:
    return {k: v for k, v in config.items() if k != "ROWS"}  # not a constant of the kernel


def _matmul_cases() -> Iterator[Case]:
    for shape in _shapes(matmul.MAX_RANK_BLOCK):
        dtype = NAMES[shape.dtype]
        # Y: V = Bᵀ, W = weightᵀ, a bias in the GEMM, no dropout. dX: V = A, W = weight, no bias, dropout or not.
        for forward in [False] if shape.dropout else [False, True]:
            constants: dict[str, Any] = {"BR": shape.rank, "stride_ur": 1, "stride_vr" if forward else "stride_vp": 1}
            for hopper in (False, True):
                for i, config in enumerate(matmul.seed_configs(shape, hopper)):
                    flags = {**constants, **_dropout(shape)}
                    yield Case(matmul._seed_kernel, "seed", dtype, {}, flags, config, i == 0, hopper)
            constants |= {"W_ROWS_ARE_P": forward, "stride_wl" if forward else "stride_wp": 1, "stride_xl": 1}
            gemms = [(hopper, gemm) for hopper in (False, True) for gemm in matmul.gemm_configs(shape, hopper) if gemm]
            for hopper, gemm in gemms:
                blocks = ([gemm["BM"], gemm["BL"]], [gemm["BP"], gemm["BL"]] if forward else [gemm["BL"], gemm["BP"]])
                kinds = [f"tensordesc<{dtype}{block}>" if hopper else f"*{dtype}" for block in blocks]
                types = dict(zip(("x", "w"), kinds, strict=True))
                flags = {**constants, "TMA": hopper, "BIAS": forward, **({} if forward else {"p_bias": None})}
                yield Case(matmul._gemm_kernel, "gemm", dtype, types, flags, gemm, False, hopper)


def _merge_cases() -> Iterator[Case]:
    flags = (False, True)
    for dtype, stochastic, report, gated in itertools.product(DTYPES, flags, flags, flags):
        if stochastic and dtype == "fp32":
            continue
        constants: dict[str, Any] = {"DROPPED": 16 if stochastic else 0, "REPORT": report}
        constants |= {"stride_wk": 1, "stride_ak": 1, "stride_br": 1}
        constants |= {} if stochastic else {"p_seed": None}
        constants |= {} if report else {"p_report": None}
        constants |= {"GATED": gated} | ({} if gated else {"p_c": None})
        types = {"p_report": "*fp32", "p_c": "*fp32"}
        yield Case(merge._merge_kernel, "merge", dtype, types, constants, merge.CONFIG, True)


def _gate_cases() -> Iterator[Case]:
    types, constants = {"p_c": "*fp32", "p_dc": "*fp32"}, {"stride_dyn": 1, "stride_yn": 1}
    for dtype in DTYPES:
        yield Case(gate_grads._gate_grads_kernel, "gate_grads", dtype, types, constants, gate_grads.CONFIG, True)


def _nf4_cases() -> Iterator[Case]:
    """Blocks of 64, which is bitsandbytes' default; with scales in one level and in two."""
    types = {"p_codes": "*u8", **dict.fromkeys(("p_absmax", "p_absmax2", "p_table", "p_offset", "p_levels"), "*fp32")}
    for nested in (False, True):
        types |= {"p_absmax": "*u8" if nested else "*fp32"}
        scales: dict[str, Any] = {"BS": 64, "BS2": 256 if nested else 0}
        scales |= {} if nested else dict.fromkeys(("p_absmax2", "p_table", "p_offset"))
        for dtype in DTYPES:
            constants = {**scales, "BB": dequantize.ELEMENTS // 64}
            yield Case(dequantize._dequantize_kernel, "dequantize", dtype, types, constants, dequantize.CONFIG, True)
        for stochastic in (False, True):
            constants = {**scales, "BLOCKS": nf4_merge.CONFIG["BK"] // 64, "STOCHASTIC": stochastic}
            constants |= {"stride_ak": 1, "stride_br": 1} | ({} if stochastic else {"p_seed": None})
            yield Case(nf4_merge._merge_kernel, "nf4_codes", "fp32", types, constants, nf4_merge.CONFIG, True)
    config = {"BK": nf4_fold.BLOCK_COLUMNS, **nf4_merge.BLOCK_CONFIG}
    yield Case(nf4_merge._round_block_kernel, "nf4_block", "fp32", {"p_codes": "*u8"}, {}, config, True)


def runs_on(case: Case, target: str) -> bool:
    return case.hopper in (None, target in ("sm_90", "sm_100"))


def build(case: Case, target: str) -> Any:
    """Compile: what triton.compile returns."""
    options = {k: v for k, v in case.config.items() if k.islower()}  # blocks are upper case
    constants = {**case.constants, **{k: v for k, v in case.config.items() if k not in options}}
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, case) for name in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if _divisible(name, signature[name], case)}
    return triton.compile(ASTSource(case.kernel, signature, constants, attrs), target=_gpu(target), options=options)


def compile_case(case: Case, target: str) -> Usage:
    """Compile, and read what the assembler says of the result."""
    compiled = build(case, target)
    shared = compiled.metadata.shared
    if target.startswith("sm_"):
        return Usage(*_cubin_usage(compiled.asm["cubin"]), shared)
    return Usage(_amd_field(compiled, "vgpr_count"), 4 * _amd_field(compiled, "vgpr_spill_count"), shared)


def _type(name: str, case: Case) -> str:
    if name in case.types:
        return case.types[name]
    if name == "p_seed":
        return "*i64"
    if name.startswith("p_"):
        return f"*{case.dtype}"
    return "fp32" if name == "scale" else "i32"


def _divisible(name: str, kind: str, case: Case) -> bool:
    """What a launch would find out: aligned tensors, and sizes that are multiples of 16."""
    unknown = ("threshold", "parts", *(("M", "R") if case.odd else ()))
    return kind.startswith("*") or (kind == "i32" and name not in unknown)


def _gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory, where spilled registers go."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def _amd_field(compiled: Any, field: str) -> int:
    found = re.search(rf"\.{field}:\s+(\d+)", compiled.asm["amdgcn"])
    if found is None:
        raise RuntimeError(f"the assembly does not state .{field}")
    return int(found[1])


def check(case: Case, target: str) -> Row:
    try:
        usage = compile_case(case, target)
    except Exception as error:  # whatever the compiler raises is this row's result
        return Row(target, case.label(), None, f"FAILED: {str(error).strip().splitlines()[-1:]}")
    limit = SMALL_AMPERE if case.rule and target == "sm_80" else SHARED_LIMITS[target]
    failures = ["SPILLS"] if usage.spilled else []
    failures += [f"EXCEEDS {limit} bytes of shared memory"] if usage.shared > limit else []
    return Row(target, case.label(), usage, ", ".join(failures))


def sources() -> str:
    """sha256 of every file of this package that a kernel is made from."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(f"{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def recorded(folder: Path, targets: list[str]) -> list[Row] | None:
    """The rows that `write` kept in `folder` of just these sources and this compiler, for these targets. None if there
    are none, and the kernels have to be compiled."""
    path = folder / f"aot-triton-{'.'.join(triton.__version__.split('.')[:2])}.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_bytes())
    if (kept["triton"], kept.get("sources")) != (triton.__version__, sources()):
        return None
    rows = [Row(target, kernel, Usage(*usage), failure) for target, *usage, kernel, failure in kept["rows"]]
    found = [row for row in rows if row.target in targets]
    return found if {row.target for row in found} == set(targets) else None


def write(path: Path, rows: list[Row]) -> None:
    """As JSON, one line a row, with the compiler's version and what was compiled."""
    lines = [json.dumps([row.target, *(row.usage or (None, None, None)), row.kernel, row.failure]) for row in rows]
    columns = json.dumps(["target", "registers", "spilled bytes", "shared bytes", "kernel", "failure"])
    body = ",\n  ".join(lines)
    about = f' "triton": "{triton.__version__}",\n "sources": "{sources()}",\n "columns": {columns},\n'
    text = f'{{\n{about} "rows": [\n  {body}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cola_kernels.compile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100", help=f"of {', '.join(SHARED_LIMITS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    parser.add_argument("--recorded", type=Path, help="a folder: compile nothing if its aot-triton-*.json is of these "
                        "very sources and this compiler")  # fmt: skip
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    unknown = [target for target in targets if target not in SHARED_LIMITS]
    if unknown:
        parser.error(f"unknown targets {', '.join(unknown)}: choose among {', '.join(SHARED_LIMITS)}")
    known = recorded(options.recorded, targets) if options.recorded and not options.only else None
    if known is not None:
        failed = sum(bool(row.failure) for row in known)
        print(f"{len(known)} kernels are recorded of these sources and Triton {triton.__version__}, {failed} failed")
        return 1 if failed else 0
    if backend.INTERPRET:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile: unset it")
    chosen = [(c, i) for i, c in enumerate(cases()) if options.only in c.name]
    rows: list[Row] = []
    print(f"{'target':<7} {'regs':>4} {'spill':>6} {'shared':>7}  kernel")
    # Fresh processes: a compiler that crashes takes no other row with it, and threads of torch are not forked.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for target in targets:
            indices = [i for c, i in chosen if runs_on(c, target)]
            for row in pool.map(functools.partial(_check_index, target), indices, chunksize=4):
                print(row, flush=True)
                rows.append(row)
            failed = sum(bool(row.failure) for row in rows if row.target == target)
            print(f"{target}: {len(indices)} compiled, {failed} failed", flush=True)
    if options.output:
        write(options.output, rows)
    return 1 if any(row.failure for row in rows) else 0


def _check_index(target: str, index: int) -> Row:
    return check(_all_cases()[index], target)


@functools.cache
def _all_cases() -> list[Case]:
    return cases()  # a kernel does not pickle: workers look it up by its place in the list


if __name__ == "__main__":
    sys.exit(main())

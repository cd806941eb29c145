"""`python -m benchmarks list | run SUITE | cpu | gpu | report`. Run from the root of the repository."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .registry import SUITES, UNFINISHED, Charted, Compared, Joined, Options, Plotted


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the suites and the question each answers")
    run = commands.add_parser("run", help="measure, keep the result as JSON, print its tables")
    run.add_argument("suite", choices=SUITES)
    run.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/SUITE-DEVICE.json)")
    run.add_argument("--quick", action="store_true", help="a minute's look; kept only where --out says")
    run.add_argument("--full", action="store_true", help="every combination, where a suite measures a choice of them")
    run.add_argument("--seconds", type=float, default=math.inf, help="start nothing after that, where a suite can stop")
    whole = commands.add_parser("gpu", help="parity, tuning and every GPU suite, each in a process of its own")
    whole.add_argument("--out", type=Path, required=True, help="the folder of all results")
    whole.add_argument("--seconds", type=float, default=540, help="for all of it (default: 540)")
    whole.add_argument("--quick", action="store_true", help="a rehearsal in small; on the CPU where there is no GPU")
    small = commands.add_parser("cpu", help="every suite of speed and memory for a CPU, and whether one became slower")
    small.add_argument("--quick", action="store_true", help="a minute's look, in a temporary folder")
    report = commands.add_parser("report", help="draw the page of all results, and write the tables in the texts")
    texts = [Path("README.md"), *sorted(Path("docs").rglob("*.md")), *sorted(Path("benchmarks").glob("*.md"))]
    report.add_argument("--into", type=Path, nargs="+", default=texts, help="whose tables to write")
    report.add_argument("--page", type=Path, default=Path("benchmarks/report.html"))
    chosen = parser.parse_args(arguments)
    if chosen.command == "list":
        for name, entry in SUITES.items():
            print(f"{name:12} {entry.question}")
        return 0
    if chosen.command == "run":
        return _run(chosen.suite, chosen.out, Options(chosen.quick, chosen.full, chosen.seconds))
    if chosen.command == "gpu":
        from . import gpu

        return gpu.main(chosen.out, chosen.seconds, quick=chosen.quick)
    if chosen.command == "cpu":
        from . import cpu

        return cpu.main(quick=chosen.quick)
    return _report(chosen.into, chosen.page)


def _run(name: str, out: Path | None, options: Options) -> int:
    import torch  # not for `list` and --help

    from . import harness

    torch.manual_seed(0)  # the gates judge the same inputs each time
    suite, env = SUITES[name].load(), harness.environment()
    if out is None and not options.quick:
        out = harness.result_path(name, env)
    header = {"suite": name, "quick": options.quick, "environment": env}

    def keep(measured: Mapping[str, Any]) -> None:
        if out is not None:
            harness.write_result(out, {**header, "complete": False, **measured})

    try:
        measured = suite.run(replace(options, keep=keep, found=_unfinished(out, header)))
    except harness.ParityError as error:
        print(f"No numbers, because the sides do not agree. {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"{name} needs what it compares with: pip install -e '.[demo,peers]' ({error}).", file=sys.stderr)
        return 1
    left = bool(measured.get("left"))
    result = {**header, "complete": not left, **measured}
    for table in suite.tables(result).values():
        print(table, end="\n\n")
    for refused in measured.get("refused", []):
        print(f"No numbers for {refused}", file=sys.stderr)
    if out is not None:
        harness.write_result(out, result)
        print(f"written to {out}")
        if hasattr(suite, "plot"):
            cast(Plotted, suite).plot(result, out.with_suffix(".png"))
    slower = [] if options.quick else _compare(name, result)
    return 1 if measured.get("refused") or slower else UNFINISHED if left else 0


def _compare(name: str, result: Mapping[str, Any]) -> list[Any]:
    """What has become slower since the last committed result of this device, printed."""
    from . import regression

    old = regression.last_committed(name, result["environment"])
    if old is None:
        print(f"{name}: no committed result of this device to compare with")
        return []
    found = regression.slower(result, old)
    since = f"commit {(old['environment']['commit'] or 'unknown')[:10]}"
    print(f"{name}: {len(found) or 'nothing'} slower than at {since}, beyond the spread")
    for each in found:
        print(f"  {each}", file=sys.stderr)
    return found


def _unfinished(out: Path | None, header: Mapping[str, Any]) -> dict[str, Any]:
    """What a run of the same suite on the same commit and device has left in `out`, if its time was up or something was
    refused."""
    from . import harness

    if out is None or not out.is_file():
        return {}
    found = harness.read(out)
    same = all(found[key] == header[key] for key in ("suite", "quick"))
    same = same and all(
        found["environment"][key] == header["environment"][key] for key in ("device", "instructions", "commit")
    )
    return found if same and (not found["complete"] or found.get("refused")) else {}


def _report(texts: Sequence[Path], page: Path) -> int:
    from cola_fast import methods

    from . import harness, scaling
    from .page import page as drawn
    from .report import Quoted, beside, fill, names

    blocks = {"methods": methods.table(), **scaling.tables()}
    sections = []
    for name, entry in SUITES.items():
        suite, shown = entry.load(), []
        found: dict[str, list[tuple[Any, str, Quoted | None]]] = {}
        results = harness.read_results(name)
        if hasattr(suite, "together"):
            blocks |= cast(Joined, suite).together(results)
        for result in results:
            tables = suite.tables(result)
            charts = cast(Charted, suite).charts(result) if hasattr(suite, "charts") else []
            shown.append((result, charts, tables))
            quoted = cast(Compared, suite).quoted(result) if hasattr(suite, "quoted") else {}
            for block, table in tables.items():
                found.setdefault(block, []).append((result, table, quoted.get(block)))
        blocks |= {block: beside(results) for block, results in found.items()}
        sections.append((name, entry.question, shown))
    for block, table in blocks.items():
        print(f"<!-- benchmark:{block} -->\n{table}\n<!-- end -->\n")
    unmeasured = {name for name, _, shown in sections if not shown}
    filled = {}
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for block in names(text):
            owner = block.partition("-")[0]
            if owner in unmeasured:
                blocks[block] = f"Not measured yet: `python -m benchmarks run {owner}`."
        try:
            filled[path] = fill(text, blocks)
        except ValueError as error:
            print(f"Nothing was written: {path.name} cannot be. {error}", file=sys.stderr)
            return 1
    for path, text in {**filled, page: drawn(sections)}.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

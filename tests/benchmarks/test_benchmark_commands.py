"""`python -m benchmarks`: the registry, the gate from the outside, and the README's tables."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import four_bit, harness, linears, train
from benchmarks.__main__ import main
from benchmarks.registry import SUITES
from benchmarks.report import fill, kind
from cola_kernels import lora_linear

README = """# Title
<!-- benchmark:linears-block -->
old
<!-- end -->
between
<!-- benchmark:linears-shapes -->
<!-- end -->
"""


@pytest.mark.parametrize("name", SUITES)
def test_a_registered_suite_has_a_file_and_both_functions(name: str) -> None:
    suite = SUITES[name].load()
    assert SUITES[name].question.endswith("?")
    assert callable(suite.run)
    assert callable(suite.tables)


def test_list_loads_nothing_heavy() -> None:
    code = "import sys, benchmarks.__main__ as m; m.main(['list']); assert not {'torch', 'peft'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SUITES)


# --- the gate ---------------------------------------------------------------------------------------------------------


def _wrong_output(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *rest: Any, **options: Any) -> Tensor:
    return lora_linear(x, weight, a, b, 1.02 * scale, *rest, **options)


def _wrong_gradient(x: Tensor, weight: Tensor, a: Tensor, *rest: Any, **options: Any) -> Tensor:
    return lora_linear(x, weight, a.detach() + 0.98 * (a - a.detach()), *rest, **options)


def _one_nan(*arguments: Any, **options: Any) -> Tensor:
    y = lora_linear(*arguments, **options)
    mask = torch.zeros_like(y, dtype=torch.bool)
    mask.view(-1)[-1] = True
    return y.masked_fill(mask, torch.nan)


@pytest.mark.parametrize("op", [_wrong_output, _wrong_gradient, _one_nan])
def test_a_wrong_op_gets_no_numbers(
    op: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cola_fast.layers.grouping.lora_linear", op)
    assert main(["run", "linears", "--quick", "--out", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "No numbers" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dropout", linears.DROPOUTS)
@pytest.mark.parametrize("dtype", linears.DTYPES)
def test_every_side_of_the_layer_passes_the_gate(dtype: str, dropout: float) -> None:
    case = linears.Case.draw((48, 40), 2 * linears.ROW, linears.DTYPES[dtype])
    sides = linears.all_sides(case, dropout)
    assert len(sides) == (3 if dtype == "bf16" else 2)
    for name, side in sides.items():
        assert max(linears.check(name, side, case).values()) <= 1


def test_the_gate_sees_another_dropout_mask() -> None:
    case = linears.Case.draw((48, 40), 2 * linears.ROW, torch.float32)
    side = linears.ours(case, 0.05)
    with pytest.raises(harness.ParityError):
        linears.check("ours", replace(side, noise=torch.ones_like), case)


# --- the README -------------------------------------------------------------------------------------------------------


def _result(quick: bool = False, peft: float = 4e-3) -> dict[str, Any]:
    rows = [
        {"case": f"{dtype} {shape}", "dtype": dtype, "dropout": 0.0, "tokens": 512, "shape": shape}
        | harness.summarise(
            {"frozen": [1e-3, 1e-3], "ours": [2e-3, 2e-3], "peft": [peft, peft]}
            | ({"peft_bf16": [3e-3, 3e-3]} if dtype == "bf16" else {}),
            "ours",
        )
        for dtype in linears.DTYPES
        for shape in linears.SHAPES
    ]
    environment = harness.environment()
    return {"suite": "linears", "quick": quick, "environment": environment, "rows": rows}


def test_report_writes_the_readme_from_the_results_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    result = _result()
    harness.write_result(harness.result_path("linears", result["environment"]), result)
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert main(["report", "--into", str(readme), "--page", str(tmp_path / "page.html")]) == 0
    once = readme.read_text()
    assert "old" not in once
    assert "| bf16, dropout 0, M = 512: down | 576 x 1536 | 1.00 | 2.00 | 4.00 | 0.50 (0.50 to 0.50) |" in once
    assert "7.00 | 14.00 | 28.00 | 2.00 (2.00 to 2.00) | **0.50 (0.50 to 0.50)** | 0.50" in once  # seven linears
    assert "not for publication" not in once
    assert main(["report", "--into", str(readme), "--page", str(tmp_path / "page.html")]) == 0
    assert readme.read_text() == once
    assert "<!-- benchmark:linears-shapes -->" in capsys.readouterr().out


def test_kinds_of_cpu_stand_below_each_other_and_the_worst_is_quoted_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    kinds = {"One": ("AVX512, AMX", "bf16", 4e-3), "Two": ("AVX2", "fp32", 2.5e-3), "Three": ("AVX2", "fp32", 8e-3)}
    for device, (instructions, dtype, peft) in kinds.items():
        result = _result(peft=peft)
        result["environment"] |= {"device": device, "threads": 2, "instructions": instructions, "dtype": dtype}
        harness.write_result(harness.result_path("linears", result["environment"]), result)
    (tmp_path / "README.md").write_text(README)
    assert main(["report", "--into", str(tmp_path / "README.md"), "--page", str(tmp_path / "page.html")]) == 0
    block, _, shapes = (tmp_path / "README.md").read_text().partition("between")
    for text in (block, shapes):
        for device, (instructions, dtype, _) in kinds.items():
            assert f"**{device}, 2 threads ({instructions}), natively {dtype}**\n\n|  |" in text
    assert (
        "ours / PEFT, the worst kind of machine first: 0.80 on Two, 2 threads (AVX2), natively fp32; 0.50 on One, "
        "2 threads (AVX512, AMX), natively bf16; 0.25 on Three, 2 threads (AVX2), natively fp32.\n"
    ) in block
    assert "worst kind" not in shapes


def test_what_is_quoted_is_a_block_of_the_suite_and_a_committed_result_has_it() -> None:
    """The ratios of every committed result can be found, and stand in a block."""
    quoting = {}
    for name, entry in SUITES.items():
        suite: Any = entry.load()
        if hasattr(suite, "quoted"):
            for result in harness.read_results(name):
                quoted, tables = suite.quoted(result), suite.tables(result)
                assert quoted.keys() <= tables.keys()
                assert all(0 < value < 10 for ratios in quoted.values() for value in ratios.values)
                quoting[name] = quoted
    assert quoting.keys() == {"train", "linears", "memory", "overhead", "drop_in", "knot_time"}


def test_the_readmes_table_has_a_row_a_kind_of_machine_and_the_worst_first() -> None:
    results = harness.read_results("train")
    lines = train.together(results)["train-machines"].splitlines()[2 : 2 + len(results)]
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines} == {kind(result) for result in results}
    ratios = [float(re.findall(r"\*\*([\d.]+)", line)[0]) for line in lines]
    assert ratios == sorted(ratios, reverse=True)
    assert train.together([{**result, "demo": None} for result in results]) == {}


def test_a_suite_without_a_result_says_that_it_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "none")
    (tmp_path / "README.md").write_text(README)
    assert main(["report", "--into", str(tmp_path / "README.md"), "--page", str(tmp_path / "page.html")]) == 0
    said = "Not measured yet: `python -m benchmarks run linears`."
    assert (tmp_path / "README.md").read_text().count(said) == 2
    assert (tmp_path / "page.html").read_text().count("Not measured.") == len(SUITES)


def test_a_table_that_no_suite_makes_leaves_the_readme_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "none")
    unknown = README.replace("linears-block", "lines-block")
    (tmp_path / "README.md").write_text(unknown)
    assert main(["report", "--into", str(tmp_path / "README.md"), "--page", str(tmp_path / "page.html")]) == 1
    assert (tmp_path / "README.md").read_text() == unknown
    assert not (tmp_path / "page.html").exists()
    assert "lines-block" in capsys.readouterr().err


def test_fill_touches_only_what_is_between_the_markers() -> None:
    blocks = {"linears-block": "| a |", "linears-shapes": "| b |\n\nnote"}
    filled = fill(README, blocks)
    assert filled == (
        "# Title\n<!-- benchmark:linears-block -->\n| a |\n<!-- end -->\nbetween\n"
        "<!-- benchmark:linears-shapes -->\n| b |\n\nnote\n<!-- end -->\n"
    )
    assert fill(filled, blocks) == filled


def test_a_quick_run_says_so() -> None:
    assert "not for publication" in linears.tables(_result(quick=True))["linears-shapes"]


def test_a_gain_is_what_a_chain_has_taken_off_the_loss_of_the_base() -> None:
    def scored(before: float, after: float) -> dict[str, Any]:
        return {
            "before": {"loss": before, "accuracy": 0.5},
            "after": {"loss": after, "accuracy": 0.5},
        }

    runs = [
        {"links": links, "arm": arm, "seed": 0, "knots": [scored(2.0, after)] * (3 if links == four_bit.SHORT else 1)}
        for links in (four_bit.SHORT, four_bit.LONG)
        for arm, after in (("ledger", 2.0), ("in place", 2.5), (four_bit.PEFT, 6.0))
    ]
    result = {"base": {"loss": 7.0}, "runs": runs, "quick": False, "environment": harness.environment()}
    tables = four_bit.tables(result)
    assert "| in place, knot 3 | 2.000 | 2.500 | 0.500 | 0.900 |" in tables["four_bit-knots"]
    assert "PEFT merge_and_unload, knot 1 | 2.000 | 6.000 | 0.500 | 0.200 |" in tables["four_bit-knots"]
    assert "| in place | 2.500 | 0.500 | 0.900 |" in tables["four_bit-chain"]

"""The package's types reach a program that lies elsewhere: py.typed is installed, and strict checking finds misuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_program_elsewhere_is_checked_with_our_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    installed, place = tmp_path / "site", tmp_path / "theirs"
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    subprocess.run([*build, "--target", str(installed), "."], cwd=ROOT, check=True)
    place.mkdir()
    (place / "program.py").write_text((ROOT / "tests" / "typed_client.py").read_text())
    (place / "mypy.ini").write_text("[mypy]\n[mypy-transformers.*]\nfollow_imports = skip\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "program.py"],
        cwd=place, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr

"""The layout's one trap: a top-level package `kernels` would shadow Hugging Face's library of that name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_kernels_is_a_plain_folder() -> None:
    assert (ROOT / "kernels" / "cola_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_root_shadows_nothing() -> None:
    """transformers, which looks for `kernels`, imports from the project's root."""
    code = "import transformers.integrations.hub_kernels, importlib.util as u; s = u.find_spec('kernels'); "
    code += "assert s is None or s.origin is not None, s"  # absent or HF's; ours would be a regular package here
    code += "\nimport cola_kernels, cola_fast"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True)


def test_kernels_stand_alone() -> None:
    """cola_kernels needs torch (and triton), never the library or transformers; importing either does nothing heavy."""
    code = "import sys, cola_kernels; bad = {'cola_fast', 'transformers'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, cola_fast, cola_fast.cli; bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_wheel_contents(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert tops == {"cola_fast", "cola_kernels"}
    assert {"cola_fast/commands/demo.yaml", "cola_fast/py.typed", "cola_kernels/py.typed"} <= set(names)

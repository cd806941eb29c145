"""The examples run as they are, on a tiny model; the one that resumes does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cola_fast import cli

from .cola.trainer_runs import CHAT_TEMPLATE

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "peft_drop_in": ("14 LoRA layers run on cola_kernels", "runs/peft-drop-in/adapter_model.safetensors"),
    "trainer_callback": ("3 links", "runs/trainer/merged/model.safetensors"),
    "two_processes": ("3 links in 12 steps", "runs/two-processes/run/links/002/adapter_model.safetensors"),
    "trl_sft": ("relative error", "runs/trl/adapter/adapter_model.safetensors"),
}


def test_all_are_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    says, writes = EXAMPLES[name]
    assert says in run(name, model, tmp_path)
    assert (tmp_path / writes).exists()
    if name == "trainer_callback":
        shutil.rmtree(tmp_path / "runs" / "trainer" / "merged")
        shutil.rmtree(tmp_path / "runs" / "trainer" / "checkpoint-12")
        assert says in run(name, model, tmp_path)


@pytest.mark.slow
def test_qlora_yaml(wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    model = tmp_path / "model"
    shutil.copytree(wide_folder, model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "examples/qlora.yaml", f"model.name={model}", "device=cpu"]) == 0
    assert cli.main(["export", "runs/qlora", "--to", "adapter"]) == 0
    record = json.loads(Path("runs/qlora/chain.json").read_text())
    assert (len(record["links"]), record["base_kind"]) == (2, "ledger")
    assert list(Path("runs/qlora").rglob("export*/**/adapter_model.safetensors"))


def run(name: str, model: Path, folder: Path) -> str:
    """What it prints. In this process, which has imported transformers; not so the one that starts processes."""
    script = ROOT / "examples" / f"{name}.py"
    if name != "two_processes":
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.chdir(folder)
            patch.setattr(sys, "argv", [str(script), str(model)])
            runpy.run_path(str(script), run_name="__main__")
        return printed.getvalue()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(model)],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout

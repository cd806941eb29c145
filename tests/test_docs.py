"""What the documentation says is there, and what it shows runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import cola_fast
import cola_kernels
from cola_fast import cli, config
from cola_fast.commands import assets, demo

from .cola.trainer_runs import COMMON, token_rows
from .conftest import tiny_llama

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *PAGES]
ALL_TEXTS = [*TEXTS, *sorted((ROOT / "benchmarks").glob("*.md"))]
OURS = set(re.findall(r"^  cola (\w+)", cli.DESCRIPTION, re.MULTILINE))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """What stands between the fences of one language; `""` for none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


# --- what there is ----------------------------------------------------------------------------------------------------


def sections(tree: type) -> Iterator[str]:
    """The dataclasses of the configuration."""
    yield tree.__name__
    for hint in typing.get_type_hints(tree).values():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from sections(hint)


def test_the_reference_has_every_public_name() -> None:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in pages), re.MULTILINE)
    wanted = [f"cola_fast.{name}" for name in cola_fast.__all__]
    wanted += [f"cola_kernels.{name}" for name in cola_kernels.__all__]
    wanted += [f"cola_fast.config.{name}" for name in sections(config.Config)]
    assert sorted(shown) == sorted(wanted)


def test_every_page_is_in_the_sites_contents() -> None:
    listed = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = set(re.findall(r"([\w/-]+\.md)$", listed, re.MULTILINE))
    here = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    there = {name_of(path) for path in ALL_TEXTS if path not in PAGES and path.name != "README.md"}
    assert pages == here | there | {"index.md"}


@pytest.mark.parametrize("text", ALL_TEXTS, ids=name_of)
def test_links_lead_to_files(text: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (text.parent / target.partition("#")[0]).is_file(), f"{name_of(text)} links to {target}"


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_files_that_are_named_are_there(text: Path) -> None:
    """Paths from the root."""
    for name in re.findall(r"`([\w.]+/[\w./*-]+)`", text.read_text(encoding="utf-8")):
        ours = name.split("/")[0] in {path.name for path in ROOT.iterdir()}
        if ours and not name.startswith("runs/") and "SUITE" not in name:
            assert any(ROOT.glob(name.rstrip("/"))), f"{name_of(text)} names {name}"


def test_the_walk_of_a_parameter_names_what_there_is() -> None:
    rows = re.findall(r"^\| `(\S+\.py)` \| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for file, name in rows:
        defined = re.search(rf"^ *(?:def|class) {name}\b|^{name} = ", (ROOT / file).read_text(), re.MULTILINE)
        assert defined, f"{file} has no {name}"


def test_the_readme_is_one_read() -> None:
    assert len(README.split()) <= 1700


def test_the_file_tree_is_that_of_the_repository() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("cola_fast/"))
    top = ""
    for line in tree.splitlines():
        name = line.split()[0]
        top = top if line.startswith(" ") else name
        assert (ROOT / (top + name if line.startswith(" ") else name)).exists(), name


def test_words_are_explained() -> None:
    table = README.partition("\n## Words\n")[2].partition("\n## ")[0]
    words = re.findall(r"^\| (\w+) \|", table, re.MULTILINE)
    assert words == ["word", "link", "seal", "fold", "tie", "knot", "ledger"]


def test_make_help_lists_every_target() -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # not within `make test`
    done = subprocess.run(["make", "help"], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    assert {line.split()[0] for line in done.stdout.splitlines()} == targets
    assert all(len(line.split()) > 2 for line in done.stdout.splitlines())
    for text in TEXTS:
        for target in re.findall(r"(?:`|^)make ([a-z]+)", text.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets, f"{name_of(text)} says make {target}"


def test_make_demo_and_make_test_run_what_the_readme_says() -> None:
    for target, command in (("demo", "cola demo"), ("test", "python -m pytest")):
        assert f"make {target} " in README
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert command in done.stdout


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_commands_keys_and_modules_that_are_named_are_there(text: Path) -> None:
    said = text.read_text(encoding="utf-8")
    for line in re.findall(r"`(cola \w[^`|]*)`", said):
        words = shlex.split(line)[1:]
        if len(words) > 1 and "--help" not in words:
            _, rest = cli._parser().parse_known_args(words)
            assert not [word for word in rest if word.startswith("-")], line
        assert words[0] in OURS, line
    for module in re.findall(r"python -m ([\w.]+)", said):
        assert importlib.util.find_spec(module), module
    for section, key in re.findall(r"`(model|data|chain|schedule|train)\.(\w+)\b(?!\()", said):
        known = {field.name for field in dataclasses.fields(getattr(config.Config(), section))}
        known |= {"json", "safetensors", *(["model", *dir(cola_fast.Chain)] if section == "chain" else ())}
        assert key in known, f"{name_of(text)} names {section}.{key}"


def test_extras_are_those_of_setup() -> None:
    extras = re.search(r"extras: (.*?)\)", README, re.DOTALL)
    assert extras is not None
    table = (ROOT / "setup.py").read_text().partition("extras_require={")[2].partition("}")[0]
    assert set(re.findall(r"`(\w+)`", extras[1])) == set(re.findall(r'"(\w+)":', table))


# --- what it shows ----------------------------------------------------------------------------------------------------

PYTHON = [(path, code) for path in TEXTS for code in blocks(path, "python")]


def _names(code: str, folder: Path) -> dict[str, Any]:
    """What a block takes as given."""
    if "from_pretrained" in code:
        return {}
    names: dict[str, Any] = {"cola_fast": cola_fast, "model": tiny_llama()}
    if "peft_model" in code:
        peft = pytest.importorskip("peft")
        names["peft_model"] = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    if "Trainer" in code:
        from transformers import Trainer, TrainingArguments

        arguments = {**COMMON, "eval_strategy": "no", "max_steps": 6}
        names |= {"Trainer": Trainer, "data": token_rows(), "args": TrainingArguments(folder / "out", **arguments)}
    if '"score"' in code:
        from transformers import LlamaForSequenceClassification

        names["model"] = LlamaForSequenceClassification(tiny_llama().config)
    return names


@pytest.mark.slow
@pytest.mark.parametrize(("path", "code"), PYTHON, ids=[f"{name_of(path)}-{i}" for i, (path, _) in enumerate(PYTHON)])
def test_python_runs(path: Path, code: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = _names(code, tmp_path)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_folder)).replace("[49152, 49153]", "[62, 63]")
    exec(compile(code, name_of(path), "exec"), names)
    if "report" in names:
        names["report"].undo()
    if "trainer" in names:
        names["trainer"].train()
        assert len(names["chain"].links) == 3
    if "train_also" in code or "train_tokens" in code:
        assert names["chain"].beside
    if "export_adapter" in code:
        assert Path("my-adapter/adapter_model.safetensors").exists()
        assert len(json.loads(Path("runs/mine/chain.json").read_text())["links"]) == 3


@pytest.mark.slow
def test_commands_run(
    wide_folder: Path, task_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The README's, in its order, on its own configuration with a tiny model that knows other words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "smollm2", lambda: wide_folder)
    monkeypatch.setattr(assets, "sentiment", lambda name: {key: Path(file) for key, file in task_files.items()})
    monkeypatch.setattr(demo, "SIZES", (demo.Size("full", 96, 16, 32, 32),))
    (text,) = blocks(ROOT / "README.md", "yaml")
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    for ours, theirs in ((model, str(wide_folder)), ("terrible", "bad"), ("great", "good")):
        assert ours in text
        text = text.replace(ours, theirs)
    Path("CONFIG.yaml").write_text(text)
    shutil.copy(task_files["train"], yaml.safe_load(text)["data"]["train"])
    commands = next(block for block in blocks(ROOT / "README.md", "") if block.startswith("cola ")).splitlines()
    said = {}
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        if words == ["demo"]:
            words += ["data.verbalisers={0: ' bad', 1: ' good'}", "data.template='{text} it was'", "epochs=1"]
        words = [yaml.safe_load(text)["out"] if word == "RUN" else word for word in words]
        capsys.readouterr()
        assert cli.main(words) == 0, (line, capsys.readouterr().err)
        said[line.partition("#")[0].strip()] = capsys.readouterr().out
    assert "trainable" in said["cola train CONFIG.yaml --dry-run"]
    assert "after 3 links" in said["cola eval RUN"]
    assert "periodic-lora" in said["cola methods"]
    assert {path.name for path in Path("runs/reviews/export").iterdir()} == {"adapter", "merged"}
    assert {line.split()[1] for line in commands} == OURS


@pytest.mark.slow
def test_tables_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks report` writes each, in the README and in every page, as it stands there."""
    from benchmarks.__main__ import main

    for text in ALL_TEXTS:
        emptied = re.sub(r"(<!-- benchmark:[\w-]+ -->\n).*?(<!-- end -->)", r"\1\2", text.read_text(), flags=re.DOTALL)
        (tmp_path / name_of(text)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name_of(text)).write_text(emptied)
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0
    for name in [*map(name_of, ALL_TEXTS), "benchmarks/report.html"]:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is stale: make report"

"""The command line, as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cola_fast import cli

from ..conftest import snapshot


class Printed(NamedTuple):
    stdout: str
    stderr: str


Cola = Callable[..., Printed]


@pytest.fixture
def cola(capsys: pytest.CaptureFixture[str]) -> Cola:
    """Run the command line in this process, which has imported transformers once and for all."""

    def run(*words: str, check: int = 0) -> Printed:
        capsys.readouterr()
        code = cli.main(list(words))
        printed = Printed(*capsys.readouterr())
        assert code == check, printed.stderr
        return printed

    return run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--help"], ["demo", "train", "eval", "export", "ranks", "methods", "info", "Ctrl-C"]),
        (["train", "--help"], ["optimizer_state: reset", "verbalisers", "too_long: truncate", "lr_span: global"]),
    ],
    ids=["cola", "train"],
)
def test_help_answers_at_once(words: list[str], says: list[str]) -> None:
    """In a process of its own, as typed: whatever takes seconds to import has not been."""
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'triton', 'safetensors'}\n"
        "atexit.register(lambda: print('imported:', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['cola', *{words!r}]\n"
        "runpy.run_module('cola_fast.cli', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in says)
    assert "imported: []" in done.stdout


@pytest.mark.slow
def test_the_whole_way(config_file: Callable[..., str], tmp_path: Path, cola: Cola) -> None:
    """dry run, train, info, eval, both exports, and again."""
    path, run = config_file(), tmp_path / "run"

    plan = cola("train", path, "--dry-run", "schedule.links=2").stdout
    assert "link       4 layers, 448 trainable parameters" in plan
    assert "link 2 of 2   steps 7 to 12, rank 2" in plan
    assert "MiB" in plan
    assert "a step " in plan
    assert "together about" in plan  # the step could be estimated
    assert not run.exists()

    done = cola("train", path)
    assert "3 links in 12 steps" in done.stdout
    assert "step 12: validation loss" in done.stderr
    assert "link 3 of 3 tied" in done.stderr

    facts = cola("info", str(run)).stdout
    assert facts.count("sealed, rank 2, sha256") == 3
    assert "steps    12" in facts

    rows = json.loads(cola("eval", str(run), "--best", "--json").stdout)
    assert [row["model"] for row in rows] == [
        "base", "after 1 link", "after 2 links", "after 3 links", "merged export", "best checkpoint",
    ]  # fmt: skip
    assert rows[3]["loss"] == pytest.approx(rows[4]["loss"], rel=1e-5)
    assert rows[3]["loss"] < rows[0]["loss"]

    for to, file in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        assert "\ncompared: " in cola("export", str(run), "--to", to).stdout
        assert (run / "export" / to / file).exists()
    assert (run / "export" / "merged" / "tokenizer.json").exists()
    before = snapshot(run)
    cut = cola("export", str(run), "--to", "adapter", "--rank", "2", "--out", str(tmp_path / "cut")).stdout
    assert "rank 2" in cut
    assert "q_proj" in cut
    assert "--rank is for --to adapter" in cola("export", str(run), "--to", "merged", "--rank", "2", check=2).stderr
    assert "already exists" in cola("export", str(run), "--to", "adapter", check=2).stderr
    cola("export", str(run), "--to", "adapter", "--best", "--out", str(tmp_path / "best"))
    again = cola("train", path)
    assert "3 links in 12 steps" in again.stdout
    assert snapshot(run / "links") == {k.removeprefix("links/"): v for k, v in before.items() if k.startswith("links/")}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "nothing.yaml"], "There is no configuration file nothing.yaml"),
        (["eval", "nowhere"], "nowhere holds no chain"),
        (["info", "nowhere"], "nowhere holds no chain"),
        (["export", "nowhere", "--to", "merged"], "nowhere holds no chain"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cola: {sentence}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["train"], ["export", "x"], ["export", "x", "--to", "gguf"], ["fly"], ["info", "a", "b=c"]]
)
def test_wrong_usage_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: cola" in capsys.readouterr().err


def test_overrides_may_stand_anywhere(config_file: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run", config_file(), "lrr=3"]) == 2
    assert "Did you mean schedule.lr" in capsys.readouterr().err


def test_a_damaged_link_is_named(
    config_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(schedule__links=1, schedule__steps=2)
    assert cli.main(["train", path]) == 0
    file = tmp_path / "run" / "links" / "000" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    for words in (
        ["eval", str(tmp_path / "run")],
        ["export", str(tmp_path / "run"), "--to", "adapter"],
        ["train", path],
    ):
        assert cli.main(words) == 2
        assert "links/000/adapter_model.safetensors is not the file this chain sealed" in capsys.readouterr().err


def test_tensorboard_when_asked(config_file: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert cli.main(["train", config_file(train__loggers=["tensorboard"], schedule__links=1, schedule__steps=2)]) == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_methods_are_listed(cola: Cola) -> None:
    from cola_fast.methods import METHODS

    listed = cola("methods").stdout
    assert all(f"{method.name} " in listed and method.paper in listed for method in METHODS.values())


@pytest.mark.slow
def test_ranks_can_be_pasted_into_a_configuration(config_file: Callable[..., str], tmp_path: Path, cola: Cola) -> None:
    import yaml

    from cola_fast import config
    from cola_fast.ranks import block_ranks, example_batches

    path = config_file(chain__targets="all-linear")
    printed = cola("ranks", path, "gelora.mean_rank=3").stdout
    assert "2 blocks, mean rank 3.00, from 96 examples" in printed
    folder = tmp_path / "run-ranks"
    assert not (tmp_path / "run").exists()
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "ranks.json").read_text())
    made = yaml.safe_load((folder / "ranks.yaml").read_text())["chain"]
    assert made["rank_pattern"] == {m: block["rank"] for block in found["blocks"] for m in block["modules"]}

    c = config.load(path)
    from cola_fast.data.rows import load_data
    from cola_fast.training.models import context_length, load_model, load_tokenizer

    model = load_model(c.model)
    data = load_data(c.data, load_tokenizer(c.model), context=context_length(model), seed=0)
    expected = block_ranks(model, example_batches(data.train, limit=1000), mean_rank=3)
    assert [b["dimension"] for b in found["blocks"]] == pytest.approx([b.dimension for b in expected])
    cola("train", path, "steps=3", f"chain.rank_pattern={json.dumps(made['rank_pattern'])}", "scaling=constant")
    ranks = json.loads((tmp_path / "run" / "chain.json").read_text())["links"][0]["ranks"]
    assert ranks == made["rank_pattern"]
    assert "cannot be a folder" in cola("ranks", path, "--out", path, check=2).stderr

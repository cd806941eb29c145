"""`cola demo`: the whole life of a chain on a real model and real data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import yaml

from . import assets, config
from .config import Config
from .report import export_run, score_run, table


def demo_config(overrides: Sequence[str] = (), *, in_4bit: bool = False) -> Config:
    """demo.yaml on the cached model and sentences, which are fetched if they are not there yet."""
    raw = yaml.safe_load(resources.files(__package__).joinpath("demo.yaml").read_text())
    raw["model"]["name"] = str(assets.smollm2())
    raw["data"] |= {split: str(path) for split, path in assets.sentiment("movie").items()}
    raw["out"] = "runs/demo-4bit" if in_4bit else "runs/demo"
    raw["model"]["load_in_4bit"] = in_4bit
    return config.from_dict(raw, overrides)


def demo(overrides: Sequence[str], train: Callable[[Config], int], *, in_4bit: bool = False) -> int:
    """Fetch, train three links, table the scores, write both exports. Running it again resumes or shows the result."""
    print("model and data: downloaded once and checked, then read from", assets.cache_folder(), flush=True)
    chosen = demo_config(overrides, in_4bit=in_4bit)
    code = train(chosen)
    if code:
        return code
    run = Path(chosen.out)
    print("\nscores on the test sentences, each model rebuilt from the run folder:\n", flush=True)
    print(table(score_run(run)), flush=True)
    for to in ("adapter", "merged"):
        if not (run / "export" / to).exists():
            print(export_run(run, to), flush=True)
    return 0

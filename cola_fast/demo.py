"""`cola demo`: the whole life of a chain on a real model and real data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from . import assets, config
from .report import export_run, score_run, table


def demo(overrides: Sequence[str], train: Callable[[Any], int]) -> int:
    """Fetch, train three links, table the scores, write both exports. Running it again resumes or shows the result."""
    raw = yaml.safe_load(resources.files(__package__).joinpath("demo.yaml").read_text())
    print("model and data: downloaded once and checked, then read from", assets.cache_folder(), flush=True)
    raw["model"]["name"] = str(assets.smollm2())
    raw["data"] |= {split: str(path) for split, path in assets.sentiment("movie").items()}
    raw["out"] = "runs/demo"
    chosen = config.from_dict(raw, overrides)
    code = train(chosen)
    if code:
        return code
    run = Path(chosen.out)
    print("\nscores on the test sentences, each model rebuilt from the run folder:\n")
    print(table(score_run(run)))
    for to in ("adapter", "merged"):
        if not (run / "export" / to).exists():
            print(export_run(run, to))
    return 0

"""What does the demo reach, and how long does it take?

Trains the demo's chain from nothing and scores it as `cola eval` does. Its plot is kept beside the result.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import harness
from .registry import Options
from .report import describe, markdown

PLOT = harness.RESULTS / "demo.png"


def run(options: Options) -> dict[str, Any]:
    from cola_fast.commands.demo import demo_config
    from cola_fast.commands.report import score_run
    from cola_fast.training.trainer import train

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        config = demo_config([f"out={out}", *(["data.limit=96"] if options.quick else [])])
        result = train(config)
        began = time.perf_counter()
        scores = score_run(out)
        if not options.quick:
            PLOT.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / "curves.png", PLOT)
    return {
        "scores": scores,
        "steps": result.steps,
        "batch_size": config.train.batch_size,
        "train_seconds": result.seconds,
        "score_seconds": time.perf_counter() - began,
    }


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = [
        [
            row["model"],
            str(row.get("rank") or ""),
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['retained']:.3f}" if row.get("retained") is not None else "",
        ]
        for row in result["scores"]
    ]
    table = markdown(["", "rank", "test loss", "test accuracy", "kept by the fold"], lines)
    note = (
        f"{result['scores'][0]['examples']} test sentences; {result['steps']} steps of {result['batch_size']}, "
        f"{result['train_seconds']:.0f} s of training with its evaluations. One seed. {describe(result)}"
    )
    return {"demo": f"{table}\n\n{note}"}

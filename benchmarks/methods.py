"""Does every method of the family learn the demo's task, and at which learning rate?

Each method with its own preset, everything else the demo's, for 80 steps. COLA's rate comes first; where a method does
not learn at it, the next of `RATES` does, until the validation sentences show that it has learnt. One seed, no sweep:
this tells whether a method works, not which one is best; `quality` does that.

A run takes a minute or two and is kept under runs/methods/: `--seconds` measures piece by piece. Remove the folder to
start afresh.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cola_fast.chain.attach import load_chain
from cola_fast.chain.chain_json import read_record
from cola_fast.commands.demo import demo_config
from cola_fast.config import Config
from cola_fast.data.rows import load_data
from cola_fast.methods import METHODS
from cola_fast.training.evaluate import evaluate
from cola_fast.training.models import context_length, load_model, load_tokenizer
from cola_fast.training.trainer import train

from . import harness
from .registry import Options
from .report import describe, markdown

WORK = harness.ROOT / "runs" / "methods"
RATES = (1e-3, 2e-4, 5e-3, 4e-5)
LEARNT = 0.75  # validation accuracy; the more frequent label alone is worth 0.615
STEPS = 80
NEEDS = {  # what a method's preset leaves to its user
    "loftq": ["load_in_4bit=true"],
    "relora": ["schedule.rewarm=5"],  # of 100 steps, for links that have 20 here
}


def run(options: Options) -> dict[str, Any]:
    began, quick = time.perf_counter(), options.quick
    folder = WORK / ("quick" if quick else "full")
    base = harness.once(folder / "base.json", lambda: _score(demo_config([]), None))
    found: list[dict[str, Any]] = []
    for name in METHODS:
        tried: list[dict[str, Any]] = []
        for rate in RATES[:1] if quick else RATES:
            out = folder / name / f"{rate:g}"
            scores = out.with_name(f"{rate:g}.json")
            if not scores.exists() and time.perf_counter() - began >= options.seconds:
                return {"base": base, "methods": found, "left": True}
            harness.say(f"{name}, {rate:g}")
            tried.append(harness.once(scores, partial(_measure, name, rate, out, quick)))
            if _learnt(tried[-1]):
                break
        found.append({"method": name, "tried": tried})
        options.keep({"base": base, "methods": found})
    return {"base": base, "methods": found}


def _learnt(scores: Mapping[str, Any]) -> bool:
    return bool(scores["validation"]["accuracy"] >= LEARNT)


def settings(name: str, rate: float) -> list[str]:
    """Overrides: the method's preset, over what demo.yaml says."""
    preset = [f"{key}={'null' if value is None else value}" for key, value in leaves(METHODS[name].defaults)]
    return [f"method={name}", "links=1", *preset, *NEEDS.get(name, ()), f"schedule.lr={rate}"]


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """`section.key` and value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _measure(name: str, rate: float, out: Path, quick: bool) -> dict[str, Any]:
    """Train and score one method; its run folder is removed."""
    config = demo_config([*settings(name, rate), f"out={out}", "epochs=null", f"steps={8 if quick else STEPS}"])
    result = train(config, quiet=True)
    ranks = sorted({rank for link in read_record(out)["links"] for rank in link["ranks"].values()})
    row = {"lr": rate, "links": result.links, "ranks": ranks, "seconds": result.seconds, **_score(config, out)}
    shutil.rmtree(out)
    return row


def _score(config: Config, chain: Path | None) -> dict[str, Any]:
    """The base, or with the chain, on both sets."""
    gc.collect()
    model = load_model(config.model)
    data = load_data(config.data, load_tokenizer(config.model), context=context_length(model), seed=config.train.seed)
    if chain is not None:
        load_chain(model, chain)
    scores = {}
    for split, examples in (("validation", data.eval), ("test", data.test)):
        found = evaluate(model, examples, batch_size=config.train.eval_batch_size)
        scores[split] = {"loss": found.loss, "accuracy": found.accuracy, "examples": found.examples}
    return scores


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = [["base", "", "", "", *_figures(result["base"])]]
    for one in result["methods"]:
        best = max(one["tried"], key=lambda row: row["validation"]["accuracy"])
        rates = ", ".join(f"{row['lr']:g}: {row['validation']['accuracy']:.3f}" for row in one["tried"])
        lines.append([one["method"], str(best["links"]), _span(best["ranks"]), rates, *_figures(best)])
    header = ["method", "links", "sealed rank", "learning rate: validation accuracy", "test loss", "test accuracy"]
    note = (
        f"SmolLM2-135M, {STEPS} steps of the demo's task, one seed; the next rate is tried where validation accuracy "
        f"stays below {LEARNT}. Which method is best does not follow from this. {describe(result)}"
    )
    return {"methods-demo": f"{markdown(header, lines)}\n\n{note}"}


def _figures(scores: Mapping[str, Any]) -> list[str]:
    return [f"{scores['test'][key]:.3f}" for key in ("loss", "accuracy")]


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

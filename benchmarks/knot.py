"""What does a knot in 4 bits keep?

A link trained on the demo's task over NF4 weights is folded into them. The gain is what training took off the test
loss; kept is the share of it that is left after the knot. PEFT's merge_and_unload of the same link, in the same 4-bit
weights, stands beside it.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cola_fast import load_chain
from cola_fast.chain.bases import choose_base
from cola_fast.commands.demo import demo_config
from cola_fast.config import Config
from cola_fast.data.rows import load_data
from cola_fast.layers import weights
from cola_fast.training.evaluate import Score, evaluate
from cola_fast.training.models import context_length, load_model, load_tokenizer
from cola_fast.training.trainer import train

from . import harness
from .charts import Bar, Chart
from .registry import Options
from .report import describe, markdown

WAYS = {  # base kind and rounding
    "ledger": ("ledger", "auto"),
    "in place, stochastic": ("nf4", "stochastic"),
    "in place, nearest": ("nf4", "nearest"),
}
PEFT = "PEFT merge_and_unload"


def run(options: Options) -> dict[str, Any]:
    quick = options.quick
    seeds = range(1 if quick else 3)
    return {"kept": [_kept(seed, quick) for seed in seeds]}


def _kept(seed: int, quick: bool) -> dict[str, Any]:
    """One link of the demo's task on NF4 weights, and what each knot makes of it."""
    harness.say(f"gain kept, seed {seed}")
    steps = 4 if quick else 60
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"out={folder}/run", f"train.seed={seed}", "load_in_4bit=true", "base=ledger", "links=1"]
        config = demo_config([*settings, "epochs=null", f"steps={steps}"])
        train(config, quiet=True)
        score = _scorer(config)
        rows = {"base": score(load_model(config.model))}
        for name, (kind, rounding) in WAYS.items():
            harness.say(f"seed {seed}: {name}")
            model = load_model(config.model)
            chain = load_chain(model, Path(folder) / "run", links=0)
            chain.base = choose_base(kind, rounding, chain.layers.values())
            chain.replay(1)
            rows[name] = score(model)
            del chain, model
            gc.collect()
        rows[PEFT] = score(_merged_by_peft(config, Path(folder) / "run" / "links" / "000"))
    return {"seed": seed, "steps": steps, "scores": rows, "gain_kept": _gains(rows)}


def _scorer(config: Config) -> Callable[[nn.Module], dict[str, Any]]:
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer, context=2048, seed=config.train.seed)

    def score(model: nn.Module) -> dict[str, Any]:
        assert context_length(model) >= 2048
        found: Score = evaluate(model, data.test, batch_size=config.train.eval_batch_size)
        return {"loss": found.loss, "accuracy": found.accuracy}

    return score


def _merged_by_peft(config: Config, adapter: Path) -> nn.Module:
    from peft import PeftModel

    merged: nn.Module = PeftModel.from_pretrained(load_model(config.model), str(adapter)).merge_and_unload()
    weights.hold(merged)  # PEFT makes new layers
    return merged


def _gains(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The ledger is exact: its loss is that of the trained link."""
    before, trained = rows["base"]["loss"], rows["ledger"]["loss"]
    return {name: (before - row["loss"]) / (before - trained) for name, row in rows.items() if name != "base"}


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    return {"knot-kept": f"{_kept_table(result['kept'])}\n\n{_kept_note(result['kept'])} {describe(result)}"}


def charts(result: Mapping[str, Any]) -> list[Chart]:
    runs, rows = result["kept"], []
    for name in runs[0]["gain_kept"]:
        gains = [run["gain_kept"][name] for run in runs]
        rows.append((name, [Bar("gain kept", sum(gains) / len(gains), min(gains), max(gains))]))
    unit = f"share of the link's gain, mean of {len(runs)} seeds with the lowest and the highest"
    return [Chart("What a knot keeps in four bits", unit, rows, floor=(1.0, "all of it"))]


def _kept_table(runs: list[Mapping[str, Any]]) -> str:
    lines = []
    for name in runs[0]["scores"]:
        losses, accuracies = (", ".join(f"{r['scores'][name][key]:.3f}" for r in runs) for key in ("loss", "accuracy"))
        gains = ", ".join(f"{r['gain_kept'][name]:.3f}" for r in runs) if name != "base" else ""
        lines.append([name, losses, accuracies, gains])
    return markdown(["after the knot", "test loss", "test accuracy", "gain kept"], lines)


def _kept_note(runs: list[Mapping[str, Any]]) -> str:
    return (
        f"SmolLM2-135M in NF4 (double quantisation), one link of rank 8 on all linears, {runs[0]['steps']} steps of "
        f"the demo's task; one figure a seed ({', '.join(str(r['seed']) for r in runs)})."
    )

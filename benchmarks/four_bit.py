"""Does a chain on 4-bit weights keep what its links learn, knot after knot?

Three links of the demo's task on SmolLM2-135M in NF4, and eight shorter ones with the same steps in all: with a ledger,
with each link folded into the codes, and PEFT's way beside them (train an adapter, merge_and_unload, a new adapter).

A run takes minutes and leaves its folder under runs/four_bit/, so `--seconds` measures piece by piece: what has been
run is not run again, and a run that was killed goes on. Remove the folder to start afresh.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola_fast import load_chain
from cola_fast.chain.chain import Chain
from cola_fast.commands.demo import demo_config
from cola_fast.config import Config
from cola_fast.data.batches import Batch
from cola_fast.data.loss import batch_loss, needed_logits
from cola_fast.data.rows import Data, load_data
from cola_fast.layers import weights
from cola_fast.training.evaluate import evaluate
from cola_fast.training.models import context_length, load_model, load_tokenizer
from cola_fast.training.prepare import prepare
from cola_fast.training.trainer import train

from . import harness
from .registry import Options
from .report import describe, markdown

WORK = harness.ROOT / "runs" / "four_bit"
BASES = {"ledger": "ledger", "in place": "nf4"}
PEFT = "PEFT merge_and_unload"
SHORT, LONG, STEPS = 3, 8, 80  # links of either chain, and the steps of each in all


def run(options: Options) -> dict[str, Any]:
    began, quick, runs = time.perf_counter(), options.quick, []
    base = harness.once(_folder("base", quick) / "scores.json", lambda: _base(quick))
    cases = [(SHORT, arm, seed) for seed in range(3) for arm in (*BASES, PEFT)]
    cases += [(LONG, arm, seed) for seed in range(3) for arm in BASES]
    for links, arm, seed in cases:
        if quick and seed:
            continue
        folder = _folder(f"{links}-{arm.split()[0]}-{seed}", quick)
        scores = folder / "scores.json"
        if scores.exists() or time.perf_counter() - began < options.seconds:
            harness.say(f"{links} links, {arm}, seed {seed}")
            measure = partial(_peft if arm == PEFT else _ours, _config(links, arm, seed, folder / "run", quick=quick))
            runs.append({"links": links, "arm": arm, "seed": seed, **harness.once(scores, measure)})
            options.keep({"base": base, "runs": runs})
    return {"base": base, "runs": runs}


def _folder(name: str, quick: bool) -> Path:
    return WORK / ("quick" if quick else "full") / name


def _config(links: int, arm: str, seed: int, out: Path, *, quick: bool) -> Config:
    settings = [f"out={out}", f"train.seed={seed}", f"links={links}", "load_in_4bit=true", "save_every=10"]
    settings += [f"base={BASES.get(arm, 'auto')}", "data.eval=null", "eval_share=0"]
    return demo_config([*settings, "epochs=null", f"steps={8 if quick else STEPS}"])


Score = Callable[[nn.Module], dict[str, float | None]]


def _prepare(config: Config) -> tuple[nn.Module, Data, Score]:
    model = load_model(config.model)
    data = load_data(config.data, load_tokenizer(config.model), context=context_length(model), seed=config.train.seed)

    def score(scored: nn.Module) -> dict[str, float | None]:
        found = evaluate(scored, data.test, batch_size=config.train.eval_batch_size)
        return {"loss": found.loss, "accuracy": found.accuracy}

    return model, data, score


def _base(quick: bool) -> dict[str, Any]:
    model, _, score = _prepare(_config(SHORT, PEFT, 0, WORK / "none", quick=quick))
    return dict(score(model))


def _ours(config: Config) -> dict[str, Any]:
    """Each link, before and after its knot. Of a long chain the last one alone."""
    train(config, quiet=True)
    gc.collect()
    model, _, score = _prepare(config)
    chain, links, knots = load_chain(model, config.out, links=0), config.schedule.links, []
    for index in range(links):
        if links == LONG and index < links - 1:
            chain.replay(1)
        else:
            with _opened(chain):
                before = score(model)
            chain.replay(1)
            knots.append({"link": index + 1, "before": before, "after": score(model)})
    return {"knots": knots}


@contextmanager
def _opened(chain: Chain) -> Iterator[None]:
    """The next link as it was trained, beside the weights."""
    chain.open_with({name: trained for name, (_, trained) in chain.waiting[0].steps().items()})
    yield
    chain.open_link = None
    for layer in chain.layers.values():
        layer.close()


def _peft(config: Config) -> dict[str, Any]:
    """The same task, batches and learning rates with PEFT alone."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, data, score = _prepare(config)
    schedule, feed = prepare(config, data)
    c = config.chain
    lora = LoraConfig(r=c.r, lora_alpha=c.alpha, target_modules=c.targets, task_type="CAUSAL_LM")
    knots, first = [], 0
    for span in schedule.spans:
        adapter, batches = Path(config.out) / f"{span.index}", list(islice(feed, span.steps))
        if adapter.exists():
            wrapped = PeftModel.from_pretrained(model, str(adapter))
        else:
            torch.manual_seed(config.train.seed + span.index)
            wrapped = get_peft_model(model, lora)
            rates = [schedule.lr(first + step, span.index, first) for step in range(span.steps)]
            _train_peft(wrapped, batches, rates, config)
            wrapped.save_pretrained(str(adapter))
        before = score(wrapped.get_base_model().eval())
        model = wrapped.merge_and_unload()
        weights.hold(model)  # PEFT makes new layers
        knots.append({"link": span.index + 1, "before": before, "after": score(model)})
        first += span.steps
    return {"knots": knots}


def _train_peft(wrapped: Any, batches: list[Batch], rates: list[float], config: Config) -> None:
    """Our trainer's step in its plainest form."""
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=config.train.betas, eps=config.train.eps, weight_decay=0.0)
    model = wrapped.get_base_model().train()
    for batch, lr in zip(batches, rates, strict=True):
        (batch_loss(needed_logits(model, batch), batch)[0] / batch.labelled).backward()
        if config.train.clip is not None:
            nn.utils.clip_grad_norm_(parameters, config.train.clip)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    base = result["base"]["loss"]
    chains = {
        (links, arm): [run["knots"] for run in result["runs"] if (run["links"], run["arm"]) == (links, arm)]
        for links in (SHORT, LONG)
        for arm in (*BASES, PEFT)
    }

    def note(links: int) -> str:
        seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in result["runs"] if r["links"] == links}))
        return (
            f"SmolLM2-135M in NF4 (double quantisation), {links} links of rank 8 on all linears, {STEPS} steps of the "
            f"demo's task in all; the base's test loss is {base:.3f}; one figure a seed ({seeds}). {describe(result)}"
        )

    blocks = {"four_bit-knots": f"{_knots(chains, base)}\n\n{note(SHORT)}"}
    if any(run["links"] == LONG for run in result["runs"]):
        blocks["four_bit-chain"] = f"{_long(chains, base)}\n\n{note(LONG)}"
    return blocks


Knots = list[Mapping[str, Any]]


def _knots(chains: Mapping[tuple[int, str], list[Knots]], base: float) -> str:
    lines = []
    for arm in (*BASES, PEFT):
        for index in range(SHORT):
            knots = [each[index] for each in chains[SHORT, arm]]
            before, after = (_each([knot[when]["loss"] for knot in knots]) for when in ("before", "after"))
            accuracy = _each([knot["after"]["accuracy"] for knot in knots])
            kept = _each([_gain(base, knot["after"]) / _gain(base, knot["before"]) for knot in knots])
            lines.append([f"{arm}, knot {index + 1}", before, after, accuracy, kept])
    return markdown(["", "test loss before the knot", "after it", "test accuracy after it", "gain kept"], lines)


def _long(chains: Mapping[tuple[int, str], list[Knots]], base: float) -> str:
    lines = []
    for arm in BASES:
        last, exact = ([each[-1]["after"] for each in chains[LONG, kind]] for kind in (arm, "ledger"))
        share = [_gain(base, one) / _gain(base, other) for one, other in zip(last, exact, strict=False)]
        lines.append([arm, *(_each([row[key] for row in last]) for key in ("loss", "accuracy")), _each(share)])
    return markdown([f"after {LONG} links", "test loss", "test accuracy", "gain, of the ledger's"], lines)


def _gain(base: float, score: Mapping[str, float]) -> float:
    """What the chain has taken off the base's test loss."""
    return base - score["loss"]


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)

"""What does `accelerate_peft` take off a training step of a PEFT model?

One PEFT model on the demo's model and data, in turn as PEFT runs it and as `accelerate_peft` does. A step is what
everybody's loop does: the loss as transformers' model computes it, backward, clipping, AdamW (fused). Base weights are
bf16 where the device multiplies it natively, and NF4 if bitsandbytes is installed; adapters on all linears, in fp32,
PEFT's default.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor, nn

from cola_fast import accelerate_peft, restore_peft
from cola_fast.config import Config
from cola_fast.data.encode import Example
from cola_fast.layers import weights
from cola_fast.training.models import resolve_dtype
from cola_kernels import nf4_dequantize

from . import harness, trainers, workloads
from .registry import Options
from .report import Quoted, describe, markdown

BASES = {"dense": False, "NF4": True}  # load_in_4bit
DROPOUTS = (0.0, 0.05)
STEPS = 2  # a sample
Inputs = Mapping[str, Tensor]


def run(options: Options) -> dict[str, Any]:
    began, problem = time.monotonic(), trainers.Problem(workloads.demo(STEPS, "auto"))
    size = problem.config.train.batch_size
    batches = [_inputs(problem.rows[i * size : (i + 1) * size]) for i in range(STEPS)]
    shortest = min(len(row[0]) for row in problem.rows)
    alike = _inputs([row for row in problem.rows if len(row[0]) == shortest])  # fp64 makes NaN of padding
    measured: dict[str, Any] = {
        "dtype": str(resolve_dtype("auto", harness.device())).removeprefix("torch."),
        "attention": problem.attention,
        "tokens_per_step": sum(problem.tokens) / STEPS,
        "timed_steps": STEPS,
        "rows": [],
    }
    for base, in_4bit in BASES.items():
        if in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            continue  # the table says so
        config = replace(problem.config, model=replace(problem.config.model, load_in_4bit=in_4bit))
        parity = _parity(base, config, alike)
        for dropout in DROPOUTS:
            if time.monotonic() - began > options.seconds:
                break
            harness.say(f"{base}, dropout {dropout:g}")
            chosen = replace(config, chain=replace(config.chain, dropout=dropout))
            model = trainers.peft_model(chosen).train()
            samples = _sample(model, chosen, batches, rounds=2 if options.quick else 9)
            measured["rows"].append(
                {"base": base, "dropout": dropout, "parity": parity, **harness.summarise(samples, "accelerated")}
            )
            options.keep(measured)
    return measured


def _inputs(rows: list[list[Example]]) -> Inputs:
    return {key: tensor.to(harness.device()) for key, tensor in trainers.inputs(rows).items()}


def _sample(model: nn.Module, config: Config, batches: list[Inputs], *, rounds: int) -> dict[str, list[float]]:
    step = _step(model, config, batches)

    def seconds(switch: Callable[[nn.Module], Any]) -> float:
        switch(model)
        return harness.timed(step, STEPS)

    return harness.interleave(
        {"peft": partial(seconds, restore_peft), "accelerated": partial(seconds, accelerate_peft)}, rounds=rounds
    )


def _step(model: nn.Module, config: Config, batches: list[Inputs]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.schedule.lr, fused=True)
    following = cycle(batches)

    def step() -> None:
        model(**next(following), use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trained, config.train.clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- parity -----------------------------------------------------------------------------------------------------------


def _parity(base: str, config: Config, batch: Inputs) -> dict[str, float]:
    """Logits and all gradients of the accelerated model within the error rule, without dropout."""
    model = trainers.peft_model(config).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where A has no gradient
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    eager = _passes(model, batch)
    accelerate_peft(model)
    found = _passes(model, batch)
    return harness.require_parity(f"{base}, accelerated", found, eager, _passes(_in_fp64(model, config), batch))


def _passes(model: nn.Module, batch: Inputs) -> dict[str, Tensor]:
    output = model(**batch, use_cache=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(output.loss, list(trained.values())), strict=True))
    parts = {f"d{kind}": [g.flatten() for name, g in grads.items() if f"lora_{kind}" in name] for kind in "AB"}
    return {"logits": output.logits.detach()} | {name: torch.cat(flat) for name, flat in parts.items()}


def _in_fp64(model: nn.Module, config: Config) -> nn.Module:
    """What the weights of `model` stand for, 4-bit ones too, in a plain PEFT model."""
    dense = replace(config, model=replace(config.model, load_in_4bit=False))
    truth: nn.Module = trainers.peft_model(dense).train().double()
    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            quantised = key == "weight" and weights.of(module).quantised
            exact = nf4_dequantize(value, torch.float32) if quantised else value.detach()
            truth.get_submodule(name).get_parameter(key).data.copy_(exact)
    return truth


def quoted(result: Mapping[str, Any]) -> dict[str, Quoted]:
    return {"drop_in": Quoted("accelerated / PEFT", [row["ratio"]["peft"]["median"] for row in result["rows"]])}


# --- table ------------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    rows = {(row["base"], row["dropout"]): row for row in result["rows"]}
    lines = []
    for base, dropout in product(BASES, DROPOUTS):
        what = f"{result['dtype'] if base == 'dense' else base}, dropout {dropout:g}"
        row = rows.get((base, dropout))
        if row is None:
            lines.append([what, "not measured", "", ""])
            continue
        spreads = [harness.Spread(**row["seconds"][side]) for side in ("peft", "accelerated")]
        ratio = harness.Spread(**row["ratio"]["peft"])
        lines.append(
            [
                what,
                *(f"{spread.median:.3f} ({spread.q1:.3f} to {spread.q3:.3f})" for spread in spreads),
                f"**{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})**",
            ]
        )
    table = markdown(["base weights", "PEFT, s / step", "accelerated, s / step", "accelerated / PEFT"], lines)
    note = (
        f"SmolLM2-135M on the demo's sentences, fp32 adapters on all linears, {result['attention']} attention, "
        f"{result['tokens_per_step']:.0f} tokens a step, logits of every position as transformers computes them; "
        f"medians of {len(result['rows'][0]['samples']['peft'])} interleaved pairs of {result['timed_steps']} steps. "
        "Before any timing, logits and gradients were within the error rule."
    )
    return {"drop_in": f"{table}\n\n{note} {describe(result)}"}

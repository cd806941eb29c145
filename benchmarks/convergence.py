"""Do the Triton kernels train, compile and replay like the reference?

**Curves**: a small Llama learns a Markov chain for 200 steps, by the Triton kernels and by the reference, with two
seeds of adapters and dropout. The two ways differ in rounding alone, so that their losses should lie no further apart
than those of two seeds.

**Compiled**: torch.compile(fullgraph=True) of the same model gives the same loss and gradients.

**Replayed**: a CUDA graph of its forward and backward gives the gradients of a plain run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cola_fast import attach
from cola_kernels import backend, small

from . import harness
from .registry import Options
from .report import describe, markdown

SEEDS = (0, 1)
VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    layers: int = 4
    sequences: int = 16
    length: int = 128
    steps: int = 200


TINY = Size(16, 1, 1, 4, 2)


def run(options: Options) -> dict[str, Any]:
    size = TINY if options.quick else Size()
    dtype = torch.bfloat16 if harness.device().type == "cuda" else torch.float32
    began = time.monotonic()
    losses: dict[str, list[float]] = dict(options.found.get("losses", {}))
    measured: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "steps": size.steps, "losses": losses}
    probes = {"compiled": _compiled, "replayed": _replayed}
    measured |= {name: options.found[name] for name in probes if options.found.get(name, {}).get("passed")}
    for way, seed in product(("reference", "triton"), SEEDS):
        if f"{way} {seed}" in losses or time.monotonic() - began > options.seconds:
            continue
        with _way(way):
            losses[f"{way} {seed}"] = _train(size, dtype, seed)
        options.keep(measured)
    left = 2 * len(SEEDS) - len(losses)
    if not left:
        measured["curves"] = _compare(losses)
    for name, probe in probes.items():
        if name in measured:
            continue
        if left or time.monotonic() - began > options.seconds:
            left += 1
            continue
        harness.say(name)
        with _way("triton"):
            measured[name] = _attempt(probe, size, dtype)
        options.keep(measured)
    refused = [name for name in ("curves", *probes) if measured.get(name, {}).get("passed") is False]
    refused_rows = [{"case": name, "reason": measured[name]} for name in refused]
    return {**measured, "refused": refused_rows, "left": left}


@contextmanager
def _way(name: str) -> Iterator[None]:
    """All of the model by the reference, or by the kernels however little the work. On a CPU the kernels must be
    interpreted; where they are not, both ways are the reference."""
    kernels = "triton" if harness.device().type == "cuda" or backend.INTERPRET else "torch"
    with (
        patch.object(backend, "BACKEND", "torch" if name == "reference" else kernels),
        patch.object(small, "LAUNCH_BOUND", 0),
    ):
        yield


def _attempt(probe: Callable[[Size, torch.dtype], dict[str, Any]], size: Size, dtype: torch.dtype) -> dict[str, Any]:
    try:
        return probe(size, dtype)
    except Exception as error:  # a finding, which must not cost the ones before it
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}


# --- the model and its task -------------------------------------------------------------------------------------------


def _model(size: Size, dtype: torch.dtype, seed: int, dropout: float) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)  # one base for all
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=size.length,
    )
    model = LlamaForCausalLM(config).to(harness.device(), dtype)
    chain = attach(model, r=8, alpha=16, targets="all-linear", dropout=dropout, seed=seed)
    torch.manual_seed(seed)
    return model.train(), chain


def _tokens(size: Size, step: int) -> Tensor:
    """Sequences in which a token has four possible successors."""
    generator = torch.Generator().manual_seed(step)
    successors = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    tokens = [torch.randint(VOCABULARY, (size.sequences,), generator=generator)]
    for _ in range(size.length - 1):
        tokens.append(successors[tokens[-1], torch.randint(4, (size.sequences,), generator=generator)])
    return torch.stack(tokens, dim=1).to(harness.device())


def _train(size: Size, dtype: torch.dtype, seed: int) -> list[float]:
    model, chain = _model(size, dtype, seed, dropout=0.05)
    parameters = list(chain.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for step in range(size.steps):
        tokens = _tokens(size, step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def _compare(losses: Mapping[str, list[float]]) -> dict[str, Any]:
    """Mean distances of curves: of the two ways with one seed, and of the two seeds in one way."""

    def distance(a: str, b: str) -> float:
        return statistics.fmean(abs(x - y) for x, y in zip(losses[a], losses[b], strict=True))

    ways = max(distance(f"triton {seed}", f"reference {seed}") for seed in SEEDS)
    seeds = distance(*(f"reference {seed}" for seed in SEEDS))
    return {"between_ways": ways, "between_seeds": seeds, "passed": ways <= seeds}


def _compiled(size: Size, dtype: torch.dtype) -> dict[str, Any]:
    model, chain = _model(size, dtype, 0, dropout=0.0)
    _disturb(chain)
    tokens = _tokens(size, 0)
    compiler = "inductor" if harness.device().type == "cuda" else "aot_eager"
    began = time.monotonic()
    whole = torch.compile(model, fullgraph=True, backend=compiler)
    found = _loss_and_gradients(whole, chain, tokens)
    seconds = time.monotonic() - began
    return {"backend": compiler, "seconds": seconds, **_same(found, _loss_and_gradients(model, chain, tokens), dtype)}


def _replayed(size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """Two replays with dropout: the same as a plain run if the generator is where it was, and new masks each time."""
    if harness.device().type != "cuda":
        return {"skipped": "no GPU"}
    model, chain = _model(size, dtype, 0, dropout=0.05)
    _disturb(chain)
    tokens = _tokens(size, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _loss_and_gradients(model, chain, tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _loss_and_gradients(model, chain, tokens)
    torch.manual_seed(3)
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    second = [t.clone() for t in captured]
    torch.manual_seed(3)
    found = _same(first, _loss_and_gradients(model, chain, tokens), dtype)
    found["new_masks"] = not torch.equal(first[0], second[0])
    found["passed"] = found["passed"] and found["new_masks"]
    return found


def _disturb(chain: Any) -> None:
    with torch.no_grad():
        for layer in chain.layers.values():
            layer.lora_B.normal_(0, 0.05)


def _loss_and_gradients(model: Any, chain: Any, tokens: Tensor) -> list[Tensor]:
    loss = model(input_ids=tokens, labels=tokens).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(chain.parameters()))]


def _same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Relative differences (Frobenius norm), of which eight spacings of the dtype are allowed: one for each linear and
    norm that a gradient has passed on its way through a block."""
    allowed = 8 * torch.finfo(dtype).eps
    off = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]
    worst = max(off)
    return {"loss": off[0], "worst_gradient": worst, "allowed": allowed, "passed": bool(worst <= allowed)}


# --- table ------------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    lines = []
    if "curves" in result:
        c = result["curves"]
        between = f"{c['between_ways']:.4f} apart; two seeds {c['between_seeds']:.4f}"
        lines.append([f"loss curves of {result['steps']} steps, Triton and reference", between, _verdict(c)])
    for name, title in (
        ("compiled", "torch.compile(fullgraph=True) and plain"),
        ("replayed", "CUDA graph and plain run"),
    ):
        probe = result.get(name, {})
        if "passed" in probe:
            off = (
                f"{probe['worst_gradient']:.1e} apart ({probe['allowed']:.1e} allowed)" if "loss" in probe else "failed"
            )
            lines.append([title, off, _verdict(probe)])
    return {"convergence": f"{markdown(['', result['dtype'], ''], lines)}\n\n{describe(result)}"}


def _verdict(found: Mapping[str, Any]) -> str:
    return "passed" if found["passed"] else "FAILED"

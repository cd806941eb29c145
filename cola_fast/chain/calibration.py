"""Looking at a model while it computes a few training batches: what EVA and LoRA-GA start a link from.

The model runs in eval mode (no dropout, no activation checkpointing), random state is put back, and nothing of it
changes: so a run that is killed and looks again sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batches import Batch, collate
from ..data.encode import Example
from ..data.loss import batch_loss, needed_logits
from ..errors import UserError
from ..layers.layer import LoRALinear, factor_dtype
from ..layers.torch_modes import evaluating
from ..methods import Wants, wanted_by


class Sample(NamedTuple):
    """One batch to look at."""

    loss: Callable[[nn.Module], Tensor]  # runs the model
    real: Tensor | None = None  # [B, T], nonzero where a token is not padding; None: all are real


Batches = Iterable[Mapping[str, Tensor] | Sample]


def as_batches(batches: Batches) -> list[Mapping[str, Tensor] | Sample]:
    """Raises UserError for anything but batches as the model's forward takes them."""
    found: list[Any] = list(batches) if isinstance(batches, Iterable) and not isinstance(batches, Tensor) else [batches]
    wrong = next((type(batch).__name__ for batch in found if not isinstance(batch, Mapping | Sample)), None)
    if wrong is not None:
        raise UserError(
            f"batches is a {type(batches).__name__} of {wrong}, but must be a list of what the model takes: "
            "[{'input_ids': ..., 'attention_mask': ...}, ...]."
        )
    return found


def look(
    init: str,
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    ranks: Mapping[str, int],
    batches: Sequence[Mapping[str, Tensor] | Sample],
    seed: int,
) -> dict[str, Any]:
    """Module -> what the init's `see` made of all batches, if it has one. The layers must have no open link.

    Raises UserError if there are no batches, if one gives no loss or a loss that is not finite, or if none passes
    through a module.
    """
    wants = wanted_by(init)
    if wants.see is None:
        return {}
    if not batches:
        raise UserError(f"init {init} starts from training data: give attach or extend a few `batches`.")
    device = next(model.parameters()).device
    seen: dict[str, Any] = {}
    if wants.gradients:
        _open_zeros(layers)
    streams = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        with evaluating(model), streams, torch.set_grad_enabled(wants.gradients):
            torch.manual_seed(seed)
            for batch in batches:
                sample = batch if isinstance(batch, Sample) else _sample(batch, device, wants)
                _run(model, layers, ranks, sample, wants, seen)
    finally:
        for layer in layers.values():
            layer.close()
    unseen = next((name for name in layers if name not in seen), None)
    if unseen is not None:
        raise UserError(f"No batch passed through {unseen}, so its link has nothing to start from: give other batches.")
    return seen


def _run(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    ranks: Mapping[str, int],
    sample: Sample,
    wants: Wants,
    seen: dict[str, Any],
) -> None:
    assert wants.see is not None
    see = wants.see

    def take(name: str, x: Tensor, dy: Tensor | None) -> None:
        x, dy = _rows(x, sample.real), None if dy is None else _rows(dy, sample.real)
        seen[name] = see(seen.get(name), ranks[name], x, dy)

    def hook(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x = inputs[0].detach()
        if wants.gradients:
            y.register_hook(lambda dy: take(name, x, dy))  # within backward, layer by layer: x goes when it is done
        else:
            take(name, x, None)

    hooks = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        loss = sample.loss(model)
        if wants.gradients:
            if not torch.isfinite(loss):
                raise UserError(f"The loss of a batch to start from is {loss.item()}: look for a bad row in the data.")
            loss.backward()
    finally:
        for handle in hooks:
            handle.remove()


def _open_zeros(layers: Mapping[str, LoRALinear]) -> None:
    """A link that adds nothing, for two reasons: every output has a gradient, also before the first trained parameter;
    and 4-bit weights go through the fused op, which keeps no dense copy for backward."""
    for layer in layers.values():
        dtype = factor_dtype(layer.weight)
        a, b = torch.zeros(1, layer.in_features, dtype=dtype), torch.zeros(layer.out_features, 1, dtype=dtype)
        layer.open(a, b, scale=1.0, dropout=0.0)
        assert layer.lora_A is not None
        layer.lora_A.requires_grad_(False)


def _rows(states: Tensor, real: Tensor | None) -> Tensor:
    """[M, ...]: without the padding, where there is a row a token."""
    if real is not None and states.shape[:-1] == real.shape:
        return states[real.to(states.device).bool()]
    return states.flatten(0, -2)


def _sample(batch: Mapping[str, Tensor], device: torch.device, wants: Wants) -> Sample:
    def loss(model: nn.Module) -> Tensor:
        found: Tensor | None = getattr(model(**{key: value.to(device) for key, value in batch.items()}), "loss", None)
        if found is None and wants.gradients:
            raise UserError("A batch to start from gives no loss: put labels into it.")
        return torch.zeros(()) if found is None else found

    return Sample(loss, batch.get("attention_mask"))


def draw(examples: Sequence[Example], count: int, size: int, seed: int) -> list[Sample]:
    """`count` random training examples in batches of `size`, the same for the same seed."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    chosen = sorted((examples[i] for i in order[:count].tolist()), key=len)
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [_of_examples(batch) for batch in batches]


def _of_examples(examples: Sequence[Example]) -> Sample:
    batch = collate([[example] for example in examples])
    lengths = torch.tensor([len(example) for example in examples])
    real = batch.attention_mask
    if real is None:
        real = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
    return Sample(partial(_loss, batch), real)


def _loss(batch: Batch, model: nn.Module) -> Tensor:
    """A sum over tokens, so that all weigh the same whichever batch they are in."""
    batch = batch.to(next(model.parameters()).device)
    return batch_loss(needed_logits(model, batch), batch)[0]

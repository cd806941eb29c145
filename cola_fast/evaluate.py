"""How good a model is on a set of examples: loss per token, and accuracy where the examples are to be classified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import world
from .batches import Batch, batch_loss, candidate_scores, choice_batches, eval_batches
from .encode import Example
from .layout import wants_flat
from .models import needed_logits
from .modes import evaluating

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    loss: float  # nats per labelled token
    accuracy: float | None  # share of examples whose gold label is the likeliest candidate
    examples: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}" + ("" if self.accuracy is None else f", accuracy {self.accuracy:.3f}")


@torch.no_grad()
def evaluate(
    model: Any, examples: Sequence[Example], *, batch_size: int, tell: Callable[[float], object] | None = None
) -> Score:
    """Leaves the model in its mode and draws no random numbers: training goes on as if it had not happened. Several
    processes share the batches, and all get the score.

    tell: called after every batch with the share of all tokens that is done, such as a `Progress`.
    """
    device = next(model.parameters()).device
    total, correct = torch.zeros(2, dtype=torch.float64, device=device)
    labelled = 0
    with evaluating(model):
        if examples[0].candidates:
            choices = choice_batches(examples, batch_size)
            for choice, counts in world.dealt(_told(choices, lambda choice: choice.batch, tell)):
                choice = choice.to(device)
                scores = candidate_scores(needed_logits(model, choice.batch), choice)  # [E, C]
                if counts:
                    total -= scores.gather(1, choice.answers[:, None]).sum(dtype=torch.float64)
                    correct += (scores.argmax(1) == choice.answers).sum()
                    labelled += choice.gold_tokens
        else:
            batches = eval_batches(examples, batch_size, flat=wants_flat(model))
            for batch, counts in world.dealt(_told(batches, lambda batch: batch, tell)):
                batch = batch.to(device)
                loss, count = batch_loss(needed_logits(model, batch), batch)
                if counts:
                    total += loss
                    labelled += count
    sums = torch.stack([total, correct, total.new_tensor(labelled)])
    world.sum_([sums])
    loss_sum, right, count = sums.tolist()
    return Score(loss_sum / count, right / len(examples) if examples[0].candidates else None, len(examples))


def _told(items: Iterable[T], batch: Callable[[T], Batch], tell: Callable[[float], object] | None) -> Iterator[T]:
    """The same items. An item is done when the next one is asked for."""
    if tell is None:
        yield from items
        return
    everything = list(items)
    done, total = 0, sum(batch(item).tokens for item in everything)
    for item in everything:
        yield item
        done += batch(item).tokens
        tell(done / total)

"""How good a model is on a set of examples: loss per token, and accuracy where the examples are to be classified."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import world
from ..data.batches import choice_batches, eval_batches
from ..data.encode import Example
from ..data.loss import batch_loss, candidate_scores, needed_logits
from ..layers.torch_modes import evaluating
from .batch_checks import wants_flat

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    loss: float  # nats per labelled token
    accuracy: float | None  # share of the labels that are the likeliest candidate, or the head's likeliest class
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
    classes = examples[0].head
    with evaluating(model):
        if examples[0].candidates:
            choices = choice_batches(examples, batch_size)
            for choice, counts in world.dealt(_told(choices, lambda choice: len(choice.answers), examples, tell)):
                choice = choice.to(device)
                scores = candidate_scores(needed_logits(model, choice.batch), choice)  # [E, C]
                if counts:
                    total -= scores.gather(1, choice.answers[:, None]).sum(dtype=torch.float64)
                    correct += (scores.argmax(1) == choice.answers).sum()
                    labelled += choice.gold_tokens
        else:
            batches = eval_batches(examples, batch_size, flat=wants_flat(model))
            for batch, counts in world.dealt(_told(batches, lambda _: batch_size, examples, tell)):
                batch = batch.to(device)
                logits = needed_logits(model, batch)
                loss, count = batch_loss(logits, batch)
                if counts:
                    total += loss
                    labelled += count
                    if classes:
                        correct += (logits.argmax(-1) == batch.targets).sum()
    sums = torch.stack([total, correct, total.new_tensor(labelled)])
    world.sum_([sums])
    loss_sum, right, count = sums.tolist()
    labels = len(examples) if examples[0].candidates else count
    return Score(loss_sum / count, right / labels if examples[0].candidates or classes else None, len(examples))


def _told(
    batches: Iterable[T], sizes: Callable[[T], int], examples: Sequence[Example], tell: Callable[[float], object] | None
) -> Iterator[T]:
    """The same batches, which take the longest examples first. One is done when the next is asked for."""
    tokens = list(itertools.accumulate(sorted(map(len, examples), reverse=True)))
    done = 0
    for batch in batches:
        yield batch
        done = min(done + sizes(batch), len(tokens))
        if tell is not None:
            tell(tokens[done - 1] / tokens[-1])

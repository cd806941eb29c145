"""How good a model is on a set of examples: loss per token, and accuracy where the examples are to be classified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .batches import batch_loss, candidate_scores, choice_batches, eval_batches, wants_flat
from .data import Example
from .models import needed_logits


@dataclass(frozen=True)
class Score:
    loss: float  # nats per labelled token
    accuracy: float | None  # share of examples whose gold label is the likeliest candidate
    examples: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}" + ("" if self.accuracy is None else f", accuracy {self.accuracy:.3f}")


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], *, batch_size: int) -> Score:
    """Leaves the model in its mode and draws no random numbers: training goes on as if it had not happened."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    labelled = 0
    try:
        if examples[0].candidates:
            for choice in choice_batches(examples, batch_size):
                choice = choice.to(device)
                scores = candidate_scores(needed_logits(model, choice.batch), choice)  # [E, C]
                total -= scores.gather(1, choice.answers[:, None]).sum(dtype=torch.float64)
                correct += (scores.argmax(1) == choice.answers).sum()
                labelled += choice.gold_tokens
        else:
            for batch in eval_batches(examples, batch_size, flat=wants_flat(model)):
                batch = batch.to(device)
                loss, count = batch_loss(needed_logits(model, batch), batch)
                total += loss
                labelled += count
    finally:
        model.train(training)
    accuracy = correct.item() / len(examples) if examples[0].candidates else None
    return Score(total.item() / labelled, accuracy, len(examples))

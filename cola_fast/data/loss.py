"""What is computed from a model's logits: asking for just those that are needed, the loss, the scores of candidates."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .batches import Batch, ChoiceBatch
from .encode import IGNORE


def inputs(batch: Any) -> dict[str, Any]:
    """What a model is called with."""
    given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    optional = {key: value for key, value in given.items() if value is not None}
    return {"input_ids": batch.input_ids, "use_cache": False, **optional}


def needed_logits(model: nn.Module, batch: Any) -> Tensor:
    """`[B, P, V]`: logits at `batch.positions` only. The output head is a large share of a small model's work, and its
    logits of a long batch's memory. All that a head that classifies gives."""
    if batch.positions is None:
        given = inputs(batch)
        if "use_cache" not in inspect.signature(model.forward).parameters:  # encoders have none
            del given["use_cache"]
        return cast(Tensor, model(**given).logits)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs(batch), logits_to_keep=batch.positions).logits
    else:
        logits = model(**inputs(batch)).logits[:, batch.positions]
    return cast(Tensor, logits)


def batch_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """The summed cross-entropy of the labelled targets (a fp32 scalar) and how many they are.

    logits [B, P, V], or a head's [B, C] or [B, T, C], of any float dtype. Apart from them and their gradient, which has
    their dtype, memory is a tile.
    """
    return -_log_likelihoods(logits, batch.targets).sum(), batch.labelled


def _log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target) in fp32, of the targets' shape, 0 where the target is -100."""
    found: Tensor = _LogLikelihood.apply(logits.reshape(-1, logits.shape[-1]), targets.flatten())
    return found.view_as(targets)


class _LogLikelihood(torch.autograd.Function):
    """PyTorch's cross-entropy on 16-bit logits wants a fp32 copy of them all, and another to save; this wants tiles.

    Saves the logits and one number a row; the backward pass recomputes the softmax from them.
    """

    TILE, CPU_TILE = 2**22, 2**19  # elements; the fp32 copies of a CPU's stay in its cache

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        norm = logits.new_empty(len(logits), dtype=torch.float32)
        for tile in _LogLikelihood.tiles(logits):
            wide = logits[tile].to(torch.float32, copy=True)  # logsumexp would make another copy
            largest = wide.amax(-1, keepdim=True)
            norm[tile] = wide.sub_(largest).exp_().sum(-1).log_().add_(largest[:, 0])
        chosen = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).float()
        ctx.save_for_backward(logits, targets, norm)
        return torch.where(targets == IGNORE, 0.0, chosen - norm)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        logits, targets, norm = ctx.saved_tensors
        weight = torch.where(targets == IGNORE, 0.0, grads[0])[:, None]  # [B * P, 1]
        result = torch.empty_like(logits)
        for tile in _LogLikelihood.tiles(logits):
            slope = logits[tile].to(torch.float32, copy=True).sub_(norm[tile, None]).exp_().mul_(-weight[tile])
            slope.scatter_add_(1, targets[tile, None].clamp(min=0), weight[tile])
            result[tile] = slope
        return result, None

    @staticmethod
    def tiles(logits: Tensor) -> Iterator[slice]:
        elements = _LogLikelihood.CPU_TILE if logits.device.type == "cpu" else _LogLikelihood.TILE
        rows = max(1, elements // logits.shape[-1])
        return (slice(start, start + rows) for start in range(0, len(logits), rows))


def candidate_scores(logits: Tensor, choice: ChoiceBatch) -> Tensor:
    """The summed log-likelihood of every candidate, fp32 [E, C]; the prediction is the argmax over C.

    logits [B, P, V] of `choice.batch`.
    """
    if choice.tokens is None:
        return _log_likelihoods(logits, choice.batch.targets).sum(-1).view(len(choice.answers), -1)
    place = (choice.batch.targets != IGNORE).int().argmax(-1)  # [E], where the answer is predicted
    last = logits[torch.arange(len(logits), device=logits.device), place].float()
    return last.log_softmax(-1).gather(1, choice.tokens)

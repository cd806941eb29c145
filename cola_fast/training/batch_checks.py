"""Does the model do what a batch asks of it? Probed with random tokens, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Batch, collate
from ..data.encode import IGNORE, Example
from ..data.loss import needed_logits
from ..errors import UserError
from ..layers import weights
from ..layers.torch_modes import evaluating


def wants_flat(model: Any) -> bool:
    """Whether packed sequences have to lie in one row: FlashAttention reads their borders only there."""
    return str(getattr(model.config, "_attn_implementation", "")).startswith("flash_attention")


def check_padding(model: Any) -> None:
    """Raise UserError unless a padded batch gives each row the logits that it has alone."""
    parts = _probes(model)
    batch = collate([[example] for example in parts])
    assert batch.attention_mask is not None  # the layout that needs the model's help
    _check(model, batch, batch.attention_mask.bool(), parts, "padding", "set train.batch_size and eval_batch_size to 1")


def check_packing(model: Any) -> None:
    """Raise UserError unless two sequences packed into a row have the logits that each has alone.

    Recurrent models, and code that reads no position_ids, let the first leak into the second.
    """
    first, second = _probes(model)
    batch = collate([[first, second]], flat=wants_flat(model))
    own = torch.arange(batch.input_ids.shape[1])[None] >= len(first)
    _check(model, batch, own, [second], "packing", "set train.packing to false")


def check_causal(model: Any) -> None:
    """Raise UserError if a token can be seen from where it is to be predicted, as in BERT."""
    ids = _probes(model)[0].input_ids
    other = [*ids[:-1], (ids[-1] + 1) % int(model.get_input_embeddings().weight.shape[0])]
    with evaluating(model), weights.exactly(model):
        one, two = (_logits(model, collate([[Example(each, each)]])) for each in (ids, other))
    seen = float((one - two).norm() / one.norm())
    if not seen <= (1e-5 if model.dtype == torch.float32 else 2e-3):
        raise UserError(
            f"{type(model).__name__} sees the tokens that it is to predict (its logits change by {seen:.2%} with a "
            "later one): choose a causal language model."
        )


def _probes(model: Any) -> list[Example]:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(vocabulary, (19,), generator=torch.Generator().manual_seed(1)).tolist()
    # labelled at the end only, so that two rows of a batch are padded on the left
    return [Example(part, [IGNORE] * (len(part) - 3) + part[-3:]) for part in (ids[:7], ids[7:])]


def _check(model: Any, batch: Batch, own: Tensor, parts: list[Example], what: str, remedy: str) -> None:
    """`own` [B, T] marks the tokens of `parts`: their logits must be those of each part alone, whatever the others are.

    The second half is the sharp one. Rounding differs with the shapes (by 0.03 of the logits' norm in 24 bf16 layers),
    but other tokens in the same shapes change nothing at all unless they leak; a slight leak moved logits by 0.0003.
    """
    others = (batch.input_ids + 1) % int(model.get_input_embeddings().weight.shape[0])
    swapped = replace(batch, input_ids=batch.input_ids.where(own, others))
    keep = (batch.targets != IGNORE) & own[:, batch.positions]
    try:
        with evaluating(model), weights.exactly(model):
            together, beside = (_logits(model, each)[keep] for each in (batch, swapped))
            alone = torch.cat([logits[0] for logits in (_logits(model, collate([[part]])) for part in parts)])
    except TypeError as error:
        raise UserError(
            f"{type(model).__name__} cannot be used for {what}, its forward refuses the batch: {error}."
        ) from None
    differs, leaks = (float((together - other).norm() / alone.norm()) for other in (alone, beside))
    wide = model.dtype == torch.float32
    if not (differs <= (1e-2 if wide else 0.1) and leaks <= (1e-5 if wide else 2e-3)):
        raise UserError(
            f"{type(model).__name__} does not keep the sequences of a batch apart under {what} (its logits change by "
            f"{max(differs, leaks):.2%}): {remedy}."
        )


@torch.no_grad()
def _logits(model: Any, batch: Batch) -> Tensor:
    device = model.get_input_embeddings().weight.device
    return needed_logits(model, batch.to(device)).float().cpu()

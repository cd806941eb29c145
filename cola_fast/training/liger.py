"""liger-kernel in our trainer: RMSNorm, RoPE and SwiGLU as one kernel each, and the loss without the logits.

liger-kernel replaces names in the module that defines the model's classes, so `kernels` puts those back at its end. The
loss comes from the hidden states of the positions that have a label, a chunk of rows at a time (Hsu et al., "Liger
Kernel", arXiv 2410.10989).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from ..chain.beside import Beside
from ..data.loss import inputs


def obstacle(model: Any, beside: Beside | None = None) -> str | None:
    """Why this model cannot train with liger-kernel, as the end of a sentence; None if it can."""
    if next(model.parameters()).device.type != "cuda":
        return "the model is on no GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "it is not installed (pip install 'cola_fast[liger]')"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if beside:
        return "modules are trained beside the links, and its kernels would read past what keeps them"
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for a {model.config.model_type}"
    head = model.get_output_embeddings()
    return None if type(head) is nn.Linear else f"the output head is a {type(head).__name__}, and no plain linear"


@contextmanager
def kernels(model: nn.Module) -> Iterator[None]:
    """Inside, `model` runs on liger-kernel; the classes that other models are made of are as before afterwards."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        _apply_liger_kernel_to_instance(model=model)
        yield
    finally:
        names.update(before)


def summed_loss(model: nn.Module, batch: Any) -> Tensor:
    """`batches.batch_loss` of the labelled targets, inside `kernels`: a scalar. The model must be in training mode."""
    options = {"logits_to_keep": batch.positions, "shift_labels": batch.targets, "num_items_in_batch": 1}
    return cast(Tensor, model(**inputs(batch), **options).loss)

"""What training will need, before it starts: a step run on fake tensors, which have shapes but no memory.

Every tensor that the step makes is counted from when it is made until nothing holds it any more, so checkpointing,
dropout, shared inputs and the few logits that are computed show as they will. Not seen is what an operator of PyTorch
or a kernel needs only while it runs, and what the allocator, the device's libraries and Python hold beside tensors.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..chain.chain import Chain
from ..data.batches import Batch
from ..data.loss import batch_loss, needed_logits
from ..layers.layer import PARTS
from ..layers.targets import select_modules
from ..layers.weights.weight import Weight
from .models import checkpoint_activations

ADAM_BYTES = 8  # per trained parameter: two moments in fp32
ADAM_8BIT_BYTES = 2 + 2 * 4 / 256  # the same in bitsandbytes' blocks of 256


@dataclass(frozen=True)
class Estimate:
    trained: int  # parameters of one link
    total: int  # of the base model
    weights: int  # bytes of the frozen base, with the buffer that quantised weights are dequantised into
    link: int  # bytes of the link and of the optimizer's state
    step: int | None  # bytes beside these at the step's highest point; None if the model cannot run without data
    obstacle: str | None  # why it cannot

    @property
    def peak(self) -> int | None:
        return None if self.step is None else self.weights + self.link + self.step


def estimate(
    chain: Chain,
    model: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    dtype: torch.dtype,
    stored: type[Weight] | None = None,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    tied: int = 0,
) -> Estimate:
    """For a chain attached to a model on the meta device, of that dtype, to be trained on `device`. The model is of no
    use afterwards.

    batch: the largest that a step will see. stored: the kind that the linear layers will be quantised
    to, but for the output head. tied: the
    rank of all links in a ledger beside the weights, 0 where they are folded.
    """
    for layer in chain.layers.values():
        if tied:
            n, k = layer.weight.shape
            layer.ledger_A = torch.empty(tied, k, dtype=dtype, device="meta")
            layer.ledger_B = torch.empty(n, tied, dtype=dtype, device="meta")
    parts = (getattr(layer, part) for layer in chain.layers.values() for part in PARTS)
    link = [p for p in parts if p is not None]
    of_link = {id(p) for p in link}
    base = [p for p in model.parameters() if id(p) not in of_link]
    weights = sum(t.nbytes for t in [*base, *model.buffers()])
    if stored is not None:
        covered = [module.weight for module in select_modules(model, "all-linear").values()]
        weights -= sum(round(w.numel() * (w.element_size() - stored.bytes_each)) for w in covered)
        weights += max(w.nbytes for w in covered)
    trained = sum(p.numel() for p in chain.parameters())
    state = ADAM_8BIT_BYTES if optimizer.endswith("8bit") else ADAM_BYTES
    if checkpointing:
        checkpoint_activations(model)
    if batch.attention_mask is None and batch.position_ids is None:
        _leave_out_the_mask(model)
    step = obstacle = None
    try:
        with _unlogged():
            step = _most_in_a_step(model, batch, device)
    except Exception as error:  # a model's own code, which may look at values
        obstacle = str(error).strip().split("\n")[0]
    held = sum(p.nbytes for p in link) + round(trained * state)
    return Estimate(trained, sum(p.numel() for p in base), weights, held, step, obstacle)


def _most_in_a_step(model: nn.Module, batch: Batch, device: torch.device) -> int:
    """Bytes at the highest point of a forward and backward pass, what was there before it aside.

    The second step counts: in the first, layers do not yet know which of them read the same input.
    """
    live = _Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        model.train().to_empty(device=device)
        batch = batch.to(device)
        for _ in range(2):
            live.peak = before = live.bytes
            loss = batch_loss(needed_logits(model, batch), batch)[0] / batch.labelled
            loss.backward()
            del loss
            model.zero_grad(set_to_none=True)
    return live.peak - before


def _leave_out_the_mask(model: Any) -> None:
    """Whether SDPA needs a mask written out, transformers reads off position_ids. Fake ones cannot be read, so it would
    write one. For an attention that it knows nothing of, it writes none."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
        model.config._attn_implementation = "sdpa_without_mask"


def _grouped(function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The product of a mixture's experts. Its kernels take other dtypes, too, but of its shapes PyTorch tells in bf16
    only; nothing made here is counted."""
    halved = [arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in (x, *args)]
    result: Tensor = function(*halved, **{**kwargs, "out_dtype": None})
    return result.to(x.dtype)


@contextmanager
def _unlogged() -> Iterator[None]:
    """What cannot be run on fake tensors is our answer's to say: PyTorch logs its traceback, too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators return, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            result = _grouped(function, *args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size).atexit = False
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _free(self, size: int) -> None:
        self.bytes -= size

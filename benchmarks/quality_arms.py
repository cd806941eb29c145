"""The arms of the evaluation, and the one loop that trains them all.

What differs between arms is what `Arm` says; steps, batches, warm-up, clipping and AdamW are the same. Every restart
gives the links a new optimizer and the learning rate's curve from its start. A problem's head, where it has one, is
trained by an AdamW of its own at a fixed rate, on one curve over all steps, which no restart touches: in all arms
alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cola_fast import Chain, attach
from cola_fast.config import ScheduleConfig
from cola_fast.data.batches import Sampler
from cola_fast.training.schedule import plan

R = 8
SCALE = 2.0  # of a link, at every rank: alpha = 2 R
WARMUP = 0.1  # share of each span of the learning rate
CLIP = 1.0
BATCH = 8


@dataclass(frozen=True)
class Arm:
    label: str
    ranks: tuple[int, ...] = (R,)  # one for every span between restarts; none: no link
    merge: bool = True  # at a restart, tie the link and open a fresh one; or go on with the same factors
    frozen: str | None = None  # the factor of a link that is not trained
    gelora: float | None = None  # ranks by GeLoRA: of this mean; 0: as they come out
    full: bool = False  # train every weight of the model


ARMS = {
    "frozen": Arm("frozen model", ()),
    "lora": Arm("LoRA, R = 8"),
    "lora-restarts": Arm("LoRA, 2 restarts, no merge", (R, R, R), merge=False),
    "lora-24": Arm("LoRA, R = 24", (3 * R,)),
    "cola-2": Arm("COLA, K = 2", (R, R)),
    "cola-3": Arm("COLA, K = 3", (R, R, R)),
    "cola-8-4-2": Arm("COLA, R = 8, 4, 2", (8, 4, 2)),
    "rac-lora": Arm("RAC-LoRA, K = 3", (R, R, R), frozen="a"),
    "gelora-8": Arm("GeLoRA, mean R = 8", gelora=float(R)),
    "gelora": Arm("GeLoRA", gelora=0.0),
    "lora-1": Arm("LoRA, R = 1", (1,)),
    "full": Arm("full fine-tuning", (), full=True),
}


class Problem(Protocol):
    """A model with something to learn."""

    head_lr: float

    @property
    def model(self) -> nn.Module: ...

    @property
    def head(self) -> Sequence[nn.Parameter]:
        """Trained beside the model in every arm."""
        ...

    @property
    def lengths(self) -> Sequence[int]:
        """Of the training examples."""
        ...

    def loss(self, examples: Sequence[int]) -> Tensor:
        """The mean over these training examples, with a gradient."""
        ...


class Diverged(Exception):
    """A loss is not finite."""


@dataclass
class Training:
    problem: Problem
    arm: Arm
    steps: int
    lr: float
    seed: int
    rank_pattern: Mapping[str, int] | None = None  # for an arm with GeLoRA's ranks
    targets: str | Sequence[str] = "all-linear"
    trained: int = field(default=0, init=False)  # numbers in the first link, or in a model that is trained whole

    def run(self) -> None:
        """All steps. Raises Diverged."""
        for loss in self:
            if not math.isfinite(loss):
                raise Diverged(f"{self.arm.label}: the loss became {loss} at learning rate {self.lr:g}.")

    def __iter__(self) -> Iterator[float]:
        """Trains one step for each loss it gives out."""
        arm, problem = self.arm, self.problem
        spans = max(1, len(arm.ranks))
        schedule = plan(
            ScheduleConfig(links=spans, steps=self.steps, lr=self.lr, lr_span="restart", warmup=WARMUP),
            rank=R,
            steps_per_epoch=1,
        )
        whole = plan(ScheduleConfig(steps=self.steps, lr=problem.head_lr, warmup=WARMUP), rank=R, steps_per_epoch=1)
        batches = Sampler(problem.lengths, min(BATCH, len(problem.lengths)), seed=self.seed)
        chain = self._attach()
        if chain is None and not arm.full and not problem.head:
            return
        head = _adamw(problem.head)
        step = 0
        for span in schedule.spans:
            if chain is not None and arm.merge and span.index > 0:
                chain.tie()
                chain.extend(arm.ranks[span.index])
            trained = list(problem.model.parameters()) if arm.full else chain.parameters() if chain else []
            self.trained = self.trained or sum(parameter.numel() for parameter in trained)
            optimizer, start = _adamw(trained), step
            for step in range(start, start + span.steps):
                loss = problem.loss([example for row in next(batches) for example in row])
                loss.backward()
                nn.utils.clip_grad_norm_([*trained, *problem.head], CLIP)
                _step(optimizer, schedule.lr(step, span.index, start))
                _step(head, whole.lr(step, 0, 0))
                yield loss.item()
            step += 1

    def _attach(self) -> Chain | None:
        arm, model = self.arm, self.problem.model
        if not arm.ranks:
            model.requires_grad_(arm.full)
            return None
        return attach(
            model, r=R, alpha=SCALE * R, scaling="constant", targets=self.targets, seed=self.seed, frozen=arm.frozen,
            first_rank=arm.ranks[0], rank_pattern=self.rank_pattern,
        )  # fmt: skip


def _adamw(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
    return torch.optim.AdamW(parameters, weight_decay=0.0, fused=True) if parameters else None


def _step(optimizer: torch.optim.Optimizer | None, lr: float) -> None:
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

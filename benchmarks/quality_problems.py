"""What the arms of the evaluation learn: sentiment by a classification head or by verbalisers, the next token of film
reviews, and a known matrix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cola_fast.commands import assets
from cola_fast.commands.demo import demo_config
from cola_fast.data.batches import choice_batches, collate
from cola_fast.data.encode import IGNORE
from cola_fast.data.loss import batch_loss, candidate_scores, needed_logits
from cola_fast.data.rows import load_data
from cola_fast.training.models import load_model, load_tokenizer, native_bf16

from . import harness
from .quality_arms import Problem

HEAD_LR = 5e-3
EVAL_BATCH = 32


@dataclass(frozen=True)
class Scores:
    """Of the items of one split, always in the same order."""

    losses: list[float]  # nats
    correct: list[bool] | None  # None where there is no label


class Task(Problem, Protocol):
    """A problem with data that are held out."""

    def scores(self, split: str) -> Scores:
        """split: "validation" or "test"."""
        ...

    def states_batches(self) -> Sequence[Mapping[str, Tensor]]:
        """Training examples as the model's forward takes them, for GeLoRA."""
        ...


class Classifier:
    """all-MiniLM-L6-v2, the mean of its last states, a linear head: fp32 weights, and products in bf16 where the device
    has them. No dropout. `extra` training sentences from the end join the validation set.
    """

    head_lr = HEAD_LR

    def __init__(self, task: str, seed: int, *, full: bool, items: int, extra: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = assets.minilm()
        self.device = harness.device()
        self.model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.pooler = None  # the mean needs none, so there is nothing in it to train
        self.model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.linear = nn.utils.skip_init(nn.Linear, self.model.config.hidden_size, 2)
        _draw(self.linear, seed)
        self.linear.to(self.device)
        self.head = list(self.linear.parameters())
        files = {name: _read(path) for name, path in assets.sentiment(task).items()}
        train, held = files["train"][:-extra], files["train"][-extra:]
        self.rows = {"train": train, "validation": [*files["eval"], *held], "test": files["test"][:items]}
        self.ids = {
            name: self.tokenizer([row["text"] for row in rows])["input_ids"] for name, rows in self.rows.items()
        }
        self.lengths = [len(ids) for ids in self.ids["train"]]

    def loss(self, examples: Sequence[int]) -> Tensor:
        return self._losses("train", examples)[0].mean()

    @torch.no_grad()
    def scores(self, split: str) -> Scores:
        ids = self.ids[split]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = [self._losses(split, order[i : i + EVAL_BATCH]) for i in range(0, len(order), EVAL_BATCH)]
        return Scores([x for losses, _ in found for x in losses.tolist()], [x for _, c in found for x in c.tolist()])

    def states_batches(self) -> Sequence[Mapping[str, Tensor]]:
        order = sorted(range(min(2000, len(self.lengths))), key=self.lengths.__getitem__)
        return [self._pad("train", order[i : i + EVAL_BATCH]) for i in range(0, len(order), EVAL_BATCH)]

    def _losses(self, split: str, examples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses [B] and whether the label is the likelier one [B]."""
        batch = self._pad(split, examples)
        labels = torch.tensor([self.rows[split][i]["label"] for i in examples], device=self.device)
        with _autocast(self.device):
            states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        logits = self.linear((states.float() * mask).sum(1) / mask.sum(1))
        return nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    def _pad(self, split: str, examples: Sequence[int]) -> dict[str, Tensor]:
        made = self.tokenizer.pad({"input_ids": [self.ids[split][i] for i in examples]}, return_tensors="pt")
        return {name: made[name].to(self.device) for name in ("input_ids", "attention_mask")}


class Verbaliser:
    """SmolLM2-135M and the demo's template. bf16 weights; to train them all, fp32 weights with products in bf16."""

    head: tuple[nn.Parameter, ...] = ()
    head_lr = 0.0
    settings: tuple[str, ...] = ()  # over the demo's

    def __init__(self, task: str, seed: int, *, full: bool, items: int, extra: int) -> None:
        files = assets.sentiment(task)
        config = demo_config(
            [
                *(f"data.{name}={path}" for name, path in files.items()),
                "data.limit=2000",
                f"model.dtype={'fp32' if full else 'auto'}",
                *self.settings,
            ]
        )
        self.model = load_model(config.model)
        self.device = next(self.model.parameters()).device
        data = load_data(config.data, load_tokenizer(config.model), context=2048, seed=0)
        held = [*data.eval, *data.train[-extra:]]
        self.train = data.train[:-extra]
        self.splits = {"validation": held, "test": data.test[:items]}
        self.lengths = [len(example) for example in self.train]

    def loss(self, examples: Sequence[int]) -> Tensor:
        batch = collate([[self.train[i]] for i in examples]).to(self.device)
        with _autocast(self.device, enabled=self.model.dtype == torch.float32):
            logits = needed_logits(self.model, batch)
        total, count = batch_loss(logits, batch)
        return total / count

    @torch.no_grad()
    def scores(self, split: str) -> Scores:
        losses, correct = [], []
        for choice in choice_batches(self.splits[split], EVAL_BATCH):
            choice = choice.to(self.device)
            with _autocast(self.device, enabled=self.model.dtype == torch.float32):
                found = candidate_scores(needed_logits(self.model, choice.batch), choice)  # [E, C]
            losses += (-found.gather(1, choice.answers[:, None])[:, 0]).tolist()
            correct += (found.argmax(1) == choice.answers).tolist()
        return Scores(losses, correct)

    def states_batches(self) -> Sequence[Mapping[str, Tensor]]:
        from cola_fast.ranks import example_batches

        return list(example_batches(self.train, limit=2000))


class NextToken(Verbaliser):
    """The same model reads the bare sentences: lower-case film reviews, cut into words, are far from what it was
    trained on. A sentence's loss is the mean over its tokens.
    """

    settings = ("data.format=text",)

    @torch.no_grad()
    def scores(self, split: str) -> Scores:
        losses: list[float] = []
        examples = sorted(self.splits[split], key=len)
        for first in range(0, len(examples), EVAL_BATCH):
            batch = collate([[example] for example in examples[first : first + EVAL_BATCH]]).to(self.device)
            with _autocast(self.device, enabled=self.model.dtype == torch.float32):
                logits = needed_logits(self.model, batch)
            each = nn.functional.cross_entropy(logits.float().transpose(1, 2), batch.targets, reduction="none")
            losses += (each.sum(1) / (batch.targets != IGNORE).sum(1)).tolist()
        return Scores(losses, None)


MODELS: dict[str, Callable[..., Task]] = {"minilm": Classifier, "smollm2": Verbaliser, "smollm2-text": NextToken}


class Teacher:
    """A linear layer whose target differs from it by a matrix of rank 32; the loss is the squared distance left."""

    head: tuple[nn.Parameter, ...] = ()
    head_lr = 0.0
    lengths = (1,)

    def __init__(self, seed: int, size: int = 48, rank: int = 32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.difference = draw(size, rank) @ draw(rank, size) / rank
        linear = nn.Linear(size, size, bias=False)
        nn.init.zeros_(linear.weight)
        self.model = nn.Sequential(linear)

    def loss(self, examples: Sequence[int]) -> Tensor:
        output: Tensor = self.model(torch.eye(len(self.difference)))
        return (output - self.difference.t()).square().sum()

    def tail(self, rank: int) -> float:
        """What the best matrix of this rank leaves (Eckart and Young)."""
        return float(torch.linalg.svdvals(self.difference)[rank:].square().sum())


def _autocast(device: torch.device, *, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and native_bf16(device))


def _draw(linear: nn.Linear, seed: int) -> None:
    """PyTorch's own bounds, from the seed alone."""
    generator, bound = torch.Generator().manual_seed(seed), linear.in_features**-0.5
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)


def _read(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

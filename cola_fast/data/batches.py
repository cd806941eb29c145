"""From examples to tensors: which examples meet in a batch, how they are laid out, and what is computed from logits.

**Only the needed logits.** `Batch.positions` are the places of the sequence from which some row predicts a labelled
token; the model computes logits there and nowhere else (`logits_to_keep`), which saves most of the memory of a large
vocabulary when only an answer carries loss.

**Padding.** On the right, a causal model needs no mask at all (real tokens never see what follows them), so attention
takes its fastest path, and any causal model is served correctly. On the left the answers line up, so prompt + answer
batches need few positions. So: left exactly where that makes `positions` shorter, with a mask and given position_ids.

**Packing.** Several sequences in one row; position_ids restart with each and there is no mask: transformers reads the
borders from position_ids (as long as use_cache is off), and builds the block-diagonal mask in the form that each
attention implementation wants (eager cannot take a boolean one; a mask of ours would override a sliding window).
flash_attention_2 reads them only in a batch of one row, hence `flat`. `training.batch_checks` tests whether the model
at hand really keeps the sequences apart.

**Sums, not means.** `batch_loss` returns a sum and a count, so that accumulated batches weigh every token equally:
add the counts of all micro-batches of a step, and divide each loss by that total.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from ..errors import UserError
from .encode import IGNORE, Example

PAD = 0  # hidden by the mask or by causality, so any token of the vocabulary will do


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, P positions with logits.

    input_ids [B, T] int64; positions [P] int64, increasing; targets [B, P] int64: the token that follows, or -100;
    attention_mask [B, T] int64 or None (nothing to hide); position_ids [B, T] int64 or None (0, 1, 2, ...).
    For a head that classifies, positions is None and targets, [B] or [B, T], are classes.
    """

    input_ids: Tensor
    positions: Tensor | None
    targets: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    tokens: int  # real ones, without padding
    labelled: int  # targets that are not -100

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`; copies to a GPU do not block."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def collate(rows: Sequence[Sequence[Example]], *, flat: bool = False) -> Batch:
    """Each row of the batch holds the examples of one entry of `rows`: one example, or several that are packed.

    flat: all examples in a single row without padding, for flash_attention_2 (see `wants_flat`).
    """
    if rows[0][0].head:
        return _with_classes([example for row in rows for example in row])
    if flat:
        rows = [[example for row in rows for example in row]]
    packed = any(len(row) > 1 for row in rows)
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    # labels[i] belongs to the token after i: the first token of a sequence is nobody's target, packed or not
    shifted = [[label for example in row for label in [*example.labels[1:], IGNORE]] for row in rows]
    width = max(map(len, ids))
    targets = _pad(shifted, width, IGNORE, left=False)
    positions = _used(targets)
    position_ids = mask = None
    left = False
    if packed:
        # padding is one more sequence: no query is left without a key
        places = [[i for n in (*map(len, row), width - sum(map(len, row))) for i in range(n)] for row in rows]
        position_ids = torch.tensor(places)
    elif any(len(row) < width for row in ids):
        aligned = _pad(shifted, width, IGNORE, left=True)
        if left := len(_used(aligned)) < len(positions):
            targets, positions = aligned, _used(aligned)
            mask = _pad([[1] * len(row) for row in ids], width, 0, left=True)
            position_ids = (mask.cumsum(-1) - 1).clamp_(min=0)
    targets = targets[:, positions]
    return Batch(
        input_ids=_pad(ids, width, PAD, left=left),
        positions=positions,
        targets=targets,
        attention_mask=mask,
        position_ids=position_ids,
        tokens=sum(map(len, ids)),
        labelled=int((targets != IGNORE).sum()),
    )


def _with_classes(examples: Sequence[Example]) -> Batch:
    """Padded on the right, as models with a head that classifies expect it."""
    width, pad = max(map(len, examples)), examples[0].pad
    each_token = any(len(example.labels) > 1 for example in examples)
    labels = [example.labels for example in examples]
    targets = _pad(labels, width, IGNORE, left=False) if each_token else torch.tensor(labels)[:, 0]
    lengths = torch.tensor([len(example) for example in examples])
    return Batch(
        input_ids=_pad([example.input_ids for example in examples], width, pad, left=False),
        positions=None,
        targets=targets,
        attention_mask=(torch.arange(width) < lengths[:, None]).long(),
        position_ids=None,
        tokens=sum(map(len, examples)),
        labelled=int((targets != IGNORE).sum()),
    )


def _pad(rows: list[list[int]], width: int, value: int, *, left: bool) -> Tensor:
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for row, f in zip(rows, fill, strict=True)])


def _used(targets: Tensor) -> Tensor:
    return (targets != IGNORE).any(0).nonzero().flatten()


# --- which examples meet ----------------------------------------------------------------------------------------------


class Sampler:
    """Endless batches of example indices, in an order that (seed, epoch) fixes; each example once per epoch.

    A batch is a list of rows and a row a list of indices into the examples (one, without packing), as `collate` takes
    them. group_by_length: examples of like length meet, so that little is padding: shuffled, sorted within 50 batches'
    worth, then the batches are shuffled. capacity: pack rows of that many tokens. The packs stay the same in every
    epoch, so every epoch has len(self) batches; attention stays within a sequence, so it matters little who shares one.

    `epoch` and `index` count what has been handed out; a sampler that loads them goes on with the very next batch.
    """

    GROUP = 50  # batches sorted together

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        group_by_length: bool = True,
        capacity: int | None = None,
    ) -> None:
        if not lengths:
            raise ValueError("a sampler needs at least one example")
        self.batch_size, self.seed, self.group_by_length = batch_size, seed, group_by_length
        self.rows = [[i] for i in range(len(lengths))] if capacity is None else pack(lengths, capacity, seed=seed)
        self._sizes = [sum(lengths[i] for i in row) for row in self.rows]
        self.epoch = self.index = 0
        self._order = self._plan(0)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        if self.index == len(self):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._plan(self.epoch)
        batch = self._order[self.index]
        self.index += 1
        return [self.rows[row] for row in batch]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "rows": len(self.rows), "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, mine in (("rows", len(self.rows)), ("batch_size", self.batch_size)):
            if state[name] != mine:
                raise UserError(
                    f"The saved position belongs to data with {name} = {state[name]}, but now {name} is {mine}: resume "
                    "with the data and the batch size of the first run."
                )
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._plan(self.epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = _generator(self.seed, epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        if self.group_by_length:
            span = self.GROUP * self.batch_size
            chunks = (order[start : start + span] for start in range(0, len(order), span))
            order = [row for chunk in chunks for row in sorted(chunk, key=lambda row: -self._sizes[row])]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self.group_by_length:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
            if epoch == 0:  # the longest batch first: memory that does not suffice shows at once, not after an hour
                longest = max(range(len(batches)), key=lambda i: max(self._sizes[row] for row in batches[i]))
                batches.insert(0, batches.pop(longest))
        return batches


class Feed:
    """The training batches of `examples`, without end: a Sampler as `config` wants it, and `collate`.

    max_length: the size of a packed row. flat: see `collate`. The state is the sampler's, and which examples they and
    the held-out ones are.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: TrainConfig,
        *,
        max_length: int,
        flat: bool = False,
        held: Sequence[Example] = (),
    ) -> None:
        self.examples, self.flat, self._held = examples, flat, held
        self.sampler = Sampler(
            [len(example) for example in examples],
            config.batch_size,
            seed=config.seed,
            group_by_length=config.group_by_length,
            capacity=max_length if config.packing else None,
        )

    def state_dict(self) -> dict[str, Any]:
        return {**self.sampler.state_dict(), "examples": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("examples", self._digest) != self._digest:
            raise UserError(
                "The data is not what this run was started with: restore the files, or set `out` to a new folder to "
                "train on the new ones."
            )
        self.sampler.load_state_dict(state)

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for example in itertools.chain(self.examples, self._held):
            digest.update(array("q", [len(example), *example.input_ids, *example.labels]).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return collate([[self.examples[i] for i in row] for row in next(self.sampler)], flat=self.flat)


def pack(lengths: Sequence[int], capacity: int, *, seed: int, window: int = 4096) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`: best-fit decreasing within shuffled windows."""
    if max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit into a row of {capacity}")
    order = torch.randperm(len(lengths), generator=_generator(seed, -1)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        room: list[tuple[int, int]] = []  # (free tokens, row), sorted: the tightest row that fits is one bisection away
        for index in sorted(order[start : start + window], key=lambda i: -lengths[i]):
            place = bisect.bisect_left(room, (lengths[index], -1))
            free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(index)
            bisect.insort(room, (free - lengths[index], row))
    return rows


def _generator(seed: int, epoch: int) -> torch.Generator:
    """A stream of its own: nothing else that draws random numbers can shift the order of the data."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)


def eval_batches(examples: Sequence[Example], batch_size: int, *, flat: bool = False) -> Iterator[Batch]:
    """Every example once, unpacked, the longest first."""
    for part in _parts(examples, batch_size):
        yield collate([[example] for example in part], flat=flat)


def _parts(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    ordered = sorted(examples, key=len, reverse=True)
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


# --- loss -------------------------------------------------------------------------------------------------------------


# --- classification ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceBatch:
    """E examples with C candidates each.

    One forward pass per example where every candidate is a single token: `tokens` is [E, C], and a row ends in the gold
    one, which a causal model cannot see from where it is predicted. Otherwise one row per candidate: `tokens` is None,
    and there are E * C rows, example by example.
    """

    batch: Batch
    answers: Tensor  # [E] int64
    tokens: Tensor | None
    gold_tokens: int  # tokens of all gold candidates, to turn their log-likelihood into a loss per token

    def to(self, device: torch.device | str) -> ChoiceBatch:
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return replace(
            self, batch=self.batch.to(device), answers=self.answers.to(device, non_blocking=True), tokens=tokens
        )


def choice_batches(examples: Sequence[Example], batch_size: int) -> Iterator[ChoiceBatch]:
    """Batches for `candidate_scores`, of about `batch_size` rows; every example once, the longest first."""
    single = all(len(candidate) == 1 for example in examples for candidate in example.candidates)
    size = batch_size if single or not examples else max(1, batch_size // len(examples[0].candidates))
    for part in _parts(examples, size):
        rows = [[row] for example in part for row in (_gold_only(example) if single else _each(example))]
        yield ChoiceBatch(
            batch=collate(rows),
            answers=torch.tensor([example.answer for example in part]),
            tokens=torch.tensor([[c[0] for c in example.candidates] for example in part]) if single else None,
            gold_tokens=sum(len(example.candidates[example.answer]) for example in part),
        )


def _gold_only(example: Example) -> list[Example]:
    return [example]


def _each(example: Example) -> list[Example]:
    prompt = example.input_ids[: example.prompt_length]
    return [Example(prompt + list(c), [IGNORE] * len(prompt) + list(c)) for c in example.candidates]

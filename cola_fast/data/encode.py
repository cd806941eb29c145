"""From pieces of text to tokens: what is tokenised together, what carries loss, and what is cut when it is too long.

**The border between prompt and completion.** A prompt is always tokenised on its own, because that is what the model is
given at inference. What follows it is `encode(prompt + rest)` minus the prompt's tokens whenever that begins with the
prompt's tokens (so SentencePiece adds no second space), and otherwise `encode(rest)`: a prompt ending in a space, say,
would have its last token swallowed by the first word of the completion. Those rows are counted in the notes.

**Special tokens.** What the tokenizer puts before a text (BOS, for some) opens each example, once; chat templates write
their own. A text and a completion end with EOS, so that the model learns to stop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from .files import Source

IGNORE = -100  # the label of a token without loss, as in PyTorch and transformers


@dataclass(frozen=True)
class Example:
    """One token sequence. `labels[i]` is the token at i, or -100 where there is no loss; the loss does the shift."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int = 0  # tokens before the completion or the verbaliser
    candidates: tuple[
        tuple[int, ...], ...
    ] = ()  # classification: the tokens of every label, in the order of Data.labels
    answer: int = -1  # classification: which of them is gold; its tokens end input_ids
    head: bool = False  # `labels` are classes, for a head that classifies: one, or one a token. Nothing is shifted
    pad: int = 0  # with `head`: what fills up shorter rows of a batch; some models find a sequence's end by it
    row: int = field(default=0, compare=False)  # its number in the file, from 1

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Row:
    number: int  # counted from 1, as in the file
    pieces: tuple[tuple[str, bool], ...] = ()  # text, carries loss
    choices: tuple[str, ...] = ()  # classification: what may follow the pieces
    answer: int = -1
    classes: tuple[int, ...] = ()  # of a head that classifies: the row's, or one a piece
    read: Any = None  # what the pieces were made of, if by a template


class Encoder:
    """Rows of one source to examples, with the counts that the note reports."""

    def __init__(self, kind: str, tokenizer: Any, too_long: str, max_length: int, source: Source) -> None:
        self.kind, self.tokenizer, self.source = kind, tokenizer, source
        self.too_long, self.max_length = too_long, max_length
        self.head = [] if kind == "messages" else _head(tokenizer)
        self.long = self.cut = self.unlabelled = self.swallowed = 0
        self.distinct: tuple[tuple[int, ...], ...] = ()  # candidates that have been compared

    def __call__(self, rows: Sequence[Row]) -> tuple[list[Example], str]:
        examples = []
        for start in range(0, len(rows), 1000):  # tokenizers work best on many texts at once, memory on few
            part = rows[start : start + 1000]
            fitted = map(self._fit, part, self._encode(part))
            examples += [example for example in fitted if example is not None]
        return examples, self._note(len(rows), examples)

    def _encode(self, rows: Sequence[Row]) -> list[Example]:
        """Untrimmed examples. The texts of all rows go through the tokenizer in one call."""
        texts = []
        for row in rows:
            texts += list(itertools.accumulate(text for text, _ in row.pieces))
            texts += [texts[-1] + choice for choice in row.choices]
        tokens = iter(self._tokens(texts))
        return [self._join(row, tokens) for row in rows]

    def _join(self, row: Row, tokens: Iterator[list[int]]) -> Example:
        ids: list[int] = []
        loss: list[bool] = []
        joint: list[int] = []  # the tokens of the text so far, in one
        prompt_length = 0
        for text, learn in row.pieces:
            before, joint = joint, next(tokens)
            added = self._added(before, joint, text)
            ids, loss = ids + added, loss + [learn] * len(added)
            prompt_length = prompt_length if learn else len(ids)
        candidates = tuple(tuple(self._added(joint, next(tokens), choice)) for choice in row.choices)
        if candidates:
            if candidates != self.distinct and _clash(candidates):
                raise UserError(
                    f"data.verbalisers are {', '.join(map(repr, row.choices))}, but to this tokenizer some are empty, "
                    "equal, or the beginning of another, which could never win: choose other words."
                )
            self.distinct = candidates  # of most rows the same
            gold = candidates[row.answer]
            ids, loss = ids + list(gold), loss + [True] * len(gold)
        eos = self.tokenizer.eos_token_id
        if self.kind in ("text", "completion") and ids and eos is not None and (ids[-1] != eos or not loss[-1]):
            ids, loss = [*ids, eos], [*loss, True]
        head = [] if ids[: len(self.head)] == self.head else self.head  # a text may have been written with it
        ids, loss = head + ids, [False] * len(head) + loss
        loss[: len(self.head)] = [False] * len(self.head)
        labels = [token if learn else IGNORE for token, learn in zip(ids, loss, strict=True)]
        prompt_length = prompt_length + len(head) if self.kind in ("completion", "classification") else 0
        return Example(ids, labels, prompt_length, candidates, row.answer, row=row.number)

    def _added(self, before: list[int], joint: list[int], text: str) -> list[int]:
        """The tokens of `text`, where `before` are those of the text in front of it, and `joint` those of both; see the
        module's docstring."""
        if joint[: len(before)] == before and (len(joint) > len(before) or not text.strip()):
            return joint[len(before) :]
        self.swallowed += 1
        return self._tokens([text])[0]

    def _fit(self, row: Row, example: Example) -> Example | None:
        """The example within max_length, or None if it is to be dropped. The labelled end of a prompt is never cut."""
        prompt, head = example.prompt_length, len(self.head)
        tail = max(map(len, example.candidates), default=len(example) - prompt)
        length = prompt + tail
        if length > self.max_length:
            self.long += 1
            if self.too_long == "error":
                raise UserError(
                    f"{self.source.row(row.number)} has {length} tokens, more than the {self.max_length} allowed: "
                    "raise data.max_length (up to the model's context), or set data.too_long to truncate or drop."
                )
            if self.too_long == "drop":
                return None
            if self.kind in ("completion", "classification"):
                room = self.max_length - head - tail  # for the end of the prompt
                if room < 1:
                    return None
                cut = slice(prompt - room, None)
                ids, labels = (whole[:head] + whole[cut] for whole in (example.input_ids, example.labels))
                example = replace(example, input_ids=ids, labels=labels, prompt_length=head + room)
            else:
                ids, labels = (whole[: self.max_length] for whole in (example.input_ids, example.labels))
                example = replace(example, input_ids=ids, labels=labels)
            self.cut += 1
        # the first token of a sequence has nothing before it to be predicted from
        scorable = example.prompt_length > 0 if example.candidates else any(t != IGNORE for t in example.labels[1:])
        if not scorable:
            self.unlabelled += 1
            return None
        return example

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: no warning about the model's length, which _fit enforces
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []

    def _note(self, read: int, examples: Sequence[Example]) -> str:
        tokens = sum(map(len, examples))
        learn = sum(label != IGNORE for e in examples for label in e.labels[1:])
        side = "left of the prompt" if self.kind in ("completion", "classification") else "right"
        parts = [f"{read} rows of {self.source}, {len(examples)} used"]
        for count, words in (
            (self.long, f"longer than {self.max_length} tokens"),
            (self.cut, f"of these cut from the {side}"),
            (self.long - self.cut, "of these dropped"),
            (self.unlabelled, "dropped with no token to learn from"),
            (self.swallowed, "pieces tokenised apart from their prompt (does it end in a space or line break?)"),
        ):
            parts += [f"{count} {words}"] if count else []
        return "; ".join([*parts, f"{tokens} tokens, {learn} with loss, longest {max(map(len, examples), default=0)}"])


def _clash(candidates: Sequence[tuple[int, ...]]) -> bool:
    """Whether one begins another, which could never win: more tokens are never likelier."""
    return any(longer[: len(shorter)] == shorter for shorter, longer in itertools.permutations(candidates, 2))


def _head(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text. What it puts after is left out: EOS is ours to add, where a text ends."""
    bare, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])

"""Models with a head that classifies: a whole sequence, or each token. The head is trained whole, beside the links.

`model.task` names the kind and `model.labels` the classes, in the order of the head's outputs. A text goes to the model
as its tokenizer writes it, special tokens included. Words of a token classification carry their label on their first
token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig
from ..errors import UserError
from .encode import IGNORE, Example, Row
from .files import Source

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def names(model: Any) -> list[str]:
    """The modules of a classifying model that are not its backbone: its head, and a pooler that the head reads."""
    backbone = str(model.base_model_prefix)
    heads = [name for name, _ in model.named_children() if name != backbone]
    poolers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    return [name for name in (*heads, *poolers) if any(True for _ in model.get_submodule(name).parameters())]


def is_part(model: Any, key: str) -> bool:
    """Whether a tensor of that name belongs to the head, and may be missing from a checkpoint of the backbone."""
    return any(key.startswith(f"{name}.") for name in names(model))


@dataclass(frozen=True)
class Head:
    """What reading data for it needs."""

    kind: str  # of its rows: labelled (texts) or words
    labels: tuple[str | int, ...]
    pad: int  # the token that the model knows as padding


def head_of(model: Any, config: ModelConfig) -> Head | None:
    """None for a model that writes."""
    if config.task == "causal-lm":
        return None
    kind = "labelled" if config.task == "sequence-classification" else "words"
    return Head(kind, config.labels, model.config.pad_token_id or 0)


class HeadEncoder:
    """Rows of one source to examples, as `encode.Encoder`: of a row whose pieces are the text, or the words, and whose
    `classes` are the labels."""

    def __init__(self, head: Head, tokenizer: Any, too_long: str, max_length: int, source: Source) -> None:
        self.each_token, self.tokenizer, self.source, self.pad = head.kind == "words", tokenizer, source, head.pad
        self.too_long, self.max_length = too_long, max_length
        if self.each_token and not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} does not tell which token belongs to which word, so that tokens cannot be "
                "labelled: use a fast tokenizer."
            )

    def __call__(self, rows: Sequence[Row]) -> tuple[list[Example], str]:
        examples, long, unlabelled = [], 0, 0
        for row in rows:
            whole = self._tokens(row, limit=None)
            if len(whole["input_ids"]) > self.max_length:
                long += 1
                if self.too_long == "error":
                    raise UserError(
                        f"{self.source.row(row.number)} has {len(whole['input_ids'])} tokens, more than the "
                        f"{self.max_length} allowed: raise data.max_length (up to the model's context), or set "
                        "data.too_long to truncate or drop."
                    )
                if self.too_long == "drop":
                    continue
                whole = self._tokens(row, limit=self.max_length)
            labels = self._labels(row, whole.word_ids()) if self.each_token else list(row.classes)
            if any(label != IGNORE for label in labels) and whole["input_ids"]:
                ids = list(whole["input_ids"])
                examples.append(Example(ids, labels, head=True, pad=self.pad, row=row.number))
            else:
                unlabelled += 1
        tokens = sum(map(len, examples))
        done = {"truncate": "truncated", "drop": "dropped"}.get(self.too_long, "")
        note = f"{len(examples)} of {len(rows)} rows, {tokens} tokens" + (f", {long} too long: {done}" if long else "")
        return examples, note + (f", {unlabelled} dropped with no token to learn from" if unlabelled else "")

    def _tokens(self, row: Row, limit: int | None) -> Any:
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        texts = [text for text, _ in row.pieces]
        if self.each_token:
            return self.tokenizer(texts, is_split_into_words=True, verbose=False, **cut)
        return self.tokenizer("".join(texts), verbose=False, **cut)

    def _labels(self, row: Row, words: Iterable[int | None]) -> list[int]:
        """The first token of each word carries its label."""
        labels, last = [], None
        for word in words:
            labels.append(IGNORE if word is None or word == last else row.classes[word])
            last = word
        return labels

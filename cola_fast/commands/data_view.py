"""What a model will see of its data, before anything is trained: rows with the learned tokens marked, and counts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Config
from ..data.batches import Feed
from ..data.encode import IGNORE, Example
from ..data.rows import Data, holds_out
from ..errors import UserError, listed, printable
from ..store import given_path, read_file, write_file
from ..training.batch_checks import wants_flat
from ..training.models import load_empty_model, load_tokenizer
from ..training.prepare import read_data
from ..training.run import date_for
from .marked_rows import MADE_BY, MarkedRow, learned_places, mark, page

NAMED = 5  # rows that a sentence names


class View(NamedTuple):
    rows: list[MarkedRow]
    facts: list[tuple[str, str]]  # name, sentence; several may have one name

    def text(self, *, coloured: bool) -> str:
        """Whose parts have been cleaned."""
        shown = [row.coloured() if coloured else row.plain() for row in self.rows]
        names = [
            "" if before == name else name for (before, _), (name, _) in itertools.pairwise([("", ""), *self.facts])
        ]
        facts = (f"{name:11}{printable(fact)}" for name, (_, fact) in zip(names, self.facts, strict=True))
        return "\n\n".join([*shown, "\n".join(facts)])


def view(config: Config, *, rows: int = 3, row: int | None = None) -> View:
    """Reads the configuration, the tokenizer and the data as training does, but no weights. Writes nothing.

    rows: how many of the training rows to show, from the first; row: only that of the training file, by its number.
    """
    if rows < 0:
        raise UserError(f"--rows is {rows}, but a number of rows is 0 or more.")
    model, tokenizer = load_empty_model(config.model), load_tokenizer(config.model)
    data = read_data(config, model, tokenizer, date_for(given_path(config.out)))
    labels = config.model.labels if data.train[0].head else data.labels
    chosen = data.train[:rows] if row is None else [_find(config, data, row)]
    shown = [
        mark(example, data.kind, tokenizer, title=_title(config, data, example), labels=labels) for example in chosen
    ]
    feed = Feed(data.train, config.train, max_length=data.max_length, flat=wants_flat(model))
    return View(shown, list(_facts(config, data, feed, model, tokenizer)))


def require_place(file: str) -> Path:
    """Where a page may be written: at a new file, or over one that this command wrote."""
    path = given_path(file)
    if not path.parent.is_dir():
        raise UserError(f"--html is {path}, but there is no folder {path.parent}: make it, or name another.")
    if path.exists() and not (path.is_file() and read_file(path).startswith(MADE_BY.encode())):
        raise UserError(f"--html is {path}, which `cola data` did not write: name another file, or remove it.")
    return path


def write_page(seen: View, config: Config, path: Path) -> None:
    write_file(path, page(f"What the model sees of {config.data.train}", seen.facts, seen.rows).encode())


# --- rows -------------------------------------------------------------------------------------------------------------


def _find(config: Config, data: Data, number: int) -> Example:
    file = itertools.chain(data.train, data.eval if holds_out(config.data) else ())
    found = next((example for example in file if example.row == number), None)
    if found is None:
        raise UserError(
            f"--row is {number}, but {config.data.train} has no row of that number that is used: rows count from 1, "
            "and some may have been dropped, as the counts of `--rows 0` tell."
        )
    return found


def _title(config: Config, data: Data, example: Example) -> str:
    held = "" if any(example is other for other in data.train) else ", held out"
    said = "its class" if data.kind == "labelled" else _learned(example, data.kind)
    return f"row {example.row} of {config.data.train}{held}: {len(example)} tokens, {said} learned"


def _learned(example: Example, kind: str) -> int:
    return 1 if kind == "labelled" else len(learned_places(example, kind))


# --- counts -----------------------------------------------------------------------------------------------------------


def _facts(config: Config, data: Data, feed: Feed, model: Any, tokenizer: Any) -> Iterator[tuple[str, str]]:
    sets = {"train": data.train, "eval": data.eval, "test": [] if data.test is data.eval else data.test}
    sets = {name: examples for name, examples in sets.items() if examples}
    yield "kind", f"{data.kind}, at most {data.max_length} tokens a row"
    yield from (("read", note) for note in data.notes)
    for name, examples in sets.items():
        yield name, _size(examples, data.kind)
    longest = sorted(data.train, key=len, reverse=True)[:NAMED]
    yield "longest", ", ".join(f"row {e.row} ({len(e)})" for e in longest)
    yield "epoch", _epoch(config, feed)
    yield from (("repeats", fact) for fact in _repeats(sets))
    yield "unknown", _unknown(sets, tokenizer)
    if data.kind in ("text", "completion", "messages"):
        yield "ends", _ends(data.train, _stops(model, tokenizer), tokenizer)


def _size(examples: Sequence[Example], kind: str) -> str:
    lengths = sorted(map(len, examples))
    tokens, learned = sum(lengths), sum(_learned(example, kind) for example in examples)
    what = "classes" if kind == "labelled" else f"learned ({learned / tokens:.1%})"
    high = lengths[math.ceil(0.95 * len(lengths)) - 1]
    return (
        f"{len(lengths):,} rows, {tokens:,} tokens, {learned:,} {what}; a row's tokens: median "
        f"{statistics.median(lengths):g}, 95% have at most {high}, longest {lengths[-1]}"
    )


def _epoch(config: Config, feed: Feed) -> str:
    """As the feed makes the first one."""
    t, tokens, places, rows = config.train, 0, 0, 0
    lengths = list(map(len, feed.examples))
    for batch in itertools.islice(feed.sampler, len(feed)):
        widths = [sum(lengths[i] for i in row) for row in batch]
        rows += len(widths)
        tokens += sum(widths)
        places += sum(widths) if feed.flat else max(widths) * len(widths)
    packed = f"{len(lengths):,} packed into {rows:,}; " if t.packing else ""
    return (
        f"{packed}batches: {len(feed):,} of {t.batch_size} rows; steps: {math.ceil(len(feed) / t.accumulation):,}; "
        f"tokens: {tokens:,}, and {places - tokens:,} of padding ({1 - tokens / places:.1%})"
    )


def _repeats(sets: dict[str, list[Example]]) -> Iterator[str]:
    """Rows of the very same tokens."""
    first: dict[tuple[int, ...], int] = {}
    pairs = []
    for example in sets["train"]:
        before = first.setdefault(tuple(example.input_ids), example.row)
        if before != example.row:
            pairs.append(f"row {example.row} is row {before}")
    yield f"train: {len(pairs):,} rows repeat another{_named(pairs)}"
    for name in [name for name in sets if name != "train"]:
        found = ((example, first.get(tuple(example.input_ids))) for example in sets[name])
        pairs = [f"row {example.row} is row {before} of train" for example, before in found if before is not None]
        yield f"{name}: {len(pairs):,} of {len(sets[name]):,} rows are in train, too{_named(pairs)}"


def _named(names: Sequence[str]) -> str:
    return f" ({listed(names, NAMED)})" if names else ""


def _unknown(sets: dict[str, list[Example]], tokenizer: Any) -> str:
    """Tokens outside the model's vocabulary have been refused by `read_data`."""
    unknown, others = tokenizer.unk_token_id, (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    if unknown is None or unknown in others:
        return "this tokenizer has no token of its own for what it does not know"
    facts = []
    for name, examples in sets.items():
        counts = [(example, example.input_ids.count(unknown)) for example in examples]
        count, tokens = sum(n for _, n in counts), sum(map(len, examples))
        rows = [f"row {example.row}" for example, n in counts if n]
        facts.append(f"{name}: {count:,} tokens ({count / tokens:.1%}){_named(rows)}")
    return f"{tokenizer.unk_token} in {'; '.join(facts)}"


def _stops(model: Any, tokenizer: Any) -> set[int]:
    """The tokens at which the model stops to write."""
    of_model = getattr(model.config, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list | tuple) else [of_model]
    return {i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)}


def _ends(examples: Sequence[Example], stops: set[int], tokenizer: Any) -> str:
    """Whether the last learned token is one of `stops`, white space after it aside: chat templates add a line break."""
    blank: dict[int, bool] = {}

    def last(example: Example) -> int | None:
        for token in reversed([label for label in example.labels if label != IGNORE]):
            if token not in blank:
                blank[token] = token not in stops and not tokenizer.decode([token]).strip()
            if not blank[token]:
                return token
        return None

    open_ended = [f"row {example.row}" for example in examples if last(example) not in stops]
    names = listed(tokenizer.convert_ids_to_tokens(sorted(stops)))
    if not stops:
        return "the tokenizer has no end-of-sequence token, so nothing teaches the model to stop"
    if open_ended:
        return f"{len(open_ended):,} of {len(examples):,} rows of train do not end in {names}{_named(open_ended)}"
    return f"all rows of train end in {names}"

"""How far a long piece of work is, and how long it will still take: on stderr, so that results can be piped."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from .. import console

SECONDS_BETWEEN_LINES = 15


class Progress:
    """A bar on a terminal, elsewhere a line every 15 s, and nothing for work that takes less.

    `with Progress("scoring", parts=4) as progress`: `start` begins a part, `progress(share)` says how much of it is
    done. All parts should take about equally long.
    """

    def __init__(self, what: str, *, parts: int = 1, quiet: bool = False) -> None:
        self.what, self.parts, self.quiet = what, parts, quiet
        self.begun, self.label = 0, ""

    def __enter__(self) -> Progress:
        self.started = self.said_at = time.perf_counter()
        self.bar = tqdm(
            desc=self.what,
            total=self.parts,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
            leave=False,
            smoothing=0,
            file=console.errors(),
            disable=True if self.quiet else None,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bar.close()

    def start(self, label: str) -> None:
        """The next part. One more than was planned makes the work longer."""
        self.begun, self.label = self.begun + 1, f" {label}"
        self.bar.total = self.parts = max(self.parts, self.begun)
        self.bar.set_description_str(f"{self.what}{self.label}")

    def __call__(self, share: float) -> None:
        """share: of the part that was started last, from 0 to 1."""
        done = max(self.begun - 1, 0) + min(share, 1.0)
        self.bar.update(done - self.bar.n)
        now = time.perf_counter()
        if self.bar.disable and not self.quiet and now - self.said_at > SECONDS_BETWEEN_LINES:
            self.said_at = now
            left = (self.parts - done) * (now - self.started) / done
            line = f"{self.what}{self.label}: {done / self.parts:.0%} done, {left:.0f} s left"
            console.tell(line)

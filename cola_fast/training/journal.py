"""What a run tells while it trains: rows of metrics, a bar or lines on the terminal, and the plot.

Nothing here decides anything: a run that could not tell would train the same links.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import console, world
from . import metrics, plot
from .progress import SECONDS_BETWEEN_LINES


class Journal:
    def __init__(self, run: Path, *, steps: int, links: int, quiet: bool) -> None:
        self.run, self.steps, self.links, self.quiet = run, steps, links, quiet
        self.stderr = console.errors()
        self.loggers: list[metrics.Logger] = []

    def open(
        self, loggers: tuple[str, ...], *, step: int, link: int, tokens: int, seconds: float, resumed: bool
    ) -> None:
        """Go on from there. seconds: what the run took so far."""
        self.logged_at = self.said_at = time.perf_counter()
        self.started, self.logged_tokens = self.logged_at - seconds, tokens
        with world.together():
            if world.is_main():
                self.loggers = [metrics.JsonLines(self.run, resume_step=step if resumed else -1, link=link)]
                self.loggers += [metrics.LOGGERS[name](self.run) for name in loggers]
        hidden = True if self.quiet else None
        self.bar = tqdm(total=self.steps, initial=step, unit="step", disable=hidden, file=self.stderr)

    def close(self) -> None:
        self.bar.close()
        for logger in self.loggers:
            logger.close()

    @property
    def seconds(self) -> float:
        """What the run took so far."""
        return time.perf_counter() - self.started

    def leave_out(self, seconds: float) -> None:
        """Tokens per second are those of training: time for something else does not count."""
        self.logged_at += seconds

    def step(self) -> None:
        self.bar.update()

    def row(self, row: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.log(row)

    def training(self, *, step: int, link: int, tokens: int, loss: float, lr: float) -> None:
        """The mean loss of the steps since the last such row."""
        now = time.perf_counter()
        rate = (tokens - self.logged_tokens) / max(now - self.logged_at, 1e-9)
        self.logged_tokens, self.logged_at = tokens, now
        row = {"event": "train", "step": step, "link": link, "loss": loss, "lr": lr}
        self.row({**row, "tokens_per_second": round(rate, 1), "seconds": round(now - self.started, 2)})
        speed = f"loss {loss:.3f}, {rate:,.0f} tokens/s"
        if self.bar.disable and now - self.said_at > SECONDS_BETWEEN_LINES:  # no terminal: lines instead of a bar
            left = (self.steps - step) * (now - self.started) / step
            self.say(f"step {step} of {self.steps}: {speed}, {left:.0f} s left")
        self.bar.set_description(f"link {link + 1} of {self.links}")
        self.bar.set_postfix_str(speed)

    def say(self, line: str) -> None:
        self.said_at = time.perf_counter()
        if not self.quiet:
            tqdm.write(console.clean(line), file=self.stderr)

    def draw(self) -> None:
        if not world.is_main():
            return
        try:
            plot.draw(self.run)
        except Exception as error:  # a picture must not stop a run
            self.say(f"the plot was not drawn: {error}")

"""What a long piece of work tells while it goes on."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from cola_fast.training import progress
from cola_fast.training.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_without_a_terminal_a_line_every_15_seconds_says_what_is_left(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("scoring", parts=2) as work:
        work.start("base")
        for share in (0.25, 0.5, 0.75, 1.0):
            clock.now += 10
            work(share)
        work.start("after 1 link")
        clock.now += 10
        work(0.5)
        clock.now += 10
        work(1.0)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines() == [
        "scoring base: 25% done, 60 s left",
        "scoring base: 50% done, 40 s left",
        "scoring after 1 link: 100% done, 0 s left",
    ]


def test_a_part_more_than_planned_makes_the_work_longer(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("scoring", parts=1) as work:
        work.start("base")
        work(1.0)
        work.start("merged export")
        clock.now += 20
        work(0.5)
    assert capsys.readouterr().err == "scoring merged export: 75% done, 7 s left\n"


def test_short_work_and_quiet_work_say_nothing(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, seconds in ((False, 14), (True, 1000)):
        with Progress("scoring", quiet=quiet) as work:
            work.start("base")
            clock.now += seconds
            work(0.5)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress("scoring", parts=2) as work:
        work.start("base")
        work(1.0)
        work.start("after 1 link")
    assert "scoring after 1 link:  50%|" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()

"""Spans and learning rates."""

from __future__ import annotations

import pytest

from cola_fast.config import ScheduleConfig
from cola_fast.errors import UserError
from cola_fast.training.schedule import plan


def make(**keys: object) -> ScheduleConfig:
    return ScheduleConfig(**{"links": 3, "steps": 100, "lr": 1.0, **keys})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, [33, 34, 33]),
        ({"shares": (3.0, 2.0, 1.0)}, [50, 33, 17]),
        ({"steps": 3}, [1, 1, 1]),
        ({"steps": 4, "shares": (100.0, 1.0, 1.0)}, [2, 1, 1]),
        ({"steps": None, "epochs": 1.5}, [5, 5, 5]),
    ],
    ids=str,
)
def test_links_divide_the_whole(keys: dict[str, object], steps: list[int]) -> None:
    schedule = plan(make(**keys), rank=8, steps_per_epoch=10)
    assert [span.steps for span in schedule.spans] == steps
    assert schedule.total == sum(steps)


def test_ranks_step_down() -> None:
    assert [s.rank for s in plan(make(ranks=(8, 4, 2)), rank=16, steps_per_epoch=1).spans] == [8, 4, 2]
    assert [s.rank for s in plan(make(), rank=16, steps_per_epoch=1).spans] == [16, 16, 16]


def test_too_few_steps() -> None:
    with pytest.raises(UserError, match="2 steps for 3 links"):
        plan(make(steps=2), rank=8, steps_per_epoch=1)


def curve(**keys: object) -> list[float]:
    schedule = plan(make(**keys), rank=8, steps_per_epoch=1)
    starts = [0, *(sum(s.steps for s in schedule.spans[: i + 1]) for i in range(3))]
    return [schedule.lr(t, link, starts[link]) for link in range(3) for t in range(starts[link], starts[link + 1])]


def test_global_linear_is_one_line_over_the_chain() -> None:
    assert curve() == pytest.approx([1 - t / 100 for t in range(100)])


def test_restart_begins_anew_at_each_link() -> None:
    rates = curve(lr_span="restart", steps=99)
    assert rates[0] == rates[33] == rates[66] == 1
    assert rates[:33] == rates[33:66] == rates[66:]


def test_warmup_shapes_and_end() -> None:
    steps = curve(warmup=4)
    assert steps[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve(warmup=0.04) == pytest.approx(steps)
    cosine = curve(lr_shape="cosine", lr_end=0.1)
    assert cosine[50] == pytest.approx(0.55)
    assert min(cosine) == pytest.approx(0.1, abs=1e-3)
    assert set(curve(lr_shape="constant", lr_end=0.5)) == {1.0}


def test_every_rate_is_positive_until_the_end() -> None:
    for shape in ("linear", "cosine", "constant"):
        for span in ("global", "restart"):
            assert all(rate > 0 for rate in curve(lr_shape=shape, lr_span=span, warmup=0.1))


@pytest.mark.parametrize(
    ("batches", "accumulation", "epochs", "steps"), [(5, 4, 3, 4), (5, 8, 3, 2), (7, 1, 0.1, 1), (30, 1, 0.1, 3)]
)
def test_epochs_are_overshot_by_less_than_a_step(batches: int, accumulation: int, epochs: float, steps: int) -> None:
    """Batches run on across the ends of epochs, so that no epoch is rounded up by itself."""
    schedule = plan(make(links=1, steps=None, epochs=epochs), rank=8, steps_per_epoch=batches / accumulation)
    assert schedule.total == steps

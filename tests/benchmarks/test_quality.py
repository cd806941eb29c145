"""The evaluation: which runs it makes and when, what its arms train, and what it says of made results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from benchmarks import harness, quality, quality_problems
from benchmarks.quality import LADDER, Job, Setting, finished, pending, sweep, work
from benchmarks.quality_arms import ARMS, BATCH, Diverged, Training
from benchmarks.quality_problems import NextToken, Scores
from benchmarks.quality_tables import quality_tables

SETTING = Setting("minilm", "movie", ("lora", "cola-2"), steps=4, seeds=2, items=6)
SIZE = {"steps": 4, "batch": BATCH, "extra": SETTING.extra, "items": 6}


class Tiny:
    """Two linears and a head, on points of two classes."""

    head_lr = 0.01
    made: list[tuple[int, bool]] = []  # noqa: RUF012

    def __init__(self, task: str, seed: int, *, full: bool, items: int, extra: int) -> None:
        Tiny.made.append((seed, full))
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
        self.linear = nn.Linear(24, 2)
        with torch.no_grad():
            for parameter in [*self.model.parameters(), *self.linear.parameters()]:
                parameter.normal_(generator=generator)
        self.head = list(self.linear.parameters())
        self.x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
        self.lengths = [1] * len(self.x)
        self.items = items
        self.seen: list[list[int]] = []

    def loss(self, examples: Sequence[int]) -> Tensor:
        self.seen.append(list(examples))
        x = self.x[list(examples)]
        return nn.functional.cross_entropy(self.linear(self.model(x)), (x[:, 0] > 0).long())

    def scores(self, split: str) -> Scores:
        return Scores([0.5] * self.items, [True, False] * (self.items // 2))

    def states_batches(self) -> Sequence[Mapping[str, Tensor]]:
        raise AssertionError("only GeLoRA looks at hidden states")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[Tiny]:
    monkeypatch.setattr(quality, "MODELS", {"minilm": Tiny})
    monkeypatch.setattr(Tiny, "made", [])
    return Tiny


# --- which runs -------------------------------------------------------------------------------------------------------


def _swept(losses: Mapping[float, float | None]) -> list[dict[str, Any]]:
    return [{"arm": "lora", "split": "validation", "lr": lr, "loss": loss} for lr, loss in losses.items()]


START = quality.STARTS["minilm"][""]
FIRST = LADDER[LADDER.index(START) :][:4]


def test_nothing_is_tested_before_four_rates_are_in() -> None:
    rates, best = sweep(SETTING, "lora", _swept(dict.fromkeys(FIRST[:3], 0.5)))
    assert (rates, best) == (FIRST, None)


@pytest.mark.parametrize(
    ("losses", "more", "best"),
    [
        ([0.5, 0.4, 0.6, 0.7], None, FIRST[1]),
        ([0.4, 0.5, 0.6, 0.7], LADDER[LADDER.index(START) - 1], None),
        ([0.7, 0.6, 0.5, 0.4], LADDER[LADDER.index(START) + 4], None),
        ([0.7, 0.6, 0.5, None], None, FIRST[2]),
    ],
    ids=["inside", "below", "above", "the last diverged"],
)
def test_a_sweep_goes_on_past_an_edge(losses: list[float | None], more: float | None, best: float | None) -> None:
    rates, found = sweep(SETTING, "lora", _swept(dict(zip(FIRST, losses, strict=True))))
    assert found == best
    if more is not None:
        assert rates == [more]


def test_an_arm_without_a_rate_is_only_tested() -> None:
    jobs = list(pending([replace(SETTING, arms=("frozen",))], {}))
    assert [(job.split, job.seed) for job in jobs] == [("test", 0), ("test", 1)]


def test_the_test_uses_the_best_rate_and_the_paired_seeds(tiny: type[Tiny], tmp_path: Path) -> None:
    record = {"size": SIZE, "arm": "lora", "split": "validation"}
    for lr, loss in zip(FIRST, [0.5, 0.3, 0.4, 0.6], strict=True):
        path = tmp_path / Job(SETTING, "lora", "validation", lr, quality.SWEEP_SEED).name
        harness.write_result(path, {**record, "lr": lr, "loss": loss})
    jobs = [job for job in pending([SETTING], finished([SETTING], tmp_path)) if job.arm == "lora"]
    assert [(job.split, job.lr, job.seed) for job in jobs] == [("test", FIRST[1], 0), ("test", FIRST[1], 1)]


def test_a_cut_run_is_made_again_and_the_others_are_not(
    tiny: type[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work([SETTING], tmp_path)
    with monkeypatch.context() as patch:

        def cut(self: Tiny, split: str) -> Scores:
            raise KeyboardInterrupt

        patch.setattr(Tiny, "scores", cut)
        with pytest.raises(KeyboardInterrupt):
            work([SETTING], tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    first = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    while work([SETTING], tmp_path):
        pass
    assert {path: path.read_bytes() for path in first} == first
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(tiny.made) == len(records) + 1, "only the one that was cut was made twice"
    for arm in SETTING.arms:
        mine = [r for r in records if r["arm"] == arm]
        assert sorted(r["seed"] for r in mine if r["split"] == "test") == [0, 1]
        assert len({r["lr"] for r in mine if r["split"] == "validation"}) >= 4
    assert list(pending([SETTING], finished([SETTING], tmp_path))) == []
    changed = replace(SETTING, steps=5)
    assert list(pending([changed], finished([changed], tmp_path))), "runs of another size do not count"


def test_two_processes_do_not_make_the_same_run(tiny: type[Tiny], tmp_path: Path) -> None:
    first, second, *_ = pending([SETTING], {})
    with FileLock((tmp_path / first.name).with_suffix(".lock")):
        assert work([SETTING], tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == [second.name]


def test_a_run_that_diverges_is_kept_as_such(tiny: type[Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiny, "loss", lambda self, examples: self.linear.weight.sum() * torch.nan)
    assert work([SETTING], tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["loss"] is None


# --- what an arm trains -----------------------------------------------------------------------------------------------


def _trained(name: str, seed: int = 0, steps: int = 6) -> tuple[Tiny, dict[str, Tensor], Training]:
    """The problem after training, and its model's weights before."""
    problem = Tiny("movie", seed, full=False, items=6, extra=1)
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    training = Training(problem, ARMS[name], steps, 0.01, seed)
    training.run()
    return problem, before, training


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.gelora is None])
def test_an_arm_trains_what_it_says(name: str) -> None:
    arm, (problem, before, training) = ARMS[name], _trained(name)
    after = problem.model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    if arm.full:
        assert moved == before.keys()
    elif len(arm.ranks) > 1 and arm.merge:
        assert moved == {"0.weight", "2.weight"}, "links have been merged into the weights"
    else:
        assert not moved
    assert training.trained == (
        sum(v.numel() for v in before.values()) if arm.full else sum(arm.ranks[:1]) * (48 if arm.frozen else 96)
    )
    for key, value in after.items():
        if key.endswith("lora_A"):
            assert len(value) == arm.ranks[-1]


def test_every_arm_sees_the_same_batches_and_head() -> None:
    seen = [_trained(name, seed=3)[0].seen for name in ("frozen", "lora", "lora-restarts", "cola-3", "full")]
    assert all(other == seen[0] for other in seen)
    assert len(seen[0]) == 6
    assert _trained("lora", seed=4)[0].seen != seen[0]


def test_without_a_merge_the_factors_go_on() -> None:
    """One step more after a restart moves them by no more than its learning rate, so they did not start afresh."""
    problem = Tiny("movie", 0, full=False, items=6, extra=1)
    factors = []
    for _ in Training(problem, ARMS["lora-restarts"], 6, 0.01, 0):
        factors.append(problem.model.get_submodule("0").lora_B.detach().clone())
    assert all((b - a).abs().max() <= 0.011 for a, b in itertools.pairwise(factors))
    assert factors[-1].any()


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiny, "loss", lambda self, examples: self.linear.weight.sum() * torch.nan)
    with pytest.raises(Diverged, match="learning rate"):
        _trained("lora")


# --- what it says -----------------------------------------------------------------------------------------------------


def _result(accuracies: Mapping[str, float], left: int = 0) -> dict[str, Any]:
    """200 sentences and three seeds; the loss is 1 - accuracy, of every sentence."""
    runs = []
    for arm, accuracy in accuracies.items():
        correct = "1" * round(200 * accuracy) + "0" * (200 - round(200 * accuracy))
        losses = " ".join([str(round(1000 * (1 - accuracy)))] * 200)
        for seed in (2, 0, 1):
            run = {"setting": "minilm-movie", "arm": arm, "split": "test", "lr": 1e-3, "seed": seed}
            runs.append({**run, "loss": 1 - accuracy, "accuracy": accuracy, "correct": correct, "losses": losses})
    setting = {"model": "minilm", "task": "movie", "arms": list(accuracies), "steps": 4, "seeds": 3, "items": 200}
    teacher = [{"arm": "LoRA", "left": [0.5]}]
    result = {"settings": [setting], "runs": runs, "left": left, "ranks": {}, "teacher": teacher}
    return {**result, "environment": harness.environment(), "quick": False}


def test_the_sentence_follows_from_the_interval() -> None:
    found = {
        name: quality_tables(_result({"lora": 0.8, "cola-3": accuracy}))["quality-verdict"]
        for name, accuracy in (("better", 0.9), ("same", 0.8), ("worse", 0.7))
    }
    assert "In 1 of 1 settings" in found["better"]
    assert "in 1 to be worse" in found["worse"]
    assert found["better"].count("a gain") == 2
    assert "+10.0 (" in found["better"]
    assert found["same"].count("no gain shown") == 2
    assert found["worse"].count("worse than LoRA") == 2


def test_the_table_gives_the_share_of_the_gap() -> None:
    table = quality_tables(_result({"frozen": 0.5, "lora": 0.6, "cola-3": 0.75, "full": 0.9}))["quality"]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {ARMS['cola-3'].label} |")]
    assert "+15.0 (+1" in line
    assert "| 0.750 ± 0.000 |" in line
    assert "| 0.50 (0.50 to 0.50) |" in line, "of the loss, which is the same for every sentence"
    none = quality_tables(_result({"lora": 0.6, "cola-3": 0.75, "full": 0.5}))["quality"]
    assert none.count("| no gap |") == 1
    blocks = quality_tables(_result({"lora": 0.6, "cola-3": 0.75, "full": 0.9}))
    assert "COLA closes 0.50 (" in blocks["quality-verdict"]
    assert blocks["quality-verdict"].startswith(blocks["quality-summary"].removesuffix("."))


def test_without_labels_the_loss_decides() -> None:
    result = _result({"lora": 0.8, "cola-3": 0.9, "full": 1.0})
    for run in result["runs"]:
        del run["correct"], run["accuracy"]
    blocks = quality_tables(result)
    assert "In 1 of 1 settings" in blocks["quality-verdict"]
    assert "COLA closes 0.50 (0.50 to 0.50) of it" in blocks["quality-verdict"]
    assert "points" not in blocks["quality-verdict"] + blocks["quality"].split("±")[0]
    (line,) = [line for line in blocks["quality"].splitlines() if line.startswith(f"| {ARMS['cola-3'].label} |")]
    assert line.endswith("| 0.100 ± 0.000 | **-0.100 (-0.100 to -0.100)** | 0.50 (0.50 to 0.50) |")


def test_a_sentence_s_loss_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, of sentences of unequal length in one batch."""
    monkeypatch.setattr(quality_problems, "_autocast", lambda device, enabled=True: nullcontext())
    problem = NextToken("movie", 0, full=True, items=6, extra=2)
    found = problem.scores("test")
    assert found.correct is None
    model: Any = problem.model
    examples = sorted(problem.splits["test"], key=len)
    for loss, example in zip(found.losses, examples, strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            assert loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-4)  # sums of 49,152 terms


def test_an_arm_counts_once_all_its_seeds_are_in() -> None:
    result = _result({"lora": 0.6, "cola-3": 0.75}, left=1)
    result["runs"].pop()
    blocks = quality_tables(result)
    assert ARMS["cola-3"].label not in blocks["quality"]
    assert "In 0 of 0 settings" in blocks["quality-verdict"]
    assert "1 runs are left" in blocks["quality"]


def test_eight_links_pass_the_best_matrix_of_rank_4_and_one_cannot() -> None:
    one, restarts, chain, tail = (row["left"][0] for row in quality.teach(60, seeds=1))
    assert chain < 0.1 * tail
    assert min(one, restarts) >= 0.999 * tail

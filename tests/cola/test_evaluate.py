"""Scores: what is told while they are computed, and which weights need no second look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cola_fast import attach
from cola_fast.commands import scores
from cola_fast.commands.scores import Scores, digest
from cola_fast.config import ModelConfig
from cola_fast.data.encode import IGNORE, Example
from cola_fast.training.evaluate import evaluate
from cola_fast.training.models import load_model
from cola_fast.training.progress import Progress

PROMPTS = [[5 + i, *range(7, 10 + i)] for i in range(8)]
TEXTS = [Example(prompt, prompt) for prompt in PROMPTS]


def choices(*words: tuple[int, ...]) -> list[Example]:
    return [
        Example([*prompt, *words[0]], [IGNORE] * len(prompt) + [*words[0]], len(prompt), words, 0) for prompt in PROMPTS
    ]


EXAMPLES = {"text": TEXTS, "one token": choices((3,), (4,)), "several tokens": choices((3, 4), (5,))}


@pytest.mark.parametrize("examples", EXAMPLES.values(), ids=EXAMPLES)
def test_the_share_that_is_done_is_told_and_changes_nothing(model: nn.Module, examples: list[Example]) -> None:
    told: list[float] = []
    assert evaluate(model, examples, batch_size=4, tell=told.append) == evaluate(model, examples, batch_size=4)
    assert len(told) > 1
    assert told == sorted(told)
    assert told[-1] == 1.0


@pytest.fixture
def load() -> Callable[[Path], nn.Module]:
    return lambda folder: load_model(ModelConfig(name=str(folder), dtype="fp32", device="cpu"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were really scored."""
    models: list[nn.Module] = []

    def counted(model: nn.Module, *args: object, **keys: object) -> object:
        models.append(model)
        return evaluate(model, *args, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(scores, "evaluate", counted)
    return models


def test_the_same_weights_are_scored_once(
    tiny_folder: Path, tmp_path: Path, load: Callable[[Path], nn.Module], scored: list[nn.Module]
) -> None:
    model = load(tiny_folder)
    chain = attach(model, r=2, alpha=4)
    with Progress("scoring", parts=3, quiet=True) as progress:
        found = Scores(TEXTS, batch_size=4, progress=progress)
        found.add("open", model)
        with torch.no_grad():
            for name, parameter in chain.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_()
        found.add("trained", model)
        chain.tie()
        found.add("tied", model, rank="2")
        chain.export_merged(tmp_path / "merged")
        found.add("merged", load(tmp_path / "merged"))
    assert len(scored) == 3
    tied, merged = found.rows[2:]
    assert merged == {
        "model": "merged",
        "same_as": "tied",
        **{key: tied[key] for key in ("loss", "accuracy", "examples")},
    }
    assert found.rows[0]["loss"] != tied["loss"]


def test_a_digest_sees_every_bit_and_setting_that_decides_a_score(
    tiny_folder: Path, load: Callable[[Path], nn.Module]
) -> None:
    def change_weight(model: nn.Module) -> None:
        weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))

    def change_buffer(model: nn.Module) -> None:
        name, buffer = next((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())
        buffer[0] += 1
        assert name not in model.state_dict()

    def change_config(model: nn.Module) -> None:
        model.config.rms_norm_eps *= 2

    def open_link(alpha: float) -> Callable[[nn.Module], object]:
        return lambda model: attach(model, r=2, alpha=alpha, seed=0)

    changes: list[Callable[[nn.Module], object]] = [
        lambda model: None, change_weight, change_buffer, change_config, open_link(4), open_link(8)
    ]  # fmt: skip
    digests = []
    for change in changes:
        change(model := load(tiny_folder))
        digests.append(digest(model))
    assert len(set(digests)) == len(changes)
    assert digest(load(tiny_folder)) == digests[0]

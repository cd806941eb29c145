"""TwoNN where the dimension is known, and the ranks that follow from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach, config, gelora_ranks, ranks
from cola_fast.layers.targets import block_of
from cola_fast.ranks import block_ranks, two_nn
from cola_fast.training import trainer

from ..conftest import tiny_llama


def cloud(d: int, seed: int, n: int = 2000, ambient: int = 40) -> Tensor:
    """A d-dimensional Student t distribution (6 degrees of freedom), bent into 40 dimensions.

    Its tails leave the cloud without an edge. The points of a cube, a sphere or a Gaussian nearly all lie at the edge
    when d is 20, which makes every TwoNN say 15 to 18.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    flat = normal(n, d) / normal(n, 6).square().mean(1, keepdim=True).sqrt()
    frame = torch.linalg.qr(normal(ambient, d))[0]
    bent = flat @ frame.t()
    return torch.cat([bent, 0.1 * torch.sin(flat[:, :1])], dim=1)


@pytest.mark.parametrize("method", ["fit", "mle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("d", [2, 5, 10, 20])
def test_the_dimension_of_known_manifolds(d: int, dtype: torch.dtype, method: Any) -> None:
    found = [two_nn(cloud(d, seed).to(dtype), method=method) for seed in (0, 1)]
    assert found == pytest.approx([d, d], rel=0.1)


def test_a_curved_surface() -> None:
    """On a sphere in three dimensions the area within a chord r is exactly proportional to r²."""
    points = torch.randn(2000, 3, generator=torch.Generator().manual_seed(3))
    assert two_nn(nn.functional.normalize(points)) == pytest.approx(2, rel=0.05)


def test_the_ratios_are_exact_where_they_can_be_computed_by_hand() -> None:
    """Points on a line at 0, 1, 3, 7, ..., 2^n - 1: r1 and r2 are differences of powers of two."""
    place = 2.0 ** torch.arange(24, dtype=torch.float64) - 1
    mu = [float(sorted((place - p).abs().tolist())[2] / sorted((place - p).abs().tolist())[1]) for p in place]
    log = torch.tensor(mu, dtype=torch.float64).log()
    assert two_nn(place[:, None], method="mle") == pytest.approx(24 / float(log.sum()))
    x = log.sort().values[:21]
    y = -torch.log(1 - torch.arange(1, 22, dtype=torch.float64) / 25)
    assert two_nn(place[:, None]) == pytest.approx(float((x @ y) / (x @ x)))


def test_duplicates_chunks_and_scale_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = cloud(3, 5, n=300)
    whole = two_nn(points)
    assert two_nn(torch.cat([points, points[:100], points[:50]])) == pytest.approx(whole)
    assert two_nn(1000 * points + 5) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(ranks, "DISTANCES", 1000)
    assert two_nn(points) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        (torch.randn(19, 3), r"There are 19 distinct points, but TwoNN needs at least 20"),
        (torch.ones(100, 3), r"There are 1 distinct points"),
        (torch.randn(100), r"must be floating point of shape \[n, d\]"),
        (torch.zeros(30, 2, dtype=torch.int64), r"points are torch.int64"),
        (torch.full((30, 2), float("nan")), r"hold NaN"),
    ],
    ids=["few", "duplicates", "vector", "whole-numbers", "nan"],
)
def test_points_it_cannot_use(points: Tensor, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        two_nn(points)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("encoder.layer.11.attention.self.query", "encoder.layer.11"),
        ("model.layers.0.mlp.experts.7.w1", "model.layers.0"),
        ("lm_head", "lm_head"),
        ("fc1.weight2", "fc1.weight2"),
        ("0", "0"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


# --- ranks of models --------------------------------------------------------------------------------------------------


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model: nn.Module = BertModel(BertConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()
    return model


def padded(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (count, 16), generator=generator)
    ids = torch.randint(2, 64, (count, 16, 8), generator=generator)
    return [
        {"input_ids": i, "attention_mask": (torch.arange(8) < n[:, None]).long()}
        for i, n in zip(ids, lengths, strict=True)
    ]


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert], ids=["llama", "bert"])
def test_dimensions_are_those_of_the_pooled_states(make: Callable[[], nn.Module]) -> None:
    """Against transformers' own output_hidden_states, row by row without padding."""
    model = make()
    body: Any = getattr(model, "base_model", model)
    rows = [ids[: int(mask.sum())] for b in padded() for ids, mask in zip(*b.values(), strict=True)]
    states: list[list[Tensor]] = []
    last: list[Tensor] = []
    (stack,) = (m for m in body.modules() if isinstance(m, nn.ModuleList))
    hook = stack[-1].register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for row in rows:
            hidden = body(row[None], output_hidden_states=True).hidden_states
            states.append([h[0].mean(0) for h in hidden[:-1]] + [last[-1].reshape(-1, 32).mean(0)])
    hook.remove()
    truth = [two_nn(torch.stack(points)) for points in zip(*states, strict=True)]
    model.train()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    found = block_ranks(model, padded())
    assert model.training
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [b.dimension for b in found] + [found[-1].next_dimension] == pytest.approx(truth, rel=1e-3)
    for b, before, after in zip(found, truth, truth[1:], strict=False):
        assert b.rank == round(max(after - before, 0)) + 1
        assert all(block_of(name) == b.block for name in b.modules)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]], ids=str)
def test_modules_of_a_block_share_its_rank(targets: Any) -> None:
    model = tiny_bert()
    found = gelora_ranks(model, padded(), targets=targets, mean_rank=4)
    chain = attach(model, targets=targets if targets != "all-linear" else list(found), rank_pattern=found)
    blocks: dict[str, set[int]] = {}
    for name, rank in chain.ranks().items():
        blocks.setdefault(block_of(name), set()).add(rank)
    assert all(len(shared) == 1 for shared in blocks.values())
    assert sum(rank for (rank,) in blocks.values()) == 12


@pytest.mark.parametrize("mean", [1, 1.5, 2, 4.25, 7])
def test_the_budget_is_met(mean: float) -> None:
    gains = {"a": 0.0, "b": 0.0, "c": 5.3, "d": 1.2}
    found = ranks._rescale(gains, mean)
    assert sum(found.values()) == round(4 * mean)
    assert min(found.values()) >= 1
    assert found["c"] >= found["d"] >= found["a"]


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="No target lies in a block"):
        gelora_ranks(nn.Sequential(nn.Linear(3, 3)), [])
    with pytest.raises(UserError, match="no batches"):
        gelora_ranks(tiny_llama(), [])
    with pytest.raises(UserError, match="mean_rank is 0"):
        gelora_ranks(tiny_llama(), padded(), mean_rank=0)


@pytest.mark.parametrize("every_link", [False, True], ids=["once", "every-link"])
def test_a_run_records_its_ranks_and_does_not_estimate_again(
    every_link: bool, config_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = ranks.gelora_ranks

    def counted(*args: Any, **keys: Any) -> dict[str, int]:
        calls.append(1)
        found = whole(*args, **keys)
        return {name: rank % 2 + len(calls) for name, rank in found.items()}

    monkeypatch.setattr(ranks, "gelora_ranks", counted)
    gelora = {"every_link": every_link, "mean_rank": 3.0}
    written = {"model.layers.1.self_attn.q_proj": 6, "v_proj": 5}
    path = config_file(chain__method=["cola", "gelora"], chain__gelora=gelora, chain__rank_pattern=written)
    trainer.train(config.load(path), quiet=True)
    assert len(calls) == (3 if every_link else 1)
    record = json.loads((tmp_path / "run" / "chain.json").read_text())
    assert record["scaling"] == "constant"
    for link in record["links"]:
        assert link["ranks"]["model.layers.1.self_attn.v_proj"] == 5  # what the user writes wins
        assert link["ranks"]["model.layers.1.self_attn.q_proj"] == 6
        assert link["ranks"]["model.layers.0.self_attn.q_proj"] - (link["index"] if every_link else 0) in (1, 2)
    trainer.train(config.load(path), quiet=True)
    assert len(calls) == (3 if every_link else 1)

"""GeLoRA (arXiv 2412.09250): ranks from the intrinsic dimension of the hidden states.

d_l is the intrinsic dimension of the states that enter block l (d_L: that leave the last one), estimated by TwoNN from
one point an example: the mean of its tokens' states. A block that gains dimensions needs that many directions more, so

    r_l = round(max(d_{l+1} - d_l, 0)) + 1

for all linears of block l. From the paper: the rule, TwoNN and mean-pooling, as this project's notes give them.
Unverified (we read the abstract only): that dimensions are subtracted first and rounded, to the nearest integer, after.
Ours: the rescaling to a budget, and estimating again at every knot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .errors import UserError
from .layers.targets import block_of, select_modules
from .layers.torch_modes import evaluating

if TYPE_CHECKING:
    from .data.encode import Example

FEWEST = 20  # distinct points below which TwoNN says nothing
DISCARD = 0.1  # share of the largest ratios left out of the fit
DISTANCES = 2**24  # elements of a chunk of the distance matrix


def two_nn(points: Tensor, *, method: Literal["fit", "mle"] = "fit") -> float:
    """Intrinsic dimension of a cloud of points, by TwoNN (Facco et al., Scientific Reports 2017, arXiv 1803.06992).

    mu is a point's distance to its second neighbour over that to its first. "fit": the slope through the origin of
    -ln(1 - i / (n + 1)) on ln mu_(i), mu_(i) in rising order, without the 10 % largest. "mle": n / sum(ln mu).

    At d = 20, n = 2000 points are too few to fill a cube, a sphere or a Gaussian, and any TwoNN says 10 to 25 % less.

    Args:
        points: [n, d], any float dtype and device. Distances are computed in fp32, or fp64 if the points are;
            duplicates are dropped first, since a point at distance 0 has no ratio.

    Raises:
        UserError: not a matrix, a value that is not finite, or fewer than 20 distinct points.
    """
    if points.dim() != 2 or not points.is_floating_point():
        raise UserError(f"points are {points.dtype} {tuple(points.shape)}, but must be floating point of shape [n, d].")
    if not torch.isfinite(points).all():
        raise UserError("points hold NaN or infinite values: leave those rows out.")
    points = torch.unique(points.detach().to(torch.promote_types(points.dtype, torch.float32)), dim=0)
    n = len(points)
    if n < FEWEST:
        raise UserError(f"There are {n} distinct points, but TwoNN needs at least {FEWEST}: use more examples.")
    log_mu = torch.cat([_log_ratios(points, rows) for rows in _chunks(n)]).sort().values
    if method == "mle":
        return n / float(log_mu.sum())
    kept = math.floor((1 - DISCARD) * n)
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64, device=points.device) / (n + 1))
    x = log_mu[:kept]
    return float((x * y).sum() / x.square().sum())


def _log_ratios(points: Tensor, rows: slice) -> Tensor:
    """ln mu of these rows, fp64."""
    # the faster way by a matrix product loses what is left of two nearly equal points
    distances = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
    distances[torch.arange(len(distances)), torch.arange(rows.start, rows.start + len(distances))] = math.inf
    nearest = distances.topk(2, largest=False).values.double()
    return nearest[:, 1].log() - nearest[:, 0].log()


def _chunks(n: int) -> Iterator[slice]:
    rows = max(1, DISTANCES // n)
    return (slice(start, start + rows) for start in range(0, n, rows))


# --- ranks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockRank:
    block: str  # `model.layers.3`
    dimension: float  # of the states that enter it
    next_dimension: float  # of those that leave it
    rank: int
    modules: dict[str, int]  # name -> rank: the block's, or the highest that a smaller weight can have


def gelora_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    targets: str | Sequence[str] = "all-linear",
    mean_rank: float | None = None,
) -> dict[str, int]:
    """Module name -> rank, as `attach(rank_pattern=...)` takes it, for the targets that lie in a block.

    Args:
        model: any transformer whose blocks are in a ModuleList; it is left in its mode, and unchanged.
        batches: what its forward takes: `input_ids` [B, T], and `attention_mask` [B, T] where rows are padded.
        mean_rank: rescale the blocks' ranks to this mean (at least 1); as they come out when None.

    Raises:
        UserError: no target lies in a block, or there are too few distinct examples (see `two_nn`).
    """
    blocks = block_ranks(model, batches, targets=targets, mean_rank=mean_rank)
    return {name: rank for block in blocks for name, rank in block.modules.items()}


def block_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    targets: str | Sequence[str] = "all-linear",
    mean_rank: float | None = None,
) -> list[BlockRank]:
    """The same by block, in the model's order, with the dimensions."""
    if mean_rank is not None and mean_rank < 1:
        raise UserError(f"mean_rank is {mean_rank}, but a rank is at least 1.")
    modules = select_modules(model, targets)
    members: dict[str, list[str]] = {}
    for name in modules:
        members.setdefault(block_of(name), []).append(name)
    stacks = {block.rpartition(".")[0]: block for block in members if block.rpartition(".")[2].isdigit()}
    stacks = {stack: block for stack, block in stacks.items() if isinstance(_submodule(model, stack), nn.ModuleList)}
    if not stacks:
        raise UserError(
            "No target lies in a block (a numbered member of a ModuleList), so GeLoRA has nothing to measure."
        )
    dimensions = _dimensions(model, batches, list(stacks))
    inside = [block for block in members if block in dimensions]
    gains = {block: max(dimensions[block][1] - dimensions[block][0], 0.0) for block in inside}
    highest = {name: min(module.out_features, module.in_features) for name, module in modules.items()}
    ranks = _rescale(gains, mean_rank) if mean_rank is not None else {b: round(gain) + 1 for b, gain in gains.items()}
    return [
        BlockRank(
            block,
            *dimensions[block],
            min(ranks[block], max(highest[name] for name in members[block])),
            {name: min(ranks[block], highest[name]) for name in members[block]},
        )
        for block in inside
    ]


def _rescale(gains: Mapping[str, float], mean: float) -> dict[str, int]:
    """Ranks in proportion to gain + 1, at least 1, whose sum is that of `mean`, rounded: largest remainders first."""
    total = max(len(gains), round(mean * len(gains)))
    wanted = {block: (gain + 1) * total / (sum(gains.values()) + len(gains)) for block, gain in gains.items()}
    ranks = {block: max(1, math.floor(want)) for block, want in wanted.items()}
    while sum(ranks.values()) < total:
        ranks[max(ranks, key=lambda block: wanted[block] - ranks[block])] += 1
    while sum(ranks.values()) > total:
        above_one = [block for block, rank in ranks.items() if rank > 1]
        ranks[min(above_one, key=lambda block: wanted[block] - ranks[block])] -= 1
    return ranks


@torch.no_grad()
def _dimensions(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], stacks: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Block -> intrinsic dimension of its input and of its output, for all blocks of the stacks."""
    mask: Tensor | None = None
    pooled: dict[str, list[Tensor]] = {}  # place -> mean states [B, H] of each batch

    def keep(place: str, states: Any) -> None:
        states = states[0] if isinstance(states, tuple) else states
        weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.device)
        weights = weights.to(torch.float32)[..., None]
        pooled.setdefault(place, []).append((states.float() * weights).sum(1).div(weights.sum(1)).cpu())

    hooks, places = [], {}
    for stack in stacks:
        blocks = [f"{stack}.{number}" for number in range(len(_submodule(model, stack)))]  # type: ignore[arg-type]
        for block, after in zip(blocks, [*blocks[1:], stack], strict=True):
            places[block] = (block, after)
            hooks.append(
                _submodule(model, block).register_forward_pre_hook(
                    lambda _, args, options, block=block: keep(block, args[0] if args else options["hidden_states"]),
                    with_kwargs=True,
                )
            )
        last = _submodule(model, blocks[-1])
        hooks.append(last.register_forward_hook(lambda _, args, output, stack=stack: keep(stack, output)))
    device = next(model.parameters()).device
    body: Any = getattr(model, "base_model", model)  # transformers' name for the model without its head
    try:
        with evaluating(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                body(**{key: value.to(device) for key, value in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    if not pooled:
        raise UserError("There are no batches to measure the hidden states on.")
    found = {place: two_nn(torch.cat(states).to(device)) for place, states in pooled.items()}
    return {block: (found[before], found[after]) for block, (before, after) in places.items()}


def _submodule(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def example_batches(examples: Sequence[Example], *, limit: int, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """The first `limit` examples, longest first, padded on the right."""
    chosen = sorted(examples[:limit], key=len, reverse=True)
    for start in range(0, len(chosen), size):
        rows = [torch.tensor(example.input_ids) for example in chosen[start : start + size]]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        yield {"input_ids": ids, "attention_mask": mask}

"""nf4_merge_: what each rounding does to the codes, and to nothing else; Triton against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")

import cola_kernels
from cola_kernels import nf4, nf4_fold

from .conftest import DEVICE, peak_memory
from .nf4_weights import dequantised, quantise

LEVELS = torch.tensor(nf4.LEVELS, dtype=torch.float64)


def factors(n: int, k: int, r: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose products are exact in fp32, so that any order of summation gives one result."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    a, b = (torch.randint(-8, 9, shape, generator=generator) / 64.0 for shape in ((r, k), (n, r)))
    return (a * size).to(DEVICE), b.to(DEVICE)


def activations(k: int, tokens: int = 4096, seed: int = 0) -> torch.Tensor:
    """The second moment of correlated inputs: a few directions hold most of what they vary."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -2, k)
    x = torch.randn(tokens, k, generator=generator) @ mixing.t()
    return (x.t() @ x / tokens).to(DEVICE)


def scales_of(weight: Any) -> torch.Tensor:
    """fp64 absmax of every element [N, K], by bitsandbytes: what it reads where every code is the highest."""
    ones = torch.full_like(weight.data, 0xFF)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(ones, weight.quant_state).double()


def state_bytes(weight: Any) -> list[torch.Tensor]:
    state = weight.quant_state
    tensors = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        tensors += [state.state2.absmax, state.state2.code]
    return [t.clone() for t in tensors if t is not None]


def merge(weight: Any, a: torch.Tensor, b: torch.Tensor, rounding: str, **options: Any) -> Any:
    if rounding == "activation":
        options.setdefault("second_moment", activations(a.shape[1]))
    return cola_kernels.nf4_merge_(weight, a, b, 0.25, rounding=rounding, **options)


ROUNDINGS = ["activation", "nearest", "stochastic"]


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_only_codes_change_and_bitsandbytes_reads_them(rounding, nested):
    weight = quantise(40, 192, nested=nested)
    a, b = factors(40, 192, 8)
    pointer, before, state = weight.data_ptr(), dequantised(weight).double(), state_bytes(weight)
    report = merge(weight, a, b, rounding, seed=3)
    assert weight.data_ptr() == pointer
    assert all(torch.equal(*pair) for pair in zip(state_bytes(weight), state, strict=True))
    after = dequantised(weight)
    assert torch.equal(after, nf4.dequantize(nf4.read(weight), torch.empty_like(after)))
    delta, change = 0.25 * (b.double() @ a.double()), after.double() - before
    assert report.retained == pytest.approx(float((change * delta).sum() / delta.square().sum()), rel=1e-4)
    assert report.error == pytest.approx(float((change - delta).norm() / delta.norm()), rel=1e-4)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_autocast_does_not_change_the_codes(rounding):
    plain, cast = quantise(40, 192), quantise(40, 192)
    a, b = factors(40, 192, 8)
    expected = merge(plain, a, b, rounding, seed=3)
    moment = activations(192)
    with torch.autocast(DEVICE, torch.bfloat16):
        report = merge(cast, a, b, rounding, seed=3, second_moment=moment)
    assert torch.equal(cast, plain)
    assert report == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nothing_to_add_changes_nothing(rounding):
    weight = quantise(40, 192)
    before = weight.data.clone()
    a, b = factors(40, 192, 2)
    assert merge(weight, a, b * 0, rounding) == (1.0, 0.0)
    assert torch.equal(weight.data, before)


def test_nearest_is_nearest():
    """Against fp64: no level is nearer than the one chosen, but for fp32's rounding of the target."""
    weight = quantise(48, 256)
    a, b = factors(48, 256, 8)
    before, scale = dequantised(weight).double(), scales_of(weight)
    merge(weight, a, b, "nearest")
    target = before + 0.25 * (b.double() @ a.double())
    grid = scale[:, :, None] * LEVELS.to(scale.device)
    distance = (target[:, :, None] - grid).abs().amin(-1)
    chosen = (target - dequantised(weight).double()).abs()
    assert bool((chosen <= distance + 1e-6 * target.abs()).all())


def test_stochastic_is_unbiased_and_clamps():
    """The mean of many folds is the target, inside the range of the levels: |z| < 5.5 for every element and overall.

    One element's choice is a coin of probability p: the mean of `runs` deviates by sqrt(p (1 - p) / runs) steps.
    """
    n, k, runs = 16, 128, 256
    weight = quantise(n, k)
    a, b = factors(n, k, 4, size=0.25)
    codes, before, scale = weight.data.clone(), dequantised(weight).double(), scales_of(weight)
    target = before + 0.25 * (b.double() @ a.double())
    inside = torch.where(scale == 0, before, (target / scale).clamp(-1, 1) * scale)
    total, seen = torch.zeros_like(before), set()
    low, high = torch.full_like(before, torch.inf), torch.full_like(before, -torch.inf)
    for seed in range(runs):
        weight.data.copy_(codes)
        merge(weight, a, b, "stochastic", seed=seed)
        after = dequantised(weight).double()
        total, low, high = total + after, low.minimum(after), high.maximum(after)
        seen.add(tuple(weight.data.flatten().tolist()))
    assert len(seen) == runs, "two seeds gave the same codes"
    level = (inside / torch.where(scale == 0, 1.0, scale)).clamp(-1, 1)
    above = torch.searchsorted(LEVELS.to(level.device), level.contiguous()).clamp(1, 15)
    below_value, above_value = (LEVELS.to(level.device)[above + d] * scale for d in (-1, 0))
    step = (above_value - below_value).abs()
    slack = 1e-5 * scale.abs()
    assert bool((low >= torch.minimum(below_value, above_value) - slack - step * 1e-3).all()), "left its neighbours"
    p = ((inside - below_value) / torch.where(step == 0, 1.0, step)).abs().clamp(0, 1)
    deviation = step * (p * (1 - p) / runs).sqrt() + step * 2**-15 + slack
    z = (total / runs - inside) / deviation.clamp_min(1e-12)
    coins = (p > 0.05) & (p < 0.95) & (step > 0)
    assert coins.float().mean() > 0.2
    assert float(z[coins].abs().max()) < 5.5
    assert abs(float(z[coins].mean())) < 5.5 / float(coins.sum()) ** 0.5
    outside = (target.abs() > scale.abs() * 1.01) & (scale != 0)
    assert bool(((low == high) & (low.abs() == scale.abs()))[outside].all())


def test_a_seed_repeats_itself_whatever_the_tile(monkeypatch):
    a, b = factors(40, 192, 3)
    results = []
    for elements in (1 << 17, 400):
        monkeypatch.setattr(nf4, "TILE_ELEMENTS", elements)
        weight = quantise(40, 192)
        merge(weight, a, b, "stochastic", seed=9)
        results.append(weight.data)
    assert torch.equal(*results)


def gptq(target: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The recursion written out in fp64: one column after the other, the whole rest updated each time."""
    k = target.shape[1]
    order = moment.diagonal().argsort(descending=True, stable=True)
    h = moment.double()[order][:, order]
    h = h + damping * h.diagonal().mean() * torch.eye(k, dtype=h.dtype)
    rest, steps = target[:, order].clone(), scale[:, order]
    out = torch.empty_like(rest)
    for i in range(k):
        inverse = torch.linalg.inv(h[i:, i:])
        grid = steps[:, i, None] * LEVELS
        out[:, i] = grid.gather(1, (rest[:, i, None] - grid).abs().argmin(1, keepdim=True))[:, 0]
        error = (rest[:, i] - out[:, i]) / inverse[0, 0]
        rest[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
    return out[:, order.argsort()]


def test_activation_follows_the_recursion():
    """K is more than one block. fp32 may decide a tie otherwise, and then that row goes its own way from there."""
    weight = quantise(32, 192, nested=False)
    a, b = factors(32, 192, 4)
    moment = activations(192)
    target = dequantised(weight).double() + 0.25 * (b.double() @ a.double())
    expected = gptq(target.cpu(), scales_of(weight).cpu(), moment.cpu(), 0.01)
    merge(weight, a, b, "activation", second_moment=moment)
    same_row = (dequantised(weight).double().cpu() - expected).abs().amax(1) < 1e-6
    assert float(same_row.double().mean()) > 0.9


def test_activation_keeps_more_than_nearest_of_what_the_layer_computes():
    """On inputs that were not calibrated on, an update along what varies most in them. Nearest loses most of it, and
    stochastic drowns it in noise."""
    a, b = factors(64, 256, 8)
    a, reports = a @ activations(256), {}
    for rounding in ROUNDINGS:
        weight = quantise(64, 256)
        step = 0.04 * dequantised(weight).norm() / (b @ a).norm()
        held_out = activations(256, seed=1)
        reports[rounding] = merge(weight, a * step, b, rounding, held_out=held_out, seed=1)
    assert reports["nearest"].retained < 0.2
    assert reports["activation"].retained > 0.6
    assert reports["activation"].error < 0.9 * reports["nearest"].error
    assert reports["activation"].error < 0.6 * reports["stochastic"].error


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_is_reported_in_the_metric_of_held_out_inputs(rounding):
    weight, same = quantise(40, 192), quantise(40, 192)
    a, b = factors(40, 192, 8)
    before, held_out = dequantised(weight).double(), activations(192, seed=1)
    report = merge(weight, a, b, rounding, held_out=held_out, seed=5)
    change, delta = dequantised(weight).double() - before, 0.25 * (b.double() @ a.double())

    def inner(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((left @ held_out.double() * right).sum())

    assert report.retained == pytest.approx(inner(change, delta) / inner(delta, delta), rel=1e-3)
    expected = (inner(change - delta, change - delta) / inner(delta, delta)) ** 0.5
    assert report.error == pytest.approx(expected, rel=1e-3)
    merge(same, a, b, rounding, seed=5)
    assert torch.equal(weight.data, same.data), "the report changed the fold"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_needs_little_memory(rounding):
    """nearest and stochastic: tiles. activation: a copy of this weight in fp32, its codes, and K x K in fp64."""
    n, k = 4096, 1024 if rounding == "activation" else 4096
    weight = quantise(n, k)
    a, b = factors(n, k, 8)
    moment = activations(k, tokens=2048) if rounding == "activation" else None
    peak = peak_memory(lambda: merge(weight, a, b, rounding, second_moment=moment))
    allowed = 0.05 * 2 * n * k  # of the weight in 16 bits
    if rounding == "activation":
        allowed += n * k * (4 + 1 + 1 + 1) + n * k // 16 + 4 * 8 * k * k
    assert 0 < peak < allowed, f"{peak / (2 * n * k):.1%} of the weight in 16 bits"


@pytest.mark.parametrize("rounding", ["stochastic", "activation"])
def test_the_carry_is_the_best_fit_of_what_is_left(rounding):
    """What remains after it has the norm that the truncated SVD leaves, which nothing of that rank can undercut."""
    weight, same = quantise(48, 128), quantise(48, 128)
    a, b = factors(48, 128, 4)
    moment = activations(128)
    before = dequantised(weight).double()
    options = {"rounding": rounding, "second_moment": moment, "seed": 3}
    report, next_a, next_b = cola_kernels.nf4_merge_with_carry_(weight, a, b, 0.25, rank=5, **options)
    assert cola_kernels.nf4_merge_(same, a, b, 0.25, **options) == report
    assert torch.equal(weight.data, same.data)
    assert (next_a.shape, next_b.shape) == ((5, 128), (48, 5))
    residual = before + 0.25 * (b.double() @ a.double()) - dequantised(weight).double()
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(128, device=DEVICE)
    root = torch.linalg.cholesky(damped)
    left = torch.linalg.matrix_norm((residual - 0.25 * next_b.double() @ next_a.double()) @ root)
    least = torch.linalg.svdvals(residual @ root)[5:].norm()
    assert float(left) == pytest.approx(float(least), rel=1e-2)
    assert float(left) < 0.9 * float(torch.linalg.matrix_norm(residual @ root))


def test_a_carry_of_more_rank_than_the_weight_has_is_padded():
    weight = quantise(3, 64)
    a, b = factors(3, 64, 2)
    _, next_a, next_b = cola_kernels.nf4_merge_with_carry_(
        weight, a, b, 1.0, second_moment=torch.eye(64, device=DEVICE), rank=8
    )
    assert (next_a.shape, next_b.shape) == ((8, 64), (3, 8))
    assert not next_b[:, 3:].any()


def bad_moment(value: float) -> torch.Tensor:
    moment = torch.eye(128, device=DEVICE)
    moment[3, 5] = value
    return moment


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"rounding": "activation"}, "second_moment is None"),
        ({"rounding": "activation", "second_moment": torch.eye(64, device=DEVICE)}, r"expected \[128, 128\]"),
        ({"rounding": "activation", "second_moment": bad_moment(float("nan"))}, "second_moment is not finite"),
        ({"rounding": "activation", "second_moment": -torch.eye(128, device=DEVICE)}, "not positive definite"),
        ({"rounding": "activation", "second_moment": torch.zeros(128, 128, device=DEVICE)}, "not positive definite"),
        (
            {"rounding": "activation", "second_moment": torch.eye(128, device=DEVICE), "tokens": 10},
            "10 tokens.* takes at least 254",
        ),
        ({"rounding": "nearest", "held_out": bad_moment(float("inf"))}, "held_out is not finite"),
        ({"rounding": "nearest", "lora_a": torch.zeros(2, 64, device=DEVICE)}, "do not fit"),
        ({"rounding": "nearest", "lora_b": torch.full((8, 2), float("nan"), device=DEVICE)}, "lora_b is not finite"),
        ({"rounding": "nearest", "weight": torch.zeros(8, 128, device=DEVICE)}, "without a quant_state"),
        ({"rounding": "nearest", "weight": "fp4"}, "fp4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_and_leaves_the_weight_as_it_was(options, message):
    weight = quantise(8, 128)
    before = weight.data.clone()
    arguments: dict[str, Any] = {
        "weight": weight,
        "lora_a": torch.zeros(2, 128, device=DEVICE),
        "lora_b": torch.zeros(8, 2, device=DEVICE),
    } | options
    if arguments["weight"] == "fp4":
        arguments["weight"] = quantise(8, 128, quant_type="fp4")
    with pytest.raises(ValueError, match=message):
        cola_kernels.nf4_merge_(scale=1.0, **arguments)
    assert torch.equal(weight.data, before)


def test_a_carry_refuses_what_leaves_nothing_to_start_from():
    weight = quantise(8, 128)
    before, factors_ = weight.data.clone(), factors(8, 128, 2)
    for scale, rank, moment, message in (
        (1.0, 0, torch.eye(128, device=DEVICE), "rank of at least 1"),
        (0.0, 2, torch.eye(128, device=DEVICE), "scale not 0"),
        (1.0, 2, bad_moment(float("nan")), "not finite"),
        (1.0, 2, None, "second_moment is None"),
    ):
        with pytest.raises(ValueError, match=message):
            cola_kernels.nf4_merge_with_carry_(weight, *factors_, scale, second_moment=moment, rank=rank)
    assert torch.equal(weight.data, before)


def test_more_damping_needs_fewer_tokens():
    weight, moment = quantise(8, 128), activations(128)
    a, b = factors(8, 128, 2)
    with pytest.raises(ValueError, match="more tokens or more damping"):
        merge(weight, a, b, "activation", second_moment=moment, tokens=100, damping=1e-4)
    merge(weight, a, b, "activation", second_moment=moment, tokens=100, damping=1.0)


# One row; rows and a block of columns cut off; blocks larger than a tile; scales of one level.
ON_TRITON = [(1, 64, 64, True), (37, 192, 64, True), (40, 320, 32, False), (3, 512, 256, True)]


@pytest.mark.parametrize(("shape", "rounding"), [*itertools.product(ON_TRITON, ["nearest", "stochastic"])], ids=str)
@pytest.mark.usefixtures("on_triton", "poisoned")
def test_triton_writes_the_codes_of_the_reference(shape, rounding):
    n, k, blocksize, nested = shape
    expected, got = (quantise(n, k, blocksize=blocksize, nested=nested) for _ in range(2))
    a, b = factors(n, k, 24)
    first, _ = nf4_fold.fold(nf4_fold.REFERENCE, expected, a, b, 0.25, rounding=rounding, seed=-7)
    second = cola_kernels.nf4_merge_(got, a.t().contiguous().t(), b, 0.25, rounding=rounding, seed=-7)
    assert torch.equal(got.data, expected.data)
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 64), (33, 192)], ids=str)
@pytest.mark.usefixtures("on_triton")
def test_triton_rounds_a_block_of_columns_as_the_reference(shape):
    """Where fp32 decides every tie alike, which is nearly everywhere."""
    n, k = shape
    a, b = factors(n, k, 4)
    expected, got = quantise(n, k), quantise(n, k)
    options = {"rounding": "activation", "second_moment": activations(k)}
    nf4_fold.fold(nf4_fold.REFERENCE, expected, a, b, 0.25, **options)
    cola_kernels.nf4_merge_(got, a, b, 0.25, **options)
    rows = (got.data != expected.data).view(n, -1).any(1)
    assert float(rows.double().mean()) <= 0.05

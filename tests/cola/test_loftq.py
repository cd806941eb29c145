"""LoftQ: the first link of a 4-bit model makes up for what quantising lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach
from cola_fast.config import ModelConfig
from cola_fast.layers.layer import LoRALinear
from cola_fast.training.models import load_model

from ..conftest import disturb, tiny_llama
from .test_chain import logits, relative

pytest.importorskip("bitsandbytes")
R = 6


@pytest.fixture
def load(wide_folder: Path) -> Callable[..., nn.Module]:
    def load(*, in_4bit: bool) -> nn.Module:
        return load_model(ModelConfig(name=str(wide_folder), dtype="fp32", device="cpu", load_in_4bit=in_4bit))

    return load


@pytest.mark.parametrize("base", ["ledger", "nf4"])
def test_the_first_link_is_the_best_correction_of_its_rank(load: Callable[..., nn.Module], base: str) -> None:
    model, original = load(in_4bit=True), load(in_4bit=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chain = attach(model, r=R, targets="all-linear", init="loftq", base=base, original=original)
    for name, f in chain.live_factors().items():
        layer, weight = chain.layers[name], original.get_submodule(name).weight.detach()
        lost = weight - layer.dense_weight()
        left = lost - f.scale * f.b @ f.a
        torch.testing.assert_close(
            torch.linalg.svdvals(left)[:-R], torch.linalg.svdvals(lost)[R:], atol=1e-5, rtol=1e-3
        )
        assert torch.equal(layer.weight, before[f"{name}.weight"])  # the codes are the checkpoint's
    disturb(chain)
    chain.tie()
    chain.extend()  # without the original: what follows has nothing to correct
    assert not any(f.b.any() for f in chain.live_factors().values())


def test_peft_starts_at_the_same_correction() -> None:
    """Its own quantiser makes the base here, without double quantisation."""
    import bitsandbytes as bnb
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight = torch.randn(128, 64)
    net = nn.Sequential(bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32))
    net[0].weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    original = nn.Sequential(nn.Linear(64, 128, bias=False))
    original[0].weight.data = weight
    chain = attach(net, r=R, alpha=12, targets=["0"], init="loftq", original=original)
    parts: dict[str, Any] = _low_rank_decomposition(weight - chain.layers["0"].dense_weight(), reduced_rank=R)
    (f,) = chain.live_factors().values()
    torch.testing.assert_close(f.scale * f.b @ f.a, parts["L"] @ parts["R"], rtol=1e-3, atol=1e-5)


def test_the_function_moves_towards_the_original(load: Callable[..., nn.Module], ids: Tensor) -> None:
    model, original = load(in_4bit=True), load(in_4bit=False)
    goal, base = logits(original, ids), logits(model, ids)
    chain = attach(model, r=32, alpha=16, targets="all-linear", init="loftq", original=original)
    assert relative(logits(model, ids), goal) < 0.7 * relative(base, goal)
    with pytest.raises(UserError, match="changes the model, which would be lost"):
        chain.detach()
    assert relative(logits(chain.detach(discard=True), ids), base) < 1e-6


def test_what_corrects_the_codes_does_not_go_onto_the_original(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    original = load(in_4bit=False)
    chain = attach(load(in_4bit=True), init="loftq", original=original)
    with pytest.raises(UserError, match="a correction of the 4-bit weights"):
        chain.export_merged(tmp_path / "merged", onto=original)


@pytest.mark.parametrize(
    ("original", "keys", "sentence"),
    [
        (None, {}, "needs the weights before they were quantised"),
        (lambda: tiny_llama(), {}, r"q_proj is \(32, 32\) in the original model, but \(64, 64\)"),
        (lambda: nn.Linear(2, 2), {}, r"q_proj is missing in the original model"),
        (lambda: tiny_llama(7, hidden_size=64, intermediate_size=128), {}, r"away from the original given for it"),
        (lambda: tiny_llama(hidden_size=64, intermediate_size=128), {"frozen": "a"}, "needs that factor trained"),
    ],
    ids=["none", "shape", "missing", "other", "frozen"],
)
def test_attach_refuses_and_leaves_the_model(
    load: Callable[..., nn.Module], original: Callable[[], nn.Module] | None, keys: dict[str, Any], sentence: str
) -> None:
    model = load(in_4bit=True)
    with pytest.raises(UserError, match=sentence):
        attach(model, init="loftq", original=None if original is None else original(), **keys)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_dense_weights_have_nothing_to_correct(model: nn.Module) -> None:
    with pytest.raises(UserError, match="no targeted weight is quantised"):
        attach(model, init="loftq", original=tiny_llama())

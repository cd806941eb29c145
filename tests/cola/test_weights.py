"""What a weight is, in one place: of every kind the identity of its base, and what its kind says of it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import attach
from cola_fast.chain.chain import Chain
from cola_fast.layers import weights
from cola_fast.layers.weights.dense import Dense
from cola_fast.layers.weights.nf4 import NF4
from cola_fast.layers.weights.sharded import Sharded

from ..conftest import disturb, tiny_llama

# Fingerprint of the base; sha256 of the link's weights; of the model's state dict with the link tied into each base.
DENSE = (
    "4d54cb04852974dc11a8e07d588a7f7fa261d21cc7308d01385b20bd06ea4053",
    "c021145e60e0bddf35df151afc10eb70d4fe4d0045a6452cb2a7575a46a3f108",
    {
        "dense": "d72b637dec260def2ccdf8d7afa88b07e8c68d65d6ea8e32c06d9400e8eeca53",
        "ledger": "428fc2393bb5f72c1340d96e18622eec7904102338f0e719bcf65c19848447f5",
    },
)
FOUR_BIT = (
    "2eade5c5136ab5c10e6c97d32c7b32d17e1a7bd05aea57f9f091b47a5b8b0451",
    "8ea720a0a285b00efe2c31a403a8a1b975356820334b9702bd91fbbe67e96772",
    {
        "nf4": "2d2c8625f964d876ee1833db1e5319ce8dc580b623fa29869529a4b867d7d001",
        "ledger": "9624007dbc769cb81df6bd4d8e24da8dfa3db4fc1d87e3c6cd25519510b4db27",
    },
)


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def tied(model: nn.Module, base: str) -> Chain:
    chain = attach(model, r=2, base=base)
    disturb(chain)
    chain.tie()
    return chain


@pytest.mark.parametrize(
    ("kind", "base"), [("dense", "dense"), ("dense", "ledger"), ("nf4", "nf4"), ("nf4", "ledger")], ids=str
)
def test_chains_of_earlier_versions_are_the_same_to_the_bit(
    kind: str, base: str, load_nf4: Callable[..., nn.Module]
) -> None:
    """A chain that is on somebody's disk finds its base again, and what it folds into it."""
    fingerprint, link, states = DENSE if kind == "dense" else FOUR_BIT
    chain = tied(tiny_llama() if kind == "dense" else load_nf4(), base)
    assert chain.identity["fingerprint"] == fingerprint
    assert chain.links[0].sha256 == link
    assert digest(chain.model) == states[base]


def test_each_parameter_is_of_one_kind(load_nf4: Callable[..., nn.Module]) -> None:
    model = load_nf4()
    found = dict(weights.in_model(model))
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, weight in found.items():
        linear = "proj.weight" in name
        assert type(weight) is (NF4 if linear else Dense), name
        assert weight.quantised == linear
    weight = found["model.layers.0.mlp.up_proj.weight"]
    assert (weight.shape, weight.count, weight.dtype) == ((128, 64), 128 * 64, torch.float32)
    assert weight.dense(torch.bfloat16).dtype == torch.bfloat16


def test_only_the_kinds_know_how_a_weight_is_stored() -> None:
    """A new kind is then one file. The PEFT drop-in has PEFT's layers, one a kind, and is not meant."""
    marks = re.compile(r"(?<!_)quant_state\b|has\w*\(\w+, .device_mesh|\bSCB\b|nf4_dequantize|Params4bit|Linear8bitLt")
    package = Path(weights.__file__).parents[2]
    others = [path for path in package.rglob("*.py") if path.parent.name != "weights"]
    assert [path.name for path in others if marks.search(path.read_text())] == []


def test_a_kind_is_recognised_without_its_library() -> None:
    code = (
        "import sys; from cola_fast.layers import weights; assert not {'bitsandbytes', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_weight_on_two_names_is_met_once() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert [name for name, _ in weights.in_model(model)] == [name for name, _ in model.named_parameters()]


def test_reading_a_dense_weight_copies_nothing() -> None:
    linear = nn.Linear(4, 3)
    assert weights.of(linear).dense().data_ptr() == linear.weight.data_ptr()
    assert not weights.of(linear).dense().requires_grad


class Spread(Tensor):
    """Known as DTensors are."""

    device_mesh: Any = None


def test_a_sharded_weight_is_known_as_one_while_it_is_sharded() -> None:
    """FSDP exchanges a parameter for what it has gathered, and back."""
    linear = nn.Linear(4, 3)
    kinds = [type(weights.of(linear))]
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Spread), requires_grad=False)
    kinds.append(type(weights.of(linear)))
    assert kinds == [Dense, Sharded]
    assert not weights.of(linear).in_one_piece
    assert weights.of(linear).untrainable() == "spread over several processes"


@pytest.mark.parametrize("kind", weights.quantised_kinds(), ids=lambda kind: kind.title)
def test_every_quantised_kind_can_live_with_a_ledger_and_says_what_it_is(kind: type[weights.Weight]) -> None:
    assert "ledger" in kind.bases
    assert kind.bytes_each > 0
    assert all((kind.title, kind.size, kind.linear))

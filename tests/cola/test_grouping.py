"""Layers that read the same x as one op: found on unmodified models, equal to each alone, safe to resume."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cola_fast import attach, load_chain

from ..conftest import disturb, tiny_llama
from .three import Three, chain_parameters, error, gradients, separate, zero_grad

pytestmark = pytest.mark.usefixtures("way")


# --- real models ------------------------------------------------------------------------------------------------------


def llama() -> tuple[nn.Module, Any]:
    return tiny_llama(), "all-linear"


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2, **sizes
        )
    )
    return model, ["query", "key", "value"]


def t5() -> tuple[nn.Module, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    settings = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    model: nn.Module = T5ForConditionalGeneration(settings)
    return model, ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]


ARCHITECTURES = {
    "llama": (llama, [3, 1, 2, 1] * 2),
    "bert": (bert, [3] * 2),
    # the encoder's block; the decoder's, whose cross attention takes q from the decoder, k and v from the encoder
    "t5": (t5, [3, 1, 2, 1, 3, 1, 1, 2, 1, 2, 1]),
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("name", "ledger"), [*((name, 0) for name in ARCHITECTURES), ("llama", 2)], ids=[*ARCHITECTURES, "llama-ledger"]
)
@pytest.mark.usefixtures("one_seed")
def test_a_model_computes_what_its_layers_compute_alone(
    name: str, ledger: int, dropout: float, ids: Tensor, launches: list[int]
) -> None:
    make, grouped_launches = ARCHITECTURES[name]
    model, targets = make()
    chain = attach(model, targets=targets, dropout=dropout, base="ledger")
    for link in range(ledger):
        disturb(chain, seed=2 + link)
        chain.tie()
        chain.extend()
    disturb(chain)
    models = {
        "grouped": model.train(),
        "alone": separate(copy.deepcopy(model)),
        "exact": separate(copy.deepcopy(model).double()),
    }
    for step in range(3):
        outputs = {}
        for kind, each in models.items():
            zero_grad(each.train())
            launches.clear()
            result = each(input_ids=ids, labels=ids)
            result.loss.backward()
            expected = grouped_launches if kind == "grouped" and step else [1] * len(chain.layers)
            assert launches == expected, kind
            trained = {name: grad for name, grad in gradients(each).items() if grad is not None}
            outputs[kind] = {"logits": result.logits.detach(), **trained}
        for key, exact in outputs["exact"].items():
            allowed = 2 * error(outputs["alone"][key], exact) + 1e-6
            assert error(outputs["grouped"][key], exact) <= allowed, (step, key)


def test_a_run_with_an_optimizer_groups_from_its_second_step(ids: Tensor, launches: list[int]) -> None:
    """Whatever the optimizer: a fused one does not tell autograd that it has written."""
    for fused in (False, True):
        model = tiny_llama().train()
        chain = attach(model, targets="all-linear", dropout=0.1)
        optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-2, fused=fused)
        for step in range(3):
            launches.clear()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert max(launches) == (3 if step else 1)


def test_members_share_a_mask_and_layers_alone_do_not() -> None:
    """With W = 0 and A the identity, an output is the mask."""

    def masks(net: Three) -> list[Tensor]:
        return [y != 0 for y in net(torch.ones(50, 8, dtype=torch.float64))]

    net = Three(8, dropout=0.5)
    with torch.no_grad():
        for layer in net.layers():
            layer.weight.zero_(), layer.bias.zero_()
            layer.lora_A.copy_(torch.eye(8))
            layer.lora_B.copy_(torch.eye(8))
    alone = masks(net)
    together = masks(net)
    assert not torch.equal(alone[0], alone[1])
    assert torch.equal(together[0], together[1])
    assert torch.equal(together[0], together[2])
    assert 0.35 < together[0].double().mean() < 0.65
    assert not torch.equal(masks(net)[0], together[0])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_with_a_cache(name: str, ids: Tensor, launches: list[int]) -> None:
    model, targets = ARCHITECTURES[name][0]()
    chain = attach(model, targets=targets)
    disturb(chain)
    for _ in range(2):
        model(input_ids=ids, labels=ids)
    model.eval()
    alone = separate(copy.deepcopy(model))
    launches.clear()
    got = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert max(launches) == 3
    launches.clear()
    assert torch.equal(got, alone.generate(ids, max_new_tokens=8, do_sample=False))
    assert max(launches) == 1


# --- activation checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["usual", "reentrant"])
@pytest.mark.parametrize("forwards", [1, 2])
def test_recomputation_gives_the_same_gradients(
    reentrant: bool, forwards: int, ids: Tensor, launches: list[int]
) -> None:
    """From the first step on, while groups form; also when several forwards wait for their backward passes."""
    plain = tiny_llama().train()
    disturb(attach(plain, targets="all-linear", dropout=0.3))
    recomputed = copy.deepcopy(plain)
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    if reentrant:
        separate(plain)  # as the other one will be
    for step in range(3):
        for model in (plain, recomputed):
            zero_grad(model)
            torch.manual_seed(step)
            launches.clear()
            losses = [model(ids.roll(i, 1), labels=ids).loss for i in range(forwards)]
            for loss in losses:
                loss.backward()
        for one, other in zip(chain_parameters(plain), chain_parameters(recomputed), strict=True):
            assert torch.equal(one.grad, other.grad), step
        model.eval()
        with torch.no_grad():
            model(ids)  # nor does a look in between change anything
        model.train()
    assert max(launches) == (1 if reentrant else 3)


def test_a_group_forms_only_when_no_forward_waits(launches: list[int]) -> None:
    net = Three()
    x = torch.randn(4, 6, dtype=torch.float64)
    first = sum(y.sum() for y in checkpoint(net, x, use_reentrant=False))
    second = sum(y.sum() for y in net(x))
    assert launches == [1] * 6
    second.backward()
    net(x)
    assert launches == [1] * 9
    first.backward()
    net(x)
    assert launches == [1] * 12 + [3]


def test_a_held_group_stays_as_it_is(launches: list[int]) -> None:
    """What the passes of one step do must not depend on how many of them this process makes."""
    net, x = Three(), torch.ones(1, 6, dtype=torch.float64)
    net(x)
    net.q.grouping.held = True
    net(x)
    assert launches == [1] * 6
    net.q.grouping.held = False
    net(x)
    assert launches == [1] * 6 + [3]


def test_a_group_dissolves_only_when_no_forward_waits(launches: list[int]) -> None:
    net = Three().learn()
    x = torch.randn(4, 6, dtype=torch.float64)

    def part(x: Tensor) -> Tensor:
        return net.q(x) + net.k(x)

    launches.clear()
    losses = [checkpoint(part, x, use_reentrant=False).sum() for _ in range(2)]
    assert launches == [3, 3]
    for loss in losses:
        loss.backward()
    assert launches == [3, 3, 3, 3]
    part(x)
    assert launches[4:] == [1, 1]


def test_members_checkpointed_one_by_one_never_group(launches: list[int]) -> None:
    net = Three()
    x = torch.randn(4, 6, dtype=torch.float64)
    for _ in range(3):
        sum(checkpoint(layer, x, use_reentrant=False).sum() for layer in net.layers()).backward()
    assert launches == [1] * 18


def test_a_recomputation_that_ends_early_wastes_nothing(launches: list[int]) -> None:
    """It stops at the last tensor it needs: here the sine's, before k and v are called."""
    net = Three().learn()
    x = torch.randn(4, 6, dtype=torch.float64)
    launches.clear()
    for _ in range(3):
        ys = checkpoint(lambda x: (net.q(x).sin(), net.k(x), net.v(x)), x, use_reentrant=False)
        sum(y.sum() for y in ys).backward()
        del ys
    assert launches == [3] * 6


def test_a_group_that_wastes_an_output_dissolves(launches: list[int]) -> None:
    for grad in (True, False):
        net = Three(dropout=0.0).learn()
        launches.clear()
        with torch.set_grad_enabled(grad):
            x = torch.randn(4, 6, dtype=torch.float64)
            for _ in range(3):
                net.q(x), net.k(x)
        assert launches == [3, 1, 1, 1, 1]


def test_layers_that_differ_for_a_while_are_grouped_again(launches: list[int]) -> None:
    net = Three().learn()
    x = torch.randn(4, 6, dtype=torch.float64)
    launches.clear()
    net.k.eval()
    net(x)
    net.k.train()
    net(x)
    assert launches == [1, 1, 1, 3]


# --- copies and files -------------------------------------------------------------------------------------------------


def test_copies_learn_for_themselves(launches: list[int]) -> None:
    net = Three().learn()
    x = torch.randn(4, 6, dtype=torch.float64)
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert clone.q.grouping is clone.v.grouping is not net.q.grouping
        for size in ([1, 1, 1], [3]):
            launches.clear()
            clone(x)
            assert launches == size
    launches.clear()
    assert copy.deepcopy(net.k)(x).shape == (4, 6)
    assert launches == [1]


def test_the_state_dict_knows_nothing_of_groups(ids: Tensor) -> None:
    model = tiny_llama()
    attach(model, targets="all-linear")
    before = list(model.state_dict())
    model(ids).logits.sum().backward()
    model(ids)
    assert list(model.state_dict()) == before


def test_a_resumed_chain_goes_on_bit_for_bit(ids: Tensor, tmp_path: Path, launches: list[int]) -> None:
    def steps(model: nn.Module, chain: Any, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            model(ids, labels=ids).loss.backward()
            with torch.no_grad():
                for parameter in chain.parameters():
                    parameter -= 0.1 * parameter.grad
            zero_grad(model)

    model = tiny_llama().train()
    chain = attach(model, targets="all-linear", dropout=0.2)
    steps(model, chain, 0, 2)
    chain.save(tmp_path / "run")
    steps(model, chain, 2, 4)
    again = tiny_llama().train()
    resumed = load_chain(again, tmp_path / "run")
    launches.clear()
    steps(again, resumed, 2, 4)
    assert launches == [3, 1, 2, 1] * 4
    for one, other in zip(chain.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_each_link_learns_anew(ids: Tensor, launches: list[int]) -> None:
    """A run that was killed between two links could not know what the last one had learned."""
    model = tiny_llama()
    chain = attach(model, targets="all-linear")
    for _ in range(2):
        for largest in (1, 3):
            launches.clear()
            model(ids, labels=ids)
            assert max(launches) == largest
        chain.tie()
        chain.extend()


def test_a_dissolved_group_stays_dissolved_when_resumed(tmp_path: Path, launches: list[int]) -> None:
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in "qkv"})
    chain = attach(model, targets=["q", "k", "v"], r=2)
    x = torch.randn(4, 6)
    for names in ("qkv", "qk", "q"):
        [model[name](x) for name in names]
    chain.save(tmp_path / "run")
    again = nn.ModuleDict({name: nn.Linear(6, 6) for name in "qkv"})
    again.load_state_dict(
        {key.replace("base.", ""): value for key, value in model.state_dict().items() if "lora" not in key}
    )
    load_chain(again, tmp_path / "run")
    launches.clear()
    for _ in range(3):
        [again[name](x) for name in "qkv"]
    assert launches == [1] * 9

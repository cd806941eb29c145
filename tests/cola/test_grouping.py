"""Layers that read the same x as one op: found on unmodified models, equal to each alone, given up when calls differ.

"Alone" is the same model with a `Grouping` for each layer, which never groups.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cola_kernels.autograd
from cola_fast import attach, grouping, load_chain
from cola_fast.grouping import Grouping
from cola_fast.layer import LoRALinear

from ..conftest import disturb, tiny_llama


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members of each op that is run, in order."""
    sizes: list[int] = []
    alone, together = grouping.lora_linear, grouping.lora_linear_group
    monkeypatch.setattr(grouping, "lora_linear", lambda *a, **k: sizes.append(1) or alone(*a, **k))
    monkeypatch.setattr(
        grouping, "lora_linear_group", lambda x, w, *a, **k: sizes.append(len(w)) or together(x, w, *a, **k)
    )
    return sizes


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer, alone or not, draws the same mask from the same shape: so that both can be compared."""
    monkeypatch.setattr(cola_kernels.autograd, "as_seed", lambda seed, device: torch.tensor(7, device=device))


def separate(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.grouping = Grouping()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def chain_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def zero_grad(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


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
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("one_seed")
def test_a_model_computes_what_its_layers_compute_alone(
    name: str, dropout: float, ids: Tensor, launches: list[int]
) -> None:
    make, grouped_launches = ARCHITECTURES[name]
    model, targets = make()
    chain = attach(model, targets=targets, dropout=dropout)
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


@pytest.mark.parametrize("together", [False, True], ids=["apart", "inside and outside"])
@pytest.mark.usefixtures("one_seed")
def test_members_of_different_checkpointed_regions(together: bool) -> None:
    def forward(net: Three, x: Tensor) -> list[Tensor]:
        q = net.q(x) if together else checkpoint(net.q, x, use_reentrant=False)
        k, v = checkpoint(lambda x: (net.k(x).sin(), net.v(x).sin()), x, use_reentrant=False)
        return [q, k, v]

    compare(forward)


# --- every other way to call them -------------------------------------------------------------------------------------


class Three(nn.Module):
    """q, k and v of the same x, in fp64."""

    def __init__(self, width: int = 6, dropout: float = 0.25) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = Grouping()
        for name in "qkv":
            setattr(self, name, LoRALinear.from_linear(nn.Linear(width, width, dtype=torch.float64), name, shared))
        for layer in self.layers():
            layer.requires_grad_(False)
            factors = torch.randn(2, width, width, dtype=torch.float64)
            layer.open(*factors, scale=0.5, dropout=dropout)

    def layers(self) -> list[LoRALinear]:
        return [self.q, self.k, self.v]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q(x), self.k(x), self.v(x)]

    def learn(self) -> Three:
        """After this the three run together."""
        for _ in range(2):
            self(torch.ones(1, self.q.in_features, dtype=torch.float64))
        return self

    def alone(self) -> Three:
        return separate(copy.deepcopy(self))


def compare(forward: Callable[[Three, Tensor], list[Tensor]], *, backward: bool = True, allowed: float = 1e-12) -> None:
    """`forward` on a net which has learned its group, and on one which has none: the same outputs and gradients."""
    grouped = Three().learn()
    alone = grouped.alone()
    for _ in range(3):
        results = []
        for net in (grouped, alone):
            zero_grad(net)
            x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
            leaf = x.clone().requires_grad_(backward)
            ys = forward(net, leaf * 1)
            if backward:
                sum((i + 1) * y.double().square().sum() for i, y in enumerate(ys)).backward()
            results.append([*(y.detach() for y in ys), leaf.grad, *gradients(net).values()])
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                assert error(one, other) < allowed


def another_tensor(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.k(x * 2), net.v(x)]


def an_equal_tensor(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.k(x.view_as(x)), net.v(x)]


def another_order(net: Three, x: Tensor) -> list[Tensor]:
    return [net.v(x), net.q(x), net.k(x)]


def members_swapped(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.v(x), net.k(x)]


def a_member_twice(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.k(x), net.k(x).sin(), net.v(x)]


def the_leader_twice(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.q(x).sin(), net.k(x), net.v(x)]


def a_member_never(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.k(x)]


def an_unused_output(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.k(x), net.v(x)][:2]


def an_unused_leader(net: Three, x: Tensor) -> list[Tensor]:
    return [net.q(x), net.k(x), net.v(x)][1:]


def outputs_changed_in_place(net: Three, x: Tensor) -> list[Tensor]:
    return [y.mul_(i + 2) for i, y in enumerate(net(x))]


def a_gradient_wanted_in_between(net: Three, x: Tensor) -> list[Tensor]:
    x = x.detach()
    q = net.q(x)
    x.requires_grad_()
    k, v = net.k(x), net.v(x)
    return [q, k, v, *torch.autograd.grad(k.sum(), x, retain_graph=True)]


def no_grad_for_the_leader(net: Three, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        q = net.q(x)
    return [q, net.k(x), net.v(x)]


def no_grad_for_a_member(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    with torch.no_grad():
        k = net.k(x)
    return [q, k, net.v(x)]


def inference_mode_for_a_member(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    with torch.inference_mode():
        k = net.k(x).clone()
    return [q, k.clone(), net.v(x)]


def no_dropout_in_a_member(net: Three, x: Tensor) -> list[Tensor]:
    net.k.eval()
    return net(x)


def a_mode_changed_in_between(net: Three, x: Tensor) -> list[Tensor]:
    net.train()
    q = net.q(x)
    net.eval()
    return [q, net.k(x), net.v(x)]


def a_member_closed(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    net.k.close()
    return [q, net.k(x), net.v(x)]


def a_member_reopened(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    a, b = net.k.lora_A.detach() * 2, net.k.lora_B.detach()
    net.k.open(a, b, scale=0.5, dropout=0.0)
    return [q, net.k(x), net.v(x)]


def a_member_frozen(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    net.k.lora_A.requires_grad_(False)
    return [q, net.k(x), net.v(x)]


def a_member_unfrozen(net: Three, x: Tensor) -> list[Tensor]:
    net.k.lora_A.requires_grad_(False)
    q = net.q(x)
    net.k.lora_A.requires_grad_(True)
    return [q, net.k(x), net.v(x)]


def factors_of_different_dtypes(net: Three, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        net.k.lora_A = nn.Parameter(net.k.lora_A.float())
    return net(x)


def a_scale_changed(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    net.k.scale = 0.25
    return [q, net.k(x), net.v(x)]


def an_exception_in_between(net: Three, x: Tensor) -> list[Tensor]:
    with pytest.raises(ValueError, match="needs x"):
        net.k(net.q(x)[:, :3])
    return net(x)


def a_copy_in_between(net: Three, x: Tensor) -> list[Tensor]:
    q = net.q(x)
    other = copy.deepcopy(net)
    return [q, net.k(x) + other.k(x), net.v(x)]


def checkpointed(net: Three, x: Tensor) -> list[Tensor]:
    return list(checkpoint(net, x, use_reentrant=False))


def checkpointed_one_by_one(net: Three, x: Tensor) -> list[Tensor]:
    return [checkpoint(layer, x, use_reentrant=False) for layer in net.layers()]


def x_from_two_branches(net: Three, x: Tensor) -> list[Tensor]:
    return [*net(x.sin()), *net(x.cos())]


CALLS = [
    value for name, value in list(globals().items()) if getattr(value, "__annotations__", {}).get("net") == "Three"
]


@pytest.mark.parametrize("forward", CALLS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("one_seed")
def test_any_way_of_calling_is_as_without_groups(forward: Callable[[Three, Tensor], list[Tensor]]) -> None:
    compare(forward)


@pytest.mark.parametrize("changed", ["x", "lora_B", "weight", "bias"])
@pytest.mark.usefixtures("one_seed")
def test_in_place_changes_between_the_calls_are_seen(changed: str) -> None:
    def forward(net: Three, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            q = net.q(x)
            (x if changed == "x" else getattr(net.k, changed)).mul_(1.5)
            return [q, net.k(x), net.v(x)]

    compare(forward, backward=False)


@pytest.mark.usefixtures("one_seed")
def test_autocast_in_between() -> None:
    def forward(net: Three, x: Tensor) -> list[Tensor]:
        net, x = net.float(), x.float()
        q = net.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            return [q, net.k(x), net.v(x)]

    compare(forward, allowed=1e-6)


@pytest.mark.usefixtures("one_seed")
def test_in_place_changes_in_inference_mode() -> None:
    """Its tensors have no version that would tell."""

    def forward(net: Three, x: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            x = x * 1
            return [net.q(x).clone(), net.k(x.mul_(1.5)).clone(), net.v(x).clone()]

    compare(forward, backward=False)


@pytest.mark.usefixtures("one_seed")
def test_hooks_on_a_member() -> None:
    seen: list[tuple[str, Tensor]] = []

    def forward(net: Three, x: Tensor) -> list[Tensor]:
        seen.clear()
        if not net.k._forward_hooks:
            net.k.register_forward_hook(lambda m, inputs, y: seen.append(("y", y)) or y * 2)
            net.v.register_full_backward_hook(lambda m, dx, dy: seen.append(("dx", dx[0])))
        return net(x)

    compare(forward)
    assert [name for name, _ in seen] == ["y", "dx"]


@pytest.mark.usefixtures("one_seed")
def test_a_hook_that_brings_the_weight(launches: list[int]) -> None:
    """As offloading and sharding do it: outside of its own call, a layer's weight is not what it should be."""

    def forward(net: Three, x: Tensor) -> list[Tensor]:
        before = net.k.weight.data
        net.k.weight.data = torch.full_like(before, float("nan"))
        handle = net.k.register_forward_pre_hook(lambda *_: setattr(net.k.weight, "data", before))
        ys = net(x)
        handle.remove()
        return ys

    compare(forward)
    assert launches[4:] == [1] * 18  # after the two calls that learn


@pytest.mark.usefixtures("one_seed")
def test_threads_do_not_see_each_other(launches: list[int]) -> None:
    """As DataParallel runs replicas; here even of the same layers at the same time, in lock step."""
    net = Three().learn()
    alone = net.alone()
    meet = threading.Barrier(4)
    launches.clear()
    errors: list[float] = []

    def work(index: int) -> None:
        x = torch.full((3, 6), float(index + 1), dtype=torch.float64)
        for _ in range(5):
            ys = []
            for layer in (net if index % 2 else replicate(net)).layers():
                meet.wait(30)
                ys.append(layer(x))
            errors.extend(error(y.detach(), expected.detach()) for y, expected in zip(ys, alone(x), strict=True))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4 * 5 * 3
    assert max(errors) < 1e-12
    assert launches.count(3) == 2 * 5  # threads 1 and 3


def replicate(net: Three) -> Any:
    """What torch.nn.parallel.replicate makes for another GPU: shallow copies, parameters as plain tensors."""
    replica: Any = net._replicate_for_data_parallel()
    for name in "qkv":
        layer = getattr(net, name)
        replica._modules[name] = layer._replicate_for_data_parallel()
        for key, parameter in layer.named_parameters():
            setattr(replica._modules[name], key, parameter * 1)
    return replica


def test_a_group_that_wastes_an_output_dissolves(launches: list[int]) -> None:
    for grad in (True, False):
        net = Three(dropout=0.0).learn()
        launches.clear()
        with torch.set_grad_enabled(grad):
            x = torch.randn(4, 6, dtype=torch.float64)
            for _ in range(3):
                an_unused = a_member_never(net, x)
                del an_unused
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


# --- memory -----------------------------------------------------------------------------------------------------------


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("learned", [False, True], ids=["alone", "together"])
def test_nothing_is_kept_after_use(learned: bool, checkpointing: bool) -> None:
    net = Three()
    if learned:
        net.learn()
    with no_garbage_collection():
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True) * 1
        ys = [y.sin() for y in (checkpoint(net, x, use_reentrant=False) if checkpointing else net(x))]
        kept = [weakref.ref(t) for t in (x, *ys, *(y.grad_fn.next_functions[0][0] for y in ys))]
        sum(y.sum() for y in ys).backward()
        del x, ys
        assert not any(r() is not None for r in kept)


def test_an_output_nobody_asks_for_goes_with_the_next_call() -> None:
    net = Three().learn()
    with no_garbage_collection():
        x = torch.randn(4, 6, dtype=torch.float64)
        kept = [weakref.ref(x)]
        y = net.q(x)
        kept.append(weakref.ref(y.grad_fn))
        del x, y
        assert all(r() is not None for r in kept)
        net.v(torch.ones(1, 6, dtype=torch.float64))
        assert not any(r() is not None for r in kept)


@pytest.mark.parametrize("step", ["close", "open"])
def test_an_output_nobody_asks_for_goes_with_the_link(step: str) -> None:
    net = Three().learn()
    with no_garbage_collection():
        kept = weakref.ref(net.q(torch.randn(4, 6, dtype=torch.float64)).grad_fn)
        assert kept() is not None
        net.v.close() if step == "close" else net.v.open(net.v.lora_A, net.v.lora_B, scale=1.0, dropout=0.0)
        assert kept() is None


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    net = Three().learn()
    with no_garbage_collection():
        kept = weakref.ref(net.k)
        net.q(torch.randn(4, 6, dtype=torch.float64))
        del net
        assert kept() is None


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

"""Whatever way a model calls layers that have been grouped, it gets what they compute alone; and nothing is kept."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .three import Three, compare, error

pytestmark = pytest.mark.usefixtures("way")


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
        for key, parameter in layer._parameters.items():
            setattr(replica._modules[name], key, None if parameter is None else parameter * 1)
    return replica


@pytest.mark.parametrize("together", [False, True], ids=["apart", "inside and outside"])
@pytest.mark.usefixtures("one_seed")
def test_members_of_different_checkpointed_regions(together: bool) -> None:
    def forward(net: Three, x: Tensor) -> list[Tensor]:
        q = net.q(x) if together else checkpoint(net.q, x, use_reentrant=False)
        k, v = checkpoint(lambda x: (net.k(x).sin(), net.v(x).sin()), x, use_reentrant=False)
        return [q, k, v]

    compare(forward)


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

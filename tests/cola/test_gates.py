"""Gates in a chain: DoRA's on the output, AdaLoRA's and SoRA's on the rank."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import Chain, UserError, attach, config, load_chain
from cola_fast.chain.best import load_best, save_best
from cola_fast.layers.output_gate import output_gate, row_squares
from cola_fast.methods import AFTER_STEP, GRADIENT, Pair, Step
from cola_fast.methods.adalora import share_left
from cola_fast.training import trainer
from cola_fast.training.optimizer import make_optimizer

from ..conftest import disturb, tiny_llama
from ..kernels.conftest import peak_memory
from .test_chain import logits, relative
from .test_methods import chain_of, configured, pretend_to_train
from .three import Three, separate

GATED = pytest.mark.parametrize("name", ["dora", "adalora", "sora"])


def rows_of(weight: Tensor) -> Tensor:
    return weight.double().norm(dim=1)


# --- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["", "e"])
def test_the_norm_is_that_of_the_rows(gated: bool) -> None:
    torch.manual_seed(0)
    w, a, b, e = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 11), (3, 11), (7, 3), (3,)))
    m = torch.rand(7, dtype=torch.float64, requires_grad=True)
    c = output_gate(m, row_squares(w), w, a.requires_grad_(), b.requires_grad_(), 0.6, e if gated else None)
    norms = (w + 0.6 * (b * (e if gated else 1)) @ a).norm(dim=1)
    torch.testing.assert_close(c, m / norms)
    c.sum().backward()
    torch.testing.assert_close(m.grad, 1 / norms.detach())
    assert a.grad is b.grad is None  # the norm is a constant


def test_the_norm_needs_no_matrix_of_the_weight_s_size() -> None:
    w, a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(8, 2048), torch.randn(2048, 8)
    squares = row_squares(w)
    assert 0 < peak_memory(lambda: output_gate(squares.sqrt(), squares, w, a, b, 1.0)) < 0.1 * w.nbytes
    assert 0 < peak_memory(lambda: row_squares(w)) <= 0.6 * w.nbytes  # one tile of 4 MiB in fp32
    torch.testing.assert_close(squares, w.float().square().sum(1))


def test_rows_of_zeros_stay_what_they_are() -> None:
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1:3] = 0
    net, x = nn.Sequential(layer), torch.randn(5, 6)
    before = net(x)
    chain = attach(net, targets=["0"], r=2, gate="dora")
    torch.testing.assert_close(net(x), before)
    net(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in chain.parameters())
    chain.tie()
    torch.testing.assert_close(net(x), before)


def test_dora_trains_as_peft_s() -> None:
    """The same loss and the same gradients of A, B and the magnitude, with a bias."""
    from peft import LoraConfig, get_peft_model

    def make() -> nn.Module:
        model = tiny_llama(attention_bias=True)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, generator=torch.Generator().manual_seed(3))
        return model

    ids = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(5))
    keys: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    peft = get_peft_model(make(), LoraConfig(**keys, use_dora=True))
    model = make()
    chain = attach(model, r=4, alpha=8, gate="dora")
    pretend_to_train(chain, 0)
    pairs = []
    for name, layer in chain.layers.items():
        theirs = peft.base_model.model.get_submodule(name)
        their = [getattr(theirs, key)["default"].weight for key in ("lora_A", "lora_B", "lora_magnitude_vector")]
        torch.testing.assert_close(their[2], layer.row_squares.sqrt())
        for p, mine in zip(their, (layer.lora_A, layer.lora_B, layer.lora_magnitude), strict=True):
            pairs.append((p, mine))
            p.data.copy_(mine)
    losses = [m(ids, labels=ids).loss for m in (peft, model)]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    for p, mine in pairs:
        torch.testing.assert_close(p.grad, mine.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "open"])
def test_one_dora_link_is_an_adapter_of_peft(tied: bool, ids: Tensor, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_llama()
    chain = attach(model, r=3, targets="all-linear", gate="dora", rank_pattern={"v_proj": 2})
    pretend_to_train(chain, 1)
    live = logits(model, ids)
    if tied:
        chain.save(tmp_path / "run")
        chain.tie()
    written = chain.export_adapter(tmp_path / "adapter")
    assert "vLLM loads no adapter with use_dora" in str(written)
    for folder in [tmp_path / "adapter", *([tmp_path / "run/links/000"] if tied else [])]:
        assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
        assert relative(logits(PeftModel.from_pretrained(tiny_llama(), folder), ids), live) < 1e-5
    with pytest.raises(UserError, match="only a single one is an adapter, of its own rank"):
        chain.export_adapter(tmp_path / "cut", rank=1)
    assert not (tmp_path / "cut").exists()


def test_a_tie_leaves_rows_of_the_trained_length_and_the_next_link_starts_from_them(model: nn.Module) -> None:
    chain = attach(model, r=3, gate="dora")
    for link in range(2):
        for layer in chain.layers.values():
            operands = layer.operands()
            assert operands is not None
            assert torch.equal(operands.c(), torch.ones(layer.out_features))
        pretend_to_train(chain, link)
        lengths = {name: f.magnitude for name, f in chain.live_factors().items()}
        chain.tie()
        for name, layer in chain.layers.items():
            torch.testing.assert_close(rows_of(layer.weight), lengths[name].double().abs(), rtol=1e-5, atol=1e-6)
        chain.extend()


def test_a_magnitude_that_alone_was_trained_is_not_lost(model: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    given = attach(tiny_llama(), r=3)
    disturb(given)
    given.export_adapter(tmp_path / "adapter")
    chain = attach(model, r=3, gate="dora")
    with torch.no_grad():
        next(iter(chain.layers.values())).lora_magnitude.mul_(1.5)
    with pytest.raises(UserError, match="which would be lost"):
        chain.detach()
    with pytest.raises(UserError, match="an import would replace it"):
        chain.import_adapter(tmp_path / "adapter")


def test_a_model_that_changes_its_dtype_keeps_the_norm_of_its_rows(model: nn.Module, ids: Tensor) -> None:
    """fp16 ends at 65,504: squares of rows longer than 256 are not stored in it."""
    chain = attach(model, targets=["q_proj"], gate="dora")
    with torch.no_grad():
        for layer in chain.layers.values():
            layer.weight.mul_(300)
            layer.lora_magnitude.mul_(300)
    model.half()
    for layer in chain.layers.values():
        torch.testing.assert_close(layer.operands().c(), torch.ones(layer.out_features), rtol=1e-3, atol=0)


def test_a_carried_start_leaves_the_weight_before_its_rows_are_scaled(model: nn.Module, ids: Tensor) -> None:
    """DoRA over PiSSA: one sealed link, a PEFT adapter, of twice the rank."""
    chain = attach(model, r=3, targets="all-linear", gate="dora", init="pissa")
    pretend_to_train(chain, 0)
    live = logits(model, ids)
    chain.tie()
    assert relative(logits(model, ids), live) < 1e-5


def test_only_dense_weights_take_dora(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"only a dense weight can take, but base is ledger"):
        attach(model, gate="dora", base="ledger")
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


# --- gates on the rank ------------------------------------------------------------------------------------------------


def test_closed_directions_leave_the_link(model: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    """One module keeps 2 of 4, one keeps none: the rank of that is 1, and its update zero."""
    from peft import PeftModel

    chain = attach(model, r=4, gate="sora")
    pretend_to_train(chain, 0)
    some, none = list(chain.layers)[:2]
    with torch.no_grad():
        chain.layers[some].lora_e[1:3] = 0
        chain.layers[none].lora_e.zero_()
    live, scales = logits(model, ids), {name: layer.scale for name, layer in chain.layers.items()}
    chain.save(tmp_path)
    link = chain.tie()
    assert relative(logits(model, ids), live) < 1e-5
    assert [link.ranks[name] for name in (some, none, *list(chain.layers)[2:])] == [2, 1, 4, 4]
    assert {name: f.scale for name, f in link.factors().items()} == pytest.approx(scales)
    assert json.loads((tmp_path / "links/000/adapter_config.json").read_text())["rank_pattern"] == {some: 2, none: 1}
    assert relative(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "links/000"), ids), live) < 1e-5
    chain.extend()
    assert set(chain.open_link.ranks.values()) == {4}


def test_a_start_with_gates_leaves_the_weight_once(model: nn.Module, ids: Tensor) -> None:
    """SoRA over PiSSA: B diag(e) A is what the weight gives, and what the link is less at the end."""
    before = logits(model, ids)
    chain = attach(model, r=3, gate="sora", init="pissa")
    assert relative(logits(model, ids), before) < 1e-5
    with torch.no_grad():
        for layer in chain.layers.values():
            layer.lora_e[0] = 0
    live = logits(model, ids)
    assert relative(live, before) > 1e-3
    chain.tie()
    assert relative(logits(model, ids), live) < 1e-5


def pair(r: int, n: int = 9, k: int = 13) -> Pair:
    torch.manual_seed(r)
    a, b, e = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((r, k), (n, r), (r,)))
    for p in (a, b, e):
        p.grad = torch.randn_like(p)
    return Pair(a, b, 1.0, e)


def test_sora_s_step_is_the_proximal_one() -> None:
    """It minimises `(z - e)² / 2 + lr · penalty · |z|`."""
    one = pair(40)
    before = one.e.detach().clone()
    AFTER_STEP["sora"]([one], Step(0.5, 0.1, configured("sora").train, {}))
    z = torch.linspace(-4, 4, 160001, dtype=torch.float64)
    best = [z[((z - e) ** 2 / 2 + 0.5 * 0.5 * z.abs()).argmin()] for e in before]
    torch.testing.assert_close(one.e.detach(), torch.stack(best), rtol=0, atol=1e-4)
    assert 0 < int((one.e == 0).sum()) < 40


def test_adalora_s_penalty_has_the_gradient_of_its_formula() -> None:
    one = pair(4)
    before = [p.grad.clone() for p in (one.b, one.a)]
    GRADIENT["orthogonal"]([one], configured("adalora").train)
    eye = torch.eye(4, dtype=torch.float64)
    penalty = 0.1 * ((one.b.t() @ one.b - eye).square().sum() + (one.a @ one.a.t() - eye).square().sum())
    for p, old, own in zip((one.b, one.a), before, torch.autograd.grad(penalty, (one.b, one.a)), strict=True):
        torch.testing.assert_close(p.grad, old + own)


def test_adalora_closes_the_least_important() -> None:
    """Against the paper's formulas written out, over steps with changing gradients and two modules."""
    pairs, train = [pair(3), pair(5)], configured("adalora").train
    state: dict[Any, dict[str, Any]] = defaultdict(dict)
    smoothed = [{key: [torch.zeros_like(getattr(m, key))] * 2 for key in "bae"} for m in pairs]
    for step, done in enumerate([0.05, 0.3, 0.5, 0.8]):
        torch.manual_seed(100 + step)
        values = []
        for m, kept in zip(pairs, smoothed, strict=True):
            nn.init.normal_(m.e)
            scores = {}
            for key in "bae":
                p = getattr(m, key)
                p.grad = torch.randn_like(p)
                mean, spread = kept[key]
                now = (p.detach() * p.grad).abs()
                mean = 0.85 * mean + 0.15 * now
                spread = 0.85 * spread + 0.15 * (now - mean).abs()
                kept[key] = [mean, spread]
                scores[key] = mean * spread
            values += [
                float(scores["e"][i] + scores["b"][:, i].sum() / 9 + scores["a"][i].sum() / 13) for i in range(len(m.e))
            ]
        AFTER_STEP["adalora"](pairs, Step(1.0, done, train, state))
        count = round(8 * share_left(done, 0.67))
        best = set(sorted(range(8), key=lambda i: -values[i])[:count])
        left = torch.cat([m.e.detach() for m in pairs]).nonzero().flatten().tolist()
        assert set(left) == best
    assert count == 5


def test_the_budget_falls_by_a_cubic() -> None:
    shares = [share_left(done / 10, 0.25) for done in range(11)]
    assert shares[:2] == [1, 1]
    assert shares[4] == pytest.approx(0.25 + 0.75 / 8)  # half way: an eighth of what goes is left
    assert shares[7:] == [0.25] * 4
    assert shares == sorted(shares, reverse=True)


def test_a_run_with_adalora_keeps_its_budget(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file(chain__method="adalora", schedule__links=2, chain__r=6, train__budget=0.5)
    trainer.train(config.load(path), quiet=True)
    record = json.loads((tmp_path / "run/chain.json").read_text())
    for link in record["links"]:  # 4 modules, 12 of 24 directions, and 1 more for each that would have none
        assert 12 <= sum(link["ranks"].values()) <= 15


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dora", "adalora"])
def test_killed_and_resumed_is_never_killed(
    name: str, config_file: Callable[..., str], raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 7 of 12 steps, in the second of two links; the last state is of step 6."""
    raw_config["schedule"]["links"] = 2
    raw_config["chain"] = {"method": name, "targets": ["q_proj", "k_proj", "v_proj"], "r": 3, "dropout": 0.1}

    def run(folder: str) -> list[str]:
        made = config.load(config_file(out=str(Path(raw_config["out"]).with_name(folder)), train__save_every=2))
        trainer.train(made, quiet=True)
        record = json.loads((Path(made.out) / "chain.json").read_text())
        return [link["sha256"]["adapter_model.safetensors"] for link in record["links"]]

    expected = run("whole")
    calls = []

    def dying(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 8:
            raise RuntimeError("killed")
        set_lr(*args)

    set_lr = trainer.set_lr
    monkeypatch.setattr(trainer, "set_lr", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run("killed")
    assert run("killed") == expected
    assert len(calls) == 8 + 12 - 6


@GATED
def test_layers_that_read_the_same_x_still_run_as_one(name: str, launches: list[int], ids: Tensor) -> None:
    model = tiny_llama()
    chain = chain_of(model, configured(name))
    pretend_to_train(chain, 0)
    alone = separate(copy.deepcopy(model))
    for net in (model, alone):
        for _ in range(3):
            net.zero_grad()
            launches.clear()
            net(ids, labels=ids).loss.backward()
        assert launches == ([3, 1, 2, 1] if net is model else [1] * 7) * 2
    for p, q in zip(chain.parameters(), [p for p in alone.parameters() if p.requires_grad], strict=True):
        assert p.shape == q.shape
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-4, atol=1e-6, msg=n)


def test_groups_in_which_some_have_gates() -> None:
    def give(net: Three) -> Three:
        torch.manual_seed(4)
        w = net.q.weight.shape
        net.q.open(*torch.randn(2, *w, dtype=torch.float64), scale=0.5, dropout=0.0, magnitude=torch.rand(6).double())
        net.k.open(*torch.randn(2, *w, dtype=torch.float64), scale=0.5, dropout=0.0, e=torch.randn(6).double())
        return net

    grouped = give(Three(dropout=0.0)).learn()
    alone = grouped.alone()
    x = torch.randn(4, 6, dtype=torch.float64)
    for net in (grouped, alone):
        sum((i + 1) * y.square().sum() for i, y in enumerate(net(x))).backward()
    for p, q in zip(grouped.parameters(), alone.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad)


@GATED
def test_the_optimizer_holds_gates_without_decay(name: str, model: nn.Module) -> None:
    made = config.from_dict({
        "model": {"name": "m"}, "data": {"train": "t"}, "schedule": {"steps": 9},
        "chain": {"method": [name, "lora+"]}, "train": {"weight_decay": 0.1},
    })  # fmt: skip
    chain = chain_of(model, made)
    groups = make_optimizer(chain, made.train).param_groups
    names = {parameter: n.rsplit(".", 1)[-1] for n, parameter in chain.named_parameters()}
    found = {names[group["params"][0]]: (group["lr_scale"], group["weight_decay"]) for group in groups}
    gate = "lora_magnitude" if name == "dora" else "lora_e"
    assert found == {"lora_A": (1, 0.1), "lora_B": (16, 0.1), gate: (1, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(chain.parameters())


@pytest.mark.parametrize("name", ["dora", "sora"])
def test_gated_layers_compile_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    chain = attach(model, r=2, targets="all-linear", gate=name)
    pretend_to_train(chain, 0)
    x = torch.randn(5, 8)
    results = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = function(x).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in chain.parameters())])
        model.zero_grad()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_norm_is_not_computed_in_16_bits(model: nn.Module) -> None:
    """A small change of the norm is all that c shows."""
    chain = attach(model, r=3, gate="dora")
    pretend_to_train(chain, 0)
    for layer in chain.layers.values():
        operands = layer.operands()
        assert operands is not None
        expected = operands.c()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(operands.c(), expected)


@GATED
def test_the_best_link_is_what_it_was(name: str, model: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    chain = chain_of(model, configured(name))
    chain.save(tmp_path)
    pretend_to_train(chain, 0)
    live = logits(model, ids)
    save_best(chain, tmp_path, step=1, loss=0.5)
    again = load_best(tiny_llama(), tmp_path)
    assert relative(logits(again.model, ids), live) < 1e-6


def test_an_adapter_is_imported_before_a_link_with_gates_is_trained(model: nn.Module, tmp_path: Path) -> None:
    """AdaLoRA's A and B are not zero at its start, but its gates are."""
    other = attach(tiny_llama(), r=2)
    pretend_to_train(other, 0)
    other.export_adapter(tmp_path / "adapter")
    chain: Chain = attach(model, r=3, gate="adalora", init="gaussian")
    assert chain.import_adapter(tmp_path / "adapter").index == 0
    pretend_to_train(chain, 1)
    with pytest.raises(UserError, match="has been trained"):
        chain.import_adapter(tmp_path / "adapter")
    chain.save(tmp_path / "run")
    again = load_chain(tiny_llama(), tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(chain.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["chain.method=[lora, lora-pro]", "chain.gate=gate"], r"chain.gate is 'gate', but must be one of adalora"),
        (["after_step=sora"], r"train.after_step is sora, which changes gates: set chain.gate"),
        (["penalty=-1"], r"train.penalty is -1.0"),
        (["budget=0"], r"train.budget is 0.0"),
    ],
)
def test_what_is_refused(overrides: list[str], sentence: str) -> None:
    raw = {"model": {"name": "m"}, "data": {"train": "t"}, "schedule": {"steps": 9}}
    with pytest.raises(UserError, match=sentence):
        config.from_dict(raw, overrides)


@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_what_works_on_e_refuses_dora(name: str, model: nn.Module) -> None:
    chain = attach(model, gate="dora")
    with pytest.raises(UserError, match=rf"train.after_step: {name} needs gates on the rank"):
        AFTER_STEP[name](chain.pairs(), Step(0.1, 0.5, configured(name).train, {}))


def test_lora_pro_refuses_gates_on_the_rank() -> None:
    with pytest.raises(UserError, match="knows no gates on the rank"):
        GRADIENT["lora-pro"]([pair(2)], configured("lora-pro").train)

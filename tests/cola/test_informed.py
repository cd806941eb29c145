"""EVA and LoRA-GA: what they see of the training batches, and that looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import Chain, UserError, attach, config, load_chain
from cola_fast.chain.calibration import draw
from cola_fast.config import ModelConfig
from cola_fast.data.encode import Example
from cola_fast.layers.layer import LoRALinear
from cola_fast.training import trainer
from cola_fast.training.models import load_model

from ..conftest import disturb, tiny_llama
from .test_chain import logits, relative
from .test_trainer import hashes

BOTH = pytest.mark.parametrize("init", ["eva", "lora-ga"])
R = 3


def batches(*lengths: int) -> list[dict[str, Tensor]]:
    """One of two rows of 40 tokens for each length: what is beyond that in the second row is padding."""
    ids = torch.randint(2, 64, (len(lengths), 2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for number, length in enumerate(lengths):
        mask[number, 1, length:] = 0
    return [
        {"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


def truth(model: nn.Module, seen: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every linear's inputs [M, K] without padding, and its weight's gradient [N, K], by autograd, over the batches."""
    inputs: dict[str, list[Tensor]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for batch in seen:
        real = batch["attention_mask"].bool()
        hooks = [
            m.register_forward_pre_hook(lambda _, x, n=n, real=real: inputs.setdefault(n, []).append(x[0][real]))
            for n, m in linears.items()
        ]
        model(**batch).loss.backward()
        for hook in hooks:
            hook.remove()
    gradients = {n: m.weight.grad for n, m in linears.items() if m.weight.grad is not None}
    return {n: torch.cat(x).detach() for n, x in inputs.items()}, gradients


@pytest.mark.parametrize("lengths", [(25,), (40, 31, 6)], ids=["one", "several"])
def test_eva_starts_along_the_main_directions_of_the_inputs(lengths: tuple[int, ...]) -> None:
    model, seen = tiny_llama(dtype=torch.float64), batches(*lengths)
    inputs, _ = truth(tiny_llama(dtype=torch.float64), seen)
    chain = attach(model, r=R, targets="all-linear", init="eva", batches=seen)
    for name, f in chain.live_factors().items():
        s = torch.linalg.svdvals(inputs[name])
        torch.testing.assert_close(f.a @ f.a.t(), torch.eye(R, dtype=f.a.dtype))
        assert not f.b.any()
        # how much of the inputs it explains: a randomised SVD, and truncating between batches, lose a little
        assert 0.99 < float((inputs[name] @ f.a.t()).square().sum() / s[:R].square().sum()) < 1 + 1e-9


def test_lora_ga_starts_along_the_gradient() -> None:
    """R + R singular directions of it, A the largest; and what the link starts with has left the weight."""
    model, seen = tiny_llama(dtype=torch.float64), batches(25)
    _, gradients = truth(tiny_llama(dtype=torch.float64), seen)
    chain = attach(model, r=R, alpha=6, targets="all-linear", init="lora-ga", batches=seen)
    for name, f in chain.live_factors().items():
        n = f.b.shape[0]
        s = torch.linalg.svdvals(gradients[name])
        torch.testing.assert_close(f.a @ f.a.t(), n**0.5 / 16 * torch.eye(R, dtype=f.a.dtype))
        torch.testing.assert_close(f.b.t() @ f.b, n**0.5 / 16 * torch.eye(R, dtype=f.a.dtype))
        grown = float((gradients[name] @ f.a.t()).square().sum() / (n**0.5 / 16))
        reached = float((f.b.t() @ gradients[name]).square().sum() / (n**0.5 / 16))
        assert grown == pytest.approx(float(s[:R].square().sum()), rel=1e-2)
        assert reached == pytest.approx(float(s[R : 2 * R].square().sum()), rel=1e-2)
        torch.testing.assert_close(
            chain.layers[name].weight + f.scale * f.b @ f.a, tiny_llama(dtype=torch.float64).get_submodule(name).weight
        )


def test_lora_ga_adds_up_batches() -> None:
    """Through a truncation to rank 4R after each."""
    seen = batches(40, 31, 6)
    _, gradients = truth(tiny_llama(dtype=torch.float64), seen)
    chain = attach(tiny_llama(dtype=torch.float64), r=4, targets="all-linear", init="lora-ga", batches=seen)
    for name, f in chain.live_factors().items():
        best = torch.linalg.svdvals(gradients[name])[:4].square().sum()
        a = nn.functional.normalize(f.a)
        assert float((gradients[name] @ a.t()).square().sum()) > 0.98 * float(best)


def test_peft_starts_lora_ga_along_the_same_directions() -> None:
    """Up to signs, and to B's length: PEFT multiplies it by singular values, the authors' code does not."""
    from peft import LoraConfig, LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    (seen,) = batches(25)
    keys: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "lora_ga_config": LoraGAConfig()}
    settings = LoraConfig(r=R, lora_alpha=6, init_lora_weights="lora_ga", **keys)
    base = tiny_llama()
    preprocess_loraga(base, settings, lambda: base(**seen).loss.backward())
    peft = get_peft_model(base, settings)
    chain = attach(tiny_llama(), r=R, alpha=6, targets=["q_proj", "up_proj"], init="lora-ga", batches=[seen])
    for name, f in chain.live_factors().items():
        theirs = peft.base_model.model.get_submodule(name)
        for ours, other in ((f.a, theirs.lora_A["default"].weight), (f.b.t(), theirs.lora_B["default"].weight.t())):
            cosines = nn.functional.cosine_similarity(ours, other.detach())
            torch.testing.assert_close(cosines.abs(), torch.ones(R), rtol=0, atol=1e-2)


@BOTH
def test_looking_leaves_everything_as_it_was(init: str, ids: Tensor) -> None:
    model = tiny_llama().train()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    chain = attach(model, r=R, init=init, batches=batches(25))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p.grad is not None for p in model.parameters())
    chain.detach()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, weights[name])


@BOTH
def test_every_link_looks_again(init: str) -> None:
    """At the model as it has become; at the batches it had, or at new ones."""
    found = []
    for later in (None, batches(11)):
        chain = attach(tiny_llama(), r=R, init=init, batches=iter(batches(25)))
        first = chain.live_factors()
        disturb(chain, 0.5)
        chain.tie()
        chain.extend(batches=later)
        found.append(chain.live_factors())
        assert not any(torch.equal(first[name].a, f.a) for name, f in found[-1].items() if ".1." in name)
    assert not any(torch.equal(found[0][name].a, f.a) for name, f in found[1].items())


def test_four_bit_weights_have_a_gradient_too(wide_folder: Path) -> None:
    """That of the dequantised weight, without keeping it."""
    pytest.importorskip("bitsandbytes")
    (seen,) = batches(25)
    options = {"name": str(wide_folder), "dtype": "fp32", "device": "cpu"}
    quantised = load_model(ModelConfig(**options, load_in_4bit=True))
    dense = load_model(ModelConfig(**options))
    chain = attach(quantised, r=R, targets="all-linear", init="kaiming")
    for name, layer in chain.layers.items():
        dense.get_submodule(name).weight.data = layer.dense_weight()
    chain.detach()
    starts = [attach(m, r=R, targets="all-linear", init="lora-ga", batches=[seen]) for m in (quantised, dense)]
    ours, expected = (chain.live_factors() for chain in starts)
    for name, f in ours.items():
        cosines = nn.functional.cosine_similarity(f.a, expected[name].a)
        torch.testing.assert_close(cosines.abs(), torch.ones(R), rtol=0, atol=1e-2)


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_examples_are_drawn_by_their_own_seed() -> None:
    examples = [Example([5] * n, [-100] * (n - 1) + [5]) for n in range(2, 30)]
    samples = draw(examples, 10, 4, 0)
    assert [len(sample.real) for sample in samples] == [4, 4, 2]  # type: ignore[arg-type]
    lengths = [int(n) for sample in samples for n in sample.real.sum(1)]  # type: ignore[union-attr]
    assert len(set(lengths)) == 10
    again, other = draw(examples, 10, 4, 0), draw(examples, 10, 4, 1)
    assert all(torch.equal(a.real, b.real) for a, b in zip(samples, again, strict=True))  # type: ignore[arg-type]
    assert lengths != [int(n) for sample in other for n in sample.real.sum(1)]  # type: ignore[union-attr]


def test_a_killed_run_goes_on_to_the_same_links(
    config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All at once: a start from gradients, LoRA-RITE's state, and Flat-LoRA's noise. Killed before the second link is
    opened, and again in the middle of it."""
    keys = {"chain__method": ["cola", "lora-ga", "lora-rite", "flat-lora"], "chain__calibration": 12}
    keys |= {"schedule__links": 2, "schedule__steps": 8, "train__save_every": 3}
    trainer.train(config.load(config_file(**keys)), quiet=True)
    killed = config.load(config_file(out=str(tmp_path / "killed"), **keys))
    extend, step = Chain.extend, trainer._Loop._step

    def dying_extend(chain: Chain, *args: Any, **options: Any) -> Any:
        if len(chain.links) == 1:
            raise KeyboardInterrupt
        return extend(chain, *args, **options)

    def dying_step(loop: Any) -> None:
        if loop.at.step == 7:
            raise KeyboardInterrupt
        step(loop)

    for owner, name, dying in ((Chain, "extend", dying_extend), (trainer._Loop, "_step", dying_step)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            with pytest.raises(KeyboardInterrupt):
                trainer.train(killed, quiet=True)
        assert len(load_chain(load_model(killed.model), tmp_path / "killed").links) == 1
    trainer.train(killed, quiet=True)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "run")


# --- what is refused --------------------------------------------------------------------------------------------------


def without_labels() -> list[dict[str, Tensor]]:
    return [{"input_ids": batch["input_ids"]} for batch in batches(40)]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"init": "eva"}, r"init eva starts from training data: give attach or extend a few `batches`"),
        ({"init": "lora-ga", "batches": []}, r"init lora-ga starts from training data"),
        ({"init": "lora-ga", "batches": without_labels()}, r"gives no loss: put labels into it"),
        ({"init": "lora-ga", "batches": batches(40), "r": 9}, r"2R directions .* 16 x 32, has no 18"),
        ({"init": "eva", "batches": [{"input_ids": torch.ones(1, 2, dtype=torch.int64)}]}, r"saw 2 tokens, too few"),
        ({"init": "eva", "batches": without_labels(), "frozen": "b"}, r"init eva needs that factor trained"),
    ],
    ids=["none", "empty", "labels", "rank", "tokens", "frozen"],
)
def test_attach_refuses_and_leaves_the_model(keys: dict[str, Any], sentence: str, ids: Tensor) -> None:
    model = tiny_llama()
    before = logits(model, ids)
    with pytest.raises(UserError, match=sentence):
        attach(model, **{"r": R, **keys})
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert relative(logits(model, ids), before) == 0


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(UserError, match="loss of a batch to start from is nan"):
        attach(model, r=R, init="lora-ga", batches=batches(25))


def test_eva_needs_no_labels() -> None:
    first, second = (attach(tiny_llama(), r=R, init="eva", batches=b) for b in (without_labels(), batches(40)))
    for name, f in first.live_factors().items():
        torch.testing.assert_close(f.a, second.live_factors()[name].a)

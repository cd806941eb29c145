"""Targets and ranks, and what attach and extend refuse."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from cola_fast import UserError, attach, load_chain
from cola_fast.layers.layer import LoRALinear

from ..conftest import disturb, tiny_llama
from .conftest import third_fold_raises


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"targets": ["q_pro"]}, r"'q_pro' matches no module.* Did you mean q_proj"),
        ({"targets": "layers.9.q_proj"}, r"matches no module"),
        ({"targets": "(["}, r"neither a module name nor a regular expression"),
        ({"targets": ["embed_tokens"]}, r"embed_tokens is a Embedding, but a link can only be attached"),
        ({"rank_pattern": {"k_proj": 4}}, r"rank_pattern key 'k_proj' matches no module.* q_proj|v_proj"),
        ({"r": 0}, "r is 0, but a rank is at least 1"),
        ({"r": 33}, r"rank of .* is 33, but its weight is 32 x 32: choose 1 to 32"),
        ({"r": 33}, r"rank of .* is 33"),
        ({"rank_pattern": {"v_proj": 17}}, r"rank of .*v_proj is 17, but its weight is 16 x 32: choose 1 to 16"),
        ({"dropout": 1.0}, r"dropout is 1.0"),
        ({"alpha": 0}, r"alpha is 0"),
        ({"base": "nf5"}, r"base is 'nf5'"),
        ({"rounding": "up"}, r"rounding is 'up'"),
        ({"r": 8.0}, r"rank of .* is 8.0, but a rank is a whole number"),
        ({"first_rank": 0}, r"rank of .* is 0"),
        ({"rank_pattern": ["v_proj"]}, r"rank_pattern is \['v_proj'\], but must map"),
        ({"targets": []}, r"targets is \[\], but must be"),
        ({"targets": None}, r"targets is None"),
        ({"alpha": float("inf")}, r"alpha is inf, but it must be a finite number"),
        ({"dropout": "0.1"}, r"dropout is '0.1', but it must be a finite number"),
        ({"batches": torch.ones(2, 3, dtype=torch.long)}, r"batches is a Tensor of Tensor, but must be a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_leave_the_model_as_it_was(model: nn.Module, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        attach(model, **keys)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_extend_that_fails_leaves_nothing_behind(model: nn.Module, ids: Tensor) -> None:
    chain = attach(model, init="eva", batches=[{"input_ids": ids}])
    chain.tie()
    with pytest.raises(ValueError, match="input_ids"):
        chain.extend(rank_pattern={"q_proj": 3}, batches=[{"input_idz": ids}])
    assert set(chain.extend().ranks.values()) == {8}  # from the batches it had


@pytest.mark.parametrize("base", ["dense", "ledger"])
def test_links_made_in_inference_mode_are_trained(model: nn.Module, ids: Tensor, base: str) -> None:
    with torch.inference_mode():
        chain = attach(model, base=base)
    for _ in range(2):
        disturb(chain)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in chain.parameters())
        with torch.inference_mode():
            chain.tie()
            chain.extend()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_autocast_around_a_chain_changes_nothing(model: nn.Module, ids: Tensor, init: str) -> None:
    with torch.no_grad():
        before = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            chain = attach(model, r=4, init=init)
        torch.testing.assert_close(model(ids).logits, before)
        disturb(chain)
        trained = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            chain.tie()
            chain.extend()
        torch.testing.assert_close(model(ids).logits, trained)


@pytest.mark.parametrize("keys", [{}, {"init": "pissa"}, {"gate": "sora", "share": 0.5}], ids=str)
def test_a_start_does_not_depend_on_the_default_device(model: nn.Module, keys: dict[str, Any]) -> None:
    expected = attach(tiny_llama(), **keys).live_factors()
    with torch.device("meta"):
        found = attach(model, **keys).live_factors()
    assert all(torch.equal(f.a, expected[name].a) and torch.equal(f.b, expected[name].b) for name, f in found.items())


def test_what_had_left_the_weights_is_back_if_opening_fails(model: nn.Module, ids: Tensor) -> None:
    expected = model(ids).logits
    with third_fold_raises(MemoryError), pytest.raises(MemoryError):
        attach(model, init="pissa")
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_compiled_model_gives_the_names_of_its_own(model: nn.Module, tmp_path: Path) -> None:
    chain = attach(torch.compile(model))  # type: ignore[arg-type]
    disturb(chain)
    chain.tie()
    chain.save(tmp_path)
    loaded = load_chain(tiny_llama(), tmp_path)
    assert list(loaded.layers) == list(attach(tiny_llama()).layers)
    assert all(torch.equal(loaded.layers[name].weight, layer.weight) for name, layer in chain.layers.items())


def test_wrappers_are_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"wrapped in DataParallel.* give the model inside"):
        attach(nn.DataParallel(model))
    model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(UserError, match=r"model.layers.1 is wrapped by torch.compile.* attach before compiling"):
        attach(model)


def test_weights_that_are_made_anew_are_refused(model: nn.Module) -> None:
    prune.l1_unstructured(model.model.layers[1].self_attn.v_proj, "weight", amount=0.5)
    with pytest.raises(UserError, match=r"layers.1.self_attn.v_proj computes its weight anew at each call"):
        attach(model)


def test_two_parameters_in_the_same_memory_are_refused(model: nn.Module) -> None:
    first, second = (model.model.layers[i].self_attn.q_proj for i in range(2))
    second.weight = nn.Parameter(first.weight.data)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj shares its weight with model.layers.1"):
        attach(model)


def test_layers_that_pytorch_reads_past_the_link_are_refused() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1).eval()
    with pytest.raises(UserError, match="belongs to a TransformerEncoderLayer, which in eval mode"):
        attach(model, r=2, targets=["linear1", "linear2"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attach(model, r=2, targets=["linear1", "linear2"])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_submodule_stays_in_its_mode(model: nn.Module, ids: Tensor) -> None:
    model.train()
    model.model.layers[0].eval()
    attach(model, init="eva", batches=[{"input_ids": ids}])
    assert [layer.training for layer in model.model.layers] == [False, True]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["v_proj"]], ids=["all-linear", "adapted", "other"])
def test_adapters_of_peft_get_no_links(model: nn.Module, targets: Any, ids: Tensor) -> None:
    """The sentence names what works, which is done here. The model inside a PeftModel has the adapter, too."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for given in (adapted, adapted.get_base_model()):
        with pytest.raises(UserError, match=r"belongs to a PEFT adapter.*\.merge_and_unload\(\).*\.unload\(\)"):
            attach(given, targets=targets)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
    merged = adapted.merge_and_unload()
    attach(merged, targets=targets)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_tied_weights_are_refused() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head shares its weight with model.embed_tokens"):
        attach(model, targets=["lm_head"])


def test_unsupported_modules_are_refused_and_nothing_is_half_done(model: nn.Module) -> None:
    class Special(nn.Linear):
        pass

    model.model.layers[1].self_attn.v_proj = Special(32, 16, bias=False)
    with pytest.raises(UserError, match=r"v_proj is a .*Special, but a link can only be attached to a plain"):
        attach(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_a_replaced_forward_is_refused(model: nn.Module) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    with pytest.raises(UserError, match="has had its forward replaced"):
        attach(model)


def test_all_linear_leaves_the_head_out(model: nn.Module) -> None:
    chain = attach(model, targets="all-linear")
    assert len(chain.layers) == 14
    assert "lm_head" not in chain.layers


def test_a_second_chain_is_refused(model: nn.Module) -> None:
    chain = attach(model, targets=["q_proj"])
    for targets in ("q_proj", "v_proj"):
        with pytest.raises(UserError, match="already belongs to a chain"):
            attach(model, targets=targets)
    assert len(chain.parameters()) == 4  # still trained


def test_options_as_one_object_or_as_arguments() -> None:
    from cola_fast.methods.options import ChainOptions

    options = ChainOptions(r=3, targets=("q_proj",), dropout=0.1)
    one, other = (
        attach(tiny_llama(), options, seed=4),
        attach(tiny_llama(), r=3, targets=["q_proj"], dropout=0.1, seed=4),
    )
    assert one.record([]) == other.record([])
    with pytest.raises(UserError, match="options is given and r beside it"):
        attach(tiny_llama(), options, r=3)
    with pytest.raises(UserError, match=r"attach has no option rank\. Did you mean"):
        attach(tiny_llama(), rank=3)
    listed = inspect.signature(attach).parameters
    assert {field.name: field.default for field in fields(ChainOptions)}.items() <= {
        name: parameter.default for name, parameter in listed.items()
    }.items()

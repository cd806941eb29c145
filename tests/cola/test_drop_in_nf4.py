"""accelerate_peft on bitsandbytes' 4-bit layers: PEFT's numbers to rounding, in training and after evaluating.

What holds for any base (saving, adapters that come and go, undo, ...) is in test_drop_in.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from cola_fast import UserError, accelerate_peft
from cola_kernels import nf4, nf4_dequantize

from ..conftest import tiny_llama
from .test_drop_in import LAYERS, PLAIN, logits, results

bnb = pytest.importorskip("bitsandbytes")
Load = Callable[..., nn.Module]


def wrap(base: nn.Module, *, autocast_adapter_dtype: bool = True, **keys: Any) -> Any:
    torch.manual_seed(7)
    return get_peft_model(base, LoraConfig(**{**PLAIN, **keys}), autocast_adapter_dtype=autocast_adapter_dtype).train()


def in_fp64(model: Any, **keys: Any) -> Any:
    """The same PeftModel on dense weights: what the codes stand for, everything in fp64."""
    twin = wrap(tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True), **keys)
    twin = twin.double()
    for name, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            quantised = isinstance(module, bnb.nn.Linear4bit) and key == "weight"
            dense = nf4_dequantize(value, torch.float32) if quantised else value
            twin.get_submodule(name).get_parameter(key).data = dense.detach().double()
    return twin


def error(found: dict[str, Tensor], exact: dict[str, Tensor], part: str) -> float:
    names = [name for name in exact if part in name]
    off = torch.cat([(found[name] - exact[name]).flatten() for name in names])
    return float(off.norm() / torch.cat([exact[name].flatten() for name in names]).norm())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the quantised model, of the adapter
    "fp32": ({}, {}),
    "bf16": ({"dtype": torch.bfloat16}, {}),
    "bf16-factors": ({"dtype": torch.bfloat16}, {"autocast_adapter_dtype": False}),
    "computes-fp32": ({"dtype": torch.bfloat16, "compute": torch.float32}, {}),  # transformers' default
    "computes-bf16": ({"compute": torch.bfloat16}, {}),
    "one-level": ({"dtype": torch.bfloat16, "double": False}, {}),
    "rslora": ({}, {"use_rslora": True, "rank_pattern": {"q_proj": 7}}),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_within_the_error_rule(case: str, autocast: bool, load_nf4: Load, ids: Tensor, fused: Load) -> None:
    """err(ours) <= 2 err(PEFT) + 1e-6 against fp64, as KERNELS.md asks of every op: logits and all gradients."""
    settings, keys = CASES[case]
    model = wrap(load_nf4(**settings), **keys)
    exact = results(in_fp64(model, **keys), ids)

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(model, ids)

    theirs, ours = run(), {}
    kinds = {name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None}
    assert len(accelerate_peft(model).replaced) == LAYERS
    assert fused(lambda: ours.update(run())) == LAYERS
    assert ours.keys() == theirs.keys() == exact.keys()
    assert {name: p.grad.dtype for name, p in model.named_parameters() if p.grad is not None} == kinds
    for part in ("logits", "lora_A", "lora_B"):
        assert error(ours, exact, part) <= 2 * error(theirs, exact, part) + 1e-6, part


def test_as_qlora_trains(load_nf4: Load, ids: Tensor, fused: Callable[..., int]) -> None:
    """prepare_model_for_kbit_training: fp32 norms feed layers that compute in bf16, under reentrant checkpointing."""
    losses = []
    for accelerated in (False, True):
        base = prepare_model_for_kbit_training(load_nf4(torch.bfloat16), use_gradient_checkpointing=True)
        model = wrap(base, init_lora_weights=True)
        if accelerated:
            accelerate_peft(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

        def step(model: Any = model, optimizer: Any = optimizer) -> None:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        counts = [fused(step) for _ in range(6)]
        assert counts == [2 * LAYERS * accelerated] * 6
    assert losses[6:] == pytest.approx(losses[:6], rel=2e-2)
    assert losses[5] < losses[0] - 0.1


def evaluated(model: Any, ids: Tensor) -> None:
    logits(model.eval(), ids)


def evaluated_without_adapters(model: Any, ids: Tensor) -> None:
    with model.eval().disable_adapter():
        logits(model, ids)


# the trap is in a format that bitsandbytes makes on these CPUs alone: elsewhere nothing is repacked
@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
@pytest.mark.parametrize("evaluate", [evaluated, evaluated_without_adapters])
@pytest.mark.parametrize("accelerated", ["before", "after"])
def test_evaluating_before_training(accelerated: str, evaluate: Any, load_nf4: Load, ids: Tensor, fused: Load) -> None:
    """bitsandbytes repacks weights when it runs in eval mode on a CPU, and trains wrongly from then on; we do not."""
    model = wrap(load_nf4(torch.bfloat16, repacks=True), target_modules="all-linear")
    quantised = [nf4_dequantize(weight, torch.float32) for weight in four_bit(model)]
    if accelerated == "before":
        accelerate_peft(model)
    evaluate(model, ids)
    repacked = [bool(getattr(weight.quant_state, "packing_format_for_cpu", False)) for weight in four_bit(model)]
    assert set(repacked) == {accelerated == "after" or evaluate is evaluated_without_adapters}
    report = accelerate_peft(model)
    ours: dict[str, Tensor] = {}
    assert fused(lambda: ours.update(results(model.train(), ids))) == len(repacked) == 14
    for before, weight in zip(quantised, four_bit(model), strict=True):  # repacking has rounded the scales
        bound = torch.finfo(torch.bfloat16).eps if repacked[0] else 0.0
        assert float((nf4_dequantize(weight, torch.float32) - before).norm()) <= bound * float(before.norm())
    report.undo()
    theirs = results(model, ids)
    exact = results(in_fp64(model, target_modules="all-linear"), ids)
    assert ours.keys() == exact.keys()
    for part in ("logits", "lora_A", "lora_B"):
        assert error(ours, exact, part) <= 2 * error(theirs, exact, part) + 1e-6


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only")
def test_training_after_evaluations_in_inference_mode(load_nf4: Load, ids: Tensor) -> None:
    """The second finds weights that the first, on PEFT's own forward, has had repacked."""
    model = wrap(load_nf4(torch.bfloat16, repacks=True), target_modules="all-linear")
    accelerate_peft(model)
    with torch.inference_mode():
        evaluated_without_adapters(model, ids)
        evaluated(model, ids)
    assert all(tensor.isfinite().all() for tensor in results(model.train(), ids).values())


def four_bit(model: nn.Module) -> list[Tensor]:
    return [
        m.base_layer.weight for m in model.modules() if isinstance(getattr(m, "base_layer", None), bnb.nn.Linear4bit)
    ]


# --- what is left to PEFT ---------------------------------------------------------------------------------------------


def test_fp4_is_left(load_nf4: Load, ids: Tensor) -> None:
    model = wrap(load_nf4(kind="fp4"))
    before = results(model, ids)
    with pytest.raises(UserError, match="base weight is quantised to fp4, but only NF4"):
        accelerate_peft(model)
    assert all(torch.equal(value, before[name]) for name, value in results(model, ids).items())


def test_int8_is_left(load_nf4: Load) -> None:
    base = load_nf4()
    for layer in base.model.layers:  # type: ignore[union-attr]
        layer.self_attn.q_proj = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    base.is_loaded_in_8bit = True  # type: ignore[assignment]  # what makes PEFT choose its 8-bit layer
    report = accelerate_peft(wrap(base))
    assert len(report.replaced) == 4
    assert set(report.left.values()) == {"PEFT's Linear8bitLt layer has no fused form"}
    assert all(name.endswith("q_proj") for name in report.left)


def test_some_weights_are_left(load_nf4: Load, ids: Tensor, fused: Callable[..., int]) -> None:
    """FP4 and rows that are no whole blocks, beside NF4: those calls are PEFT's, and the report says why."""
    base = load_nf4()
    first, second = base.model.layers  # type: ignore[union-attr]
    for place, keys in ((first.self_attn, {"quant_type": "fp4"}), (second.self_attn, {"quant_type": "nf4"})):
        linear = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, **keys)
        if keys["quant_type"] == "nf4":
            linear.weight.blocksize = 128
        place.q_proj = linear.to("cpu")
    model = wrap(base)
    before = results(model, ids)
    report = accelerate_peft(model)
    assert len(report.replaced) == 4
    first_why, second_why = report.left.values()
    assert "fp4" in first_why
    assert "blocks of 128" in second_why
    found: dict[str, Tensor] = {}
    assert fused(lambda: found.update(results(model, ids))) == 4
    for name, value in before.items():
        assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm())


@pytest.mark.parametrize("change", ["merged", "disabled", "dora"])
def test_states_that_fall_back(change: str, load_nf4: Load, ids: Tensor, fused: Callable[..., int]) -> None:
    """Equal to the last bit, since PEFT's forward runs."""
    models = [wrap(load_nf4(), use_dora=change == "dora").eval() for _ in range(2)]
    if change == "dora":
        with pytest.raises(UserError, match="DoraLinearVariant"):
            accelerate_peft(models[1])
    else:
        accelerate_peft(models[1])
    for model in models:
        if change == "merged":
            model.merge_adapter()
        elif change == "disabled":
            model.base_model.disable_adapter_layers()
    found: list[Tensor] = []
    assert fused(lambda: found.append(logits(models[1], ids))) == 0
    assert torch.equal(found[0], logits(models[0], ids))


def test_the_weights_stay_as_they_are(load_nf4: Load, ids: Tensor) -> None:
    model = wrap(load_nf4())
    accelerate_peft(model)
    before = [(w.data_ptr(), w.clone(), nf4.read(w).absmax.clone()) for w in four_bit(model)]
    results(model, ids)
    for (pointer, codes, absmax), weight in zip(before, four_bit(model), strict=True):
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, codes)
        assert torch.equal(nf4.read(weight).absmax, absmax)

"""accelerate_peft: PEFT's numbers to rounding, PEFT's behaviour to the letter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cola_fast import UserError, accelerate_peft, restore_peft

from ..conftest import tiny_llama

PLAIN = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
LAYERS = 6  # that PLAIN covers


@pytest.fixture(params=["dense", "nf4"])
def base(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    if request.param == "dense":
        return lambda: tiny_llama(attention_bias=True)
    load: Callable[[], nn.Module] = request.getfixturevalue("load_nf4")
    return load


def peft_model(base: nn.Module | None = None, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    torch.manual_seed(7)
    return get_peft_model(base or tiny_llama(dtype=dtype, attention_bias=True), LoraConfig(**{**PLAIN, **keys}))


def logits(model: nn.Module, ids: Tensor, **keys: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, **keys).logits
    return result


def results(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Logits and the gradients of all trainable parameters."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach().double(), **grads}


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["fp32-factors", "same-factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 7}}, {"lora_dropout": 0.0}])
def test_within_the_error_rule(
    keys: dict[str, Any], dtype: torch.dtype, factors: str, ids: Tensor, fused: Callable[..., int]
) -> None:
    """err(ours) <= 2 err(PEFT) + 1e-6 against PEFT in fp64, as KERNELS.md asks of every op."""
    torch.manual_seed(7)
    model = get_peft_model(
        tiny_llama(dtype=dtype, attention_bias=True),
        LoraConfig(**{**PLAIN, **keys}),
        autocast_adapter_dtype=factors == "fp32-factors",
    )
    exact = results(copy.deepcopy(model).double(), ids)
    theirs = results(model, ids)
    assert len(accelerate_peft(model).replaced) == LAYERS
    ours: dict[str, Tensor] = {}
    assert fused(lambda: ours.update(results(model, ids))) == LAYERS
    assert ours.keys() == theirs.keys() == exact.keys()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)

    def error(found: dict[str, Tensor], pick: Callable[[str], bool]) -> float:
        return float(torch.cat([(found[n] - exact[n]).flatten() for n in exact if pick(n)]).norm()) / float(
            torch.cat([exact[n].flatten() for n in exact if pick(n)]).norm()
        )

    for pick in (lambda n: n == "logits", lambda n: "lora_A" in n, lambda n: "lora_B" in n):
        assert error(ours, pick) <= 2 * error(theirs, pick) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast(dtype: torch.dtype, ids: Tensor, fused: Callable[..., int]) -> None:
    model = peft_model()
    exact = logits(model, ids)
    with torch.autocast("cpu", dtype):
        theirs = logits(model, ids)
        accelerate_peft(model)
        ours: list[Tensor] = []
        assert fused(lambda: ours.append(logits(model, ids))) == LAYERS
    assert ours[0].dtype == theirs.dtype
    assert float((ours[0].float() - exact).norm()) <= 2 * float((theirs.float() - exact).norm()) + 1e-6


def test_dropout_acts_in_training_only(ids: Tensor) -> None:
    model = peft_model(lora_dropout=0.5)
    accelerate_peft(model)
    still = logits(model.eval(), ids)
    assert torch.equal(still, logits(model, ids))
    draws = torch.stack([logits(model.train(), ids) for _ in range(200)])
    assert not torch.equal(draws[0], draws[1])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(64, 32)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert float((mean - layer.eval()(x)).norm() / layer(x).norm()) < 0.15


def test_it_trains_as_peft_does(ids: Tensor) -> None:
    losses = []
    for accelerated in (False, True):
        model = peft_model(init_lora_weights=True)
        if accelerated:
            accelerate_peft(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(8):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- what is not fused is PEFT's --------------------------------------------------------------------------------------


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def two_active(model: Any) -> None:
    model.add_adapter("other", LoraConfig(**PLAIN))
    model.base_model.set_adapter(["default", "other"])


def hooked(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A["default"].register_forward_hook(lambda *_: None)


def trained_base(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer.weight.requires_grad_(True)


def own_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.AlphaDropout(0.1)


def trained_scaling(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = nn.Parameter(torch.tensor(0.7))


@pytest.mark.parametrize("change", [merged, disabled, two_active, hooked, trained_base, own_dropout, trained_scaling])
def test_states_that_fall_back(change: Callable[[Any], None], ids: Tensor, fused: Callable[..., int]) -> None:
    """Brought about after acceleration, and equal to the last bit, since PEFT's forward runs."""
    plain, model = peft_model().eval(), peft_model().eval()
    accelerate_peft(model)
    change(plain)
    torch.manual_seed(0)  # of an adapter that `change` adds
    change(model)
    model.load_state_dict(plain.state_dict())
    plain.eval(), model.eval()
    found: list[Tensor] = []
    assert fused(lambda: found.append(logits(model, ids))) == 0
    assert torch.equal(found[0], logits(plain, ids))


def test_mixed_adapters_in_a_batch_fall_back(ids: Tensor, fused: Callable[..., int]) -> None:
    model = peft_model().eval()
    model.add_adapter("other", LoraConfig(**PLAIN))
    names = ["default", "other", "__base__"]
    expected = logits(model, ids, adapter_names=names)
    accelerate_peft(model)
    found: list[Tensor] = []
    assert fused(lambda: found.append(logits(model, ids, adapter_names=names))) == 0
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "Embedding layer has no fused form"),
    ],
    ids=["dora", "lora_bias", "embedding"],
)
def test_nothing_to_replace(keys: dict[str, Any], reason: str, ids: Tensor) -> None:
    model = peft_model(**keys)
    before, classes = logits(model, ids), [type(m) for m in model.modules()]
    with pytest.raises(UserError, match=reason):
        accelerate_peft(model)
    assert torch.equal(before, logits(model, ids))
    assert classes == [type(m) for m in model.modules()]


def test_the_report_names_what_is_left(fused: Callable[..., int], ids: Tensor) -> None:
    model = peft_model(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    report = accelerate_peft(model)
    assert len(report.replaced) == 2
    assert all(name.endswith("q_proj") for name in report.replaced)
    (name,) = report.left
    assert name.endswith("embed_tokens")
    assert str(report).splitlines()[0] == "2 LoRA layers run on cola_kernels, 1 as before"
    assert "Embedding" in str(report).splitlines()[1]


def test_no_peft_model() -> None:
    with pytest.raises(UserError, match="no LoRA layers"):
        accelerate_peft(tiny_llama())


# --- everything stays PEFT's ------------------------------------------------------------------------------------------


def files(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


def test_saving_is_unchanged(base: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = peft_model(base(), modules_to_save=["lm_head"])
    keys = list(model.state_dict())
    before = files(model, tmp_path / "before")
    accelerate_peft(model)
    assert list(model.state_dict()) == keys
    assert files(model, tmp_path / "after") == before


def test_adapters_come_and_go(
    base: Callable[[], nn.Module], ids: Tensor, tmp_path: Path, fused: Callable[..., int]
) -> None:
    """The life of a PeftModel, beside one that is not accelerated."""
    other = peft_model(base(), use_rslora=True, r=3)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p += 0.01
    other.save_pretrained(tmp_path / "other")
    models = [peft_model(base()), peft_model(base())]
    accelerate_peft(models[1])

    def agree() -> None:
        one, two = (logits(m.eval(), ids) for m in models)
        assert float((one - two).norm() / one.norm()) < 1e-5

    steps: list[Callable[[Any], Any]] = [
        lambda m: m.load_adapter(tmp_path / "other", "other"),
        lambda m: m.set_adapter("other"),
        lambda m: m.add_adapter("third", LoraConfig(**{**PLAIN, "init_lora_weights": True})),
        lambda m: m.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type="cat"),
        lambda m: m.set_adapter("sum"),
        lambda m: m.delete_adapter("other"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.set_adapter("default"),
    ]
    agree()
    for step in steps:
        for model in models:
            step(model)
        agree()
    assert fused(lambda: logits(models[1], ids)) == LAYERS
    with models[0].disable_adapter(), models[1].disable_adapter():
        agree()
        assert fused(lambda: logits(models[1], ids)) == 0
    models = [m.merge_and_unload() for m in models]
    agree()
    assert not any(isinstance(m, LoraLayer) for m in models[1].modules())


def test_copies_and_pickles(base: Callable[[], nn.Module], ids: Tensor, fused: Callable[..., int]) -> None:
    model = peft_model(base())
    accelerate_peft(model)
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found: list[Tensor] = []
        assert fused(lambda twin=twin, found=found: found.append(logits(twin, ids))) == LAYERS
        assert torch.equal(found[0], expected)


def test_undo(base: Callable[[], nn.Module], ids: Tensor, fused: Callable[..., int]) -> None:
    model = peft_model(base())
    classes = [type(m) for m in model.modules()]
    instances = [isinstance(m, LoraLayer) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    report = accelerate_peft(model)
    assert [isinstance(m, LoraLayer) for m in model.modules()] == instances
    assert accelerate_peft(model).replaced == report.replaced
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert fused(lambda: logits(model, ids)) == 0
    restore_peft(model)


def test_from_pretrained_and_activation_checkpointing(
    base: Callable[[], nn.Module], ids: Tensor, tmp_path: Path, fused: Callable[..., int]
) -> None:
    peft_model(base()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    expected = results(model, ids)
    accelerate_peft(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    found: dict[str, Tensor] = {}
    assert fused(lambda: found.update(results(model, ids))) > LAYERS  # recomputed
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm())


def test_a_hook_on_the_layer_itself(base: Callable[[], nn.Module], ids: Tensor) -> None:
    """accelerate's hooks keep a layer's forward and put their own over it: before, that is reported; after, it stays
    usable when the layers are given back to PEFT."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = peft_model(base()).eval()
    expected = logits(model, ids)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    report = accelerate_peft(model)
    add_hook_to_module(layer, ModelHook())
    restore_peft(model)
    torch.testing.assert_close(logits(model, ids), expected)
    again = accelerate_peft(model)
    assert len(again.left) == len(report.left) + 1
    torch.testing.assert_close(logits(model, ids), expected)
    restore_peft(model)


def test_compiled_in_one_graph(base: Callable[[], nn.Module]) -> None:
    model = peft_model(base()).eval()
    accelerate_peft(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.in_features)
    expected = layer(x)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())

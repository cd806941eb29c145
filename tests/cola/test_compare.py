"""What an export says of itself has been compared: with the live model, and with how PEFT and transformers read it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from cola_fast import UserError, attach
from cola_fast.chain import compare, export, save_pretrained
from cola_fast.layers.factors import Factors

from ..conftest import disturb, tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "initializer_range": 0.2,
}  # fmt: skip
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "Qwen3Moe": {"num_experts": 4, "mlp_only_layers": [0]},
    "DeepseekV2": {**GROUPS, **MLA},
    "DeepseekV3": {**GROUPS, **MLA},
    "Glm4Moe": GROUPS,
}
EXPERTS = {"Qwen3Moe", "DeepseekV2", "DeepseekV3", "Glm4Moe"}  # of which PEFT takes other linears for expert ones
MLP = ["gate_proj", "up_proj", "down_proj"]


def make(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def trained(model: nn.Module, **keys: Any) -> Any:
    chain = attach(model, **{"r": 1, "alpha": 2, "targets": "all-linear", **keys})
    disturb(chain, seed=1)
    chain.tie()
    chain.extend()
    disturb(chain, seed=2)
    return chain


def test_peft_in_a_new_process_is_the_live_model(ids: Tensor, tmp_path: Path) -> None:
    """Or the export has said that it is not: DoRA on linears that PEFT takes for experts."""
    cases: dict[str, dict[str, Any]] = {name: {} for name in MODELS}
    cases |= {"DeepseekV3 mlp": {"targets": MLP, "r": 2, "rank_pattern": {"down_proj": 3}}}
    cases |= {"Glm4Moe one": {"targets": ["gate_proj"]}, "Glm4Moe attention": {"targets": ["q_proj"]}}
    exported = {}
    for case, keys in cases.items():
        folder = tmp_path / case
        model = make(case.split()[0])
        model.save_pretrained(folder / "base")
        exported[case] = trained(model, **keys).export_adapter(folder / "adapter")
        with torch.no_grad():
            save_file({"ids": ids, "logits": model(ids).logits}, folder / "live.safetensors")
    model = make("Glm4Moe")
    model.save_pretrained(tmp_path / "Glm4Moe dora" / "base")
    chain = attach(model, r=2, targets=MLP, gate="dora")
    disturb(chain)
    dora = chain.export_adapter(tmp_path / "Glm4Moe dora" / "adapter")
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "Glm4Moe dora" / "live.safetensors")

    command = [sys.executable, "-W", "ignore", "-m", "tests.cola.reload_worker", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found = json.loads(done.stdout.splitlines()[-1])
    for case, written in exported.items():
        assert found[case] < 1e-5, case
        assert written.exact
        assert "exact" in str(written)
        assert "finds every module, with these factors and scales" in str(written)
        named = "target_parameters" in " ".join(written.notes)
        assert named == (case.split()[0] in EXPERTS and case != "Glm4Moe attention")
    assert found["Glm4Moe dora"] is None
    assert not dora.exact
    assert "exact" not in str(dora)
    assert "PEFT 0" in str(dora)
    assert "does not load it" in str(dora)


def test_an_adapter_with_target_parameters_comes_back(tmp_path: Path) -> None:
    chain = trained(make("Glm4Moe"), rank_pattern={"down_proj": 3})
    chain.export_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.down_proj.weight" in config["target_parameters"]
    other = attach(make("Glm4Moe"), r=1, targets="all-linear")
    other.import_adapter(tmp_path / "adapter")
    for name, layer in chain.layers.items():
        merged = save_pretrained.merged_weight(layer, "nearest")
        torch.testing.assert_close(other.layers[name].weight, merged, msg=name)


@pytest.mark.parametrize("kind", ["dense", "ledger"])
def test_a_merged_export_is_loaded_again(kind: str, load_nf4: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = load_nf4() if kind == "ledger" else tiny_llama()
    text = str(trained(model).export_merged(tmp_path / "merged"))
    assert text.startswith(str(tmp_path / "merged"))
    assert "compared: 14 merged weights with the live layers" in text or "compared: 15 merged weights" in text
    assert "tensors, read from the files, bit for bit" in text
    assert "compared: logits of 8 random rows" in text
    assert "not compared" not in text


@pytest.mark.parametrize("kind", ["ledger", "dense-ledger", "pissa-ledger", "one-open-link", "dense", "pissa"])
def test_an_adapter_is_compared_with_live_layers_on_an_untouched_base(
    kind: str, load_nf4: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = load_nf4() if kind == "ledger" else tiny_llama()
    keys: dict[str, Any] = {"base": "ledger"} if "ledger" in kind else {}
    keys |= {"init": "pissa"} if "pissa" in kind else {}
    if kind in ("one-open-link", "pissa"):
        disturb(chain := attach(model, r=2, **keys))
    else:
        chain = trained(model, **keys)
    text = str(chain.export_adapter(tmp_path / "adapter"))
    assert ("compared: the live layers, with their base" in text) == (kind not in ("dense", "pissa"))


def test_a_ledger_that_forgot_a_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chain = trained(tiny_llama(), base="ledger")
    layer = chain.layers["model.layers.0.self_attn.v_proj"]
    monkeypatch.setattr(layer, "ledger_B", torch.zeros_like(layer.ledger_B))
    with pytest.raises(UserError, match=r"the layer model.layers.0.self_attn.v_proj with the written update differs"):
        chain.export_adapter(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_compared_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "SMALL", 0)
    assert "not compared: logits, as the model is larger" in str(trained(tiny_llama()).export_merged(tmp_path / "big"))
    monkeypatch.undo()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, patch_size=8, image_size=16))
    text = str(attach(vit, targets=r".*\.q_proj", r=2).export_merged(tmp_path / "vit"))
    assert "not compared: logits (the model takes pixel_values)" in text
    text = str(trained(make("Qwen3Moe")).export_merged(tmp_path / "experts"))
    assert "not compared: 12 tensors that transformers writes under other names" in text
    assert "compared: logits" in text
    text = str(attach(tiny_llama()).export_adapter(tmp_path / "adapter"))
    assert "not compared: logits, which need the base without the links" in text


def test_peft_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_llama()
    chain = trained(model)
    model.lock = threading.Lock()  # type: ignore[assignment]
    locked = chain.export_adapter(tmp_path / "locked")
    assert "not compared: how PEFT 0." in str(locked)
    assert "reads it (the model cannot be copied: " in str(locked)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "not compared: how PEFT reads it (peft is not installed)" in str(chain.export_adapter(tmp_path / "absent"))


def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    chain = trained(transformers.T5ForConditionalGeneration(config), targets=["q", "wi"])
    assert "compared: logits" in str(chain.export_merged(tmp_path / "merged"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    chain = trained(tiny_llama(dtype=dtype))
    assert "compared: logits" in str(chain.export_merged(tmp_path / "merged"))
    assert chain.export_adapter(tmp_path / "adapter").exact


def test_factors_that_were_trained_in_sixteen_bits(tmp_path: Path) -> None:
    """As TRL casts them on a 4-bit model: a scale that is no power of 2 is not rounded into them."""
    model = tiny_llama()
    chain = attach(model, r=3, alpha=16)
    for layer in chain.layers.values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.bfloat16(), layer.lora_B.data.bfloat16()
    disturb(chain)
    assert chain.export_adapter(tmp_path / "adapter").exact
    assert chain.export_adapter(tmp_path / "cut", rank=3).exact


def test_a_model_that_diverged(tmp_path: Path) -> None:
    """It is a trainer's to save, checkpoint or not; nobody should get an export of it."""
    model: Any = tiny_llama()
    chain = attach(model)
    for parameter in chain.parameters():
        parameter.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="would hold numbers that float32 cannot"):
        chain.export_merged(tmp_path / "merged")
    with pytest.raises(UserError, match="hold NaN or infinite values"):
        chain.export_adapter(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_weights_that_cancel(tmp_path: Path) -> None:
    """The link takes nearly all of a weight away: rounding is small next to what it was."""
    model: Any = tiny_llama(dtype=torch.bfloat16)
    chain = attach(model, r=32, alpha=32, targets=["q_proj"])
    for layer in chain.layers.values():
        layer.lora_A.data.copy_(torch.eye(32))
        layer.lora_B.data.copy_(-0.999 * layer.weight.float())
    model.save_pretrained(tmp_path / "saved")
    assert "compared: 2 merged weights" in str(chain.export_merged(tmp_path / "merged"))


def test_nothing_is_drawn_or_changed(tmp_path: Path) -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()  # type: ignore[union-attr, operator]
    chain = trained(model, dropout=0.1)
    model(torch.arange(12)[None]).logits.sum().backward()
    model(torch.arange(12)[None]).logits.sum().backward()
    modes = [module.training for module in model.modules()]
    groups, state, weights = chain.grouping.state(chain.layers), torch.get_rng_state(), model.state_dict()
    weights = {key: value.clone() for key, value in weights.items()}
    assert groups
    chain.export_adapter(tmp_path / "adapter")
    chain.export_merged(tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert chain.grouping.state(chain.layers) == groups
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


# --- what is wrong is not kept ----------------------------------------------------------------------------------------


def forgets_the_last(factors: list[Factors]) -> Factors:
    """`concatenate`, gone wrong."""
    return Factors(factors[0].a, factors[0].b * factors[0].scale, float(factors[0].rank))


def changes_one(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    write_state(model, folder, {**state, key: state[key] * 1.001})


write_state = save_pretrained.write_state


@pytest.mark.parametrize(
    ("module", "name", "fault", "sentence"),
    [
        (export, "concatenate", forgets_the_last, "the update of model.layers.0.mlp.down_proj differs"),
        (save_pretrained, "merge", lambda *a, **k: None, "the merged weight of .*layers.0.self_attn.q_proj differs"),
        (export, "write_state", changes_one, "model.layers.1.mlp.up_proj.weight was not written as it is"),
    ],
    ids=["adapter", "merge", "files"],
)
def test_a_wrong_copy_is_refused(
    module: Any, name: str, fault: Any, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chain = trained(tiny_llama())
    monkeypatch.setattr(module, name, fault)
    what = chain.export_adapter if name == "concatenate" else chain.export_merged
    with pytest.raises(UserError, match=sentence):
        what(tmp_path / "out")
    if name == "merge":
        with pytest.raises(UserError, match=sentence):
            chain.model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

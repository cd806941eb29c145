"""What a chain covers is said where people look: by the chain itself, by attach, and by a dry run. And it is short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from cola_fast import attach, config, load_chain
from cola_fast.chain.coverage import coverage
from cola_fast.commands.report import dry_run

from ..conftest import disturb, tiny_llama
from .test_all_linear import MODELS, attached, build

MOES = [name for name in MODELS if any(kind in name for kind in ("Moe", "Mixtral", "Deepseek", "Next"))]


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up(name: str) -> None:
    model = build(name)
    total = sum(p.numel() for p in model.parameters())
    linears = [
        n for n, m in model.named_modules() if type(m) is nn.Linear and "lm_head" not in n and "decoder" not in n
    ]
    found = coverage(model, linears)
    assert found.total == total == found.covered + sum(found.left_out.values())
    assert found.covered == sum(model.get_submodule(n).weight.numel() for n in linears)
    assert found.experts == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)


@pytest.mark.parametrize("name", MOES)
def test_experts_without_links_are_told_of(name: str) -> None:
    chain, notes = attached(build(name), r=2)
    experts = sum(p.numel() for n, p in chain.model.named_parameters() if ".experts." in n)
    share = f"{experts / coverage(chain.model, chain.layers).total:.1%}"
    assert f"A mixture's experts that are one tensor, {share} of the weights, are no linears" in notes[-1]
    assert "left out: experts.gate_up_proj " in repr(chain)


def test_a_model_whose_parts_have_no_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    chain, notes = attached(model, r=2)
    assert notes == []
    assert "modules  2, 80.0% of the model's weights; left out: 0.bias 5.0%" in repr(chain)


def test_of_4_bit_weights_numbers_are_counted(load_nf4: Callable[..., nn.Module]) -> None:
    chain = attach(load_nf4(), r=2)
    dense = attach(tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True), r=2)
    assert coverage(chain.model, chain.layers) == coverage(dense.model, dense.layers)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MOES)
def test_a_dry_run_estimates_a_mixture_of_experts(
    name: str, dtype: str, raw_config: dict[str, Any], tiny_folder: Path, tmp_path: Path, capfd: Any
) -> None:
    """PyTorch knows the shapes of the experts' product in bf16 only, and used to print its traceback."""
    build(name).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "moe")
    raw_config["model"] |= {"name": str(tmp_path / "moe"), "dtype": dtype}
    raw_config["chain"] |= {"targets": "all-linear"}
    capfd.readouterr()
    text = dry_run(config.from_dict(raw_config))
    assert "a step" in text
    assert "not estimated" not in text
    assert "left out: experts.gate_up_proj" in text
    assert "Traceback" not in capfd.readouterr().err


def test_what_cannot_be_estimated_is_a_line_without_a_traceback(
    raw_config: dict[str, Any], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def mismatched(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x[0], x)  # no shapes of a product

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", mismatched)
    capfd.readouterr()
    assert "a step: not estimated, this model cannot be run without data" in dry_run(config.from_dict(raw_config))
    assert "Traceback" not in capfd.readouterr().err


def test_representations_are_short(tmp_path: Path) -> None:
    """A notebook prints what a cell ends in."""
    model = tiny_llama(num_hidden_layers=40)
    chain = attach(model, targets="all-linear", r=4)
    assert repr(chain.open_link) == "OpenLink(0: 280 modules, rank 4)"
    disturb(chain)
    link = chain.tie()
    assert repr(link).startswith(f"SealedLink(0: 280 modules, rank 4, sha256 {link.sha256[:12]}, kept ")
    assert repr(link).endswith("in memory)")
    chain.save(tmp_path / "run")
    chain.extend(2)
    trained = sum(p.numel() for p in chain.parameters())
    assert repr(chain).splitlines() == [
        f"Chain on LlamaForCausalLM, dense, in {tmp_path / 'run'}",
        f"  links    1 sealed, link 1 open: rank 2, {trained:,} trained",
        f"  modules  280, {coverage(model, chain.layers)}",
    ]
    adapter = chain.export_adapter(tmp_path / "adapter")
    assert repr(adapter) == f"ExportedAdapter({tmp_path / 'adapter'}: 280 modules, rank 6, exact)"
    cut = chain.export_adapter(tmp_path / "cut", rank=1)
    assert ", rank 1, largest error " in repr(cut)
    for thing in (chain, *chain.links, chain.open_link, adapter, cut):
        assert len(repr(thing)) < 400
    loaded = load_chain(tiny_llama(num_hidden_layers=40), tmp_path / "run", links=1)
    assert repr(loaded).splitlines()[1] == "  links    1 sealed"
    chain.detach(discard=True)
    assert "modules  0" in repr(chain)

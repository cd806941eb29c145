"""Invariant 2: the live model, PEFT with the exported adapter, and the merged checkpoint are the same function."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach, load_chain
from cola_fast.chain.peft_format import decode, encode
from cola_fast.errors import Note
from cola_fast.layers.factors import Factors

from ..conftest import disturb, snapshot, tiny_llama

KEYS: list[dict[str, Any]] = [
    {"r": 3},
    {"r": 4, "targets": "all-linear", "alpha": 5},
    {"r": 2, "targets": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 7}},
    {"r": 2, "targets": r"model\.layers\.1\..*_proj", "first_rank": 6},
]


def chained(model: nn.Module, *, open_link: bool, **keys: Any) -> Any:
    chain = attach(model, **keys)
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        if k == 0 or open_link:
            chain.extend(3)
    if open_link:
        disturb(chain, seed=7)
    return chain


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("open_link", [False, True], ids=["sealed", "open"])
@pytest.mark.parametrize("keys", KEYS, ids=["default", "all-linear", "rank-pattern", "regex"])
def test_peft_loads_the_chain(keys: dict[str, Any], open_link: bool, ids: Tensor, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_llama()
    chain = chained(model, open_link=open_link, **keys)
    chain.export_adapter(tmp_path / "adapter")
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    close(outputs(peft, ids), outputs(model, ids))
    assert float((outputs(tiny_llama(), ids) - outputs(model, ids)).norm()) > 0.1


def test_peft_loads_each_link(ids: Tensor, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_llama()
    chain = attach(model, **KEYS[2])
    disturb(chain)
    chain.save(tmp_path / "run")
    chain.tie()
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run" / "links" / "000")
    close(outputs(peft, ids), outputs(model, ids))


@pytest.mark.parametrize("open_link", [False, True], ids=["sealed", "open"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied-head"])
def test_transformers_loads_the_merged_model(open_link: bool, tied: bool, ids: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=tied)
    chain = chained(model, open_link=open_link, targets="all-linear")
    before = {name: p.clone() for name, p in model.named_parameters()}
    chain.export_merged(tmp_path / "merged")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert {p.suffix for p in (tmp_path / "merged").iterdir()} == {".json", ".safetensors"}
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), outputs(model, ids))


@pytest.mark.parametrize("what", ["export_adapter", "export_merged"])
def test_nothing_is_overwritten(what: str, tmp_path: Path) -> None:
    chain = attach(tiny_llama())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="already exists"):
        getattr(chain, what)(tmp_path / "mine")
    assert snapshot(tmp_path) == before
    getattr(chain, what)(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_generation_settings_that_contradict_each_other_are_kept(tmp_path: Path) -> None:
    """transformers loads such a model, and refuses to save it."""
    from transformers import AutoModelForCausalLM

    model: Any = tiny_llama()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "theirs")
    chain = attach(model, r=2)
    with pytest.warns(Note, match=r"settings contradict each other, and are written as they are \(.*temperature"):
        chain.export_merged(tmp_path / "merged")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for settings in (loaded.generation_config, model.generation_config):
        assert (settings.do_sample, settings.temperature) == (False, 0.6)


def test_what_cannot_be_saved_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model: Any = tiny_llama()
    chain = attach(model, r=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.init_kwargs["odd"] = object()  # JSON has none
    with pytest.raises(UserError, match=r"merged was not written: transformers cannot save this tokenizer \(.*JSON"):
        chain.export_merged(tmp_path / "merged", tokenizer)
    with pytest.raises(UserError, match="tokenizer is 'gpt2', but must be one of transformers, or None"):
        chain.export_merged(tmp_path / "merged", "gpt2")
    model.config.odd = object()
    with pytest.raises(UserError, match=r"merged was not written: transformers cannot save this model \("):
        chain.export_merged(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_something_to_export(tmp_path: Path) -> None:
    chain = attach(tiny_llama(), r=2)
    chain.save(tmp_path / "run")
    empty = load_chain(tiny_llama(), tmp_path / "run", links=0)
    with pytest.raises(UserError, match="no link to export"):
        empty.export_adapter(tmp_path / "adapter")
    plain = attach(nn.Sequential(nn.Linear(8, 8)), targets=["0"], r=2)
    with pytest.raises(UserError, match=r"is a transformers checkpoint, but the model is a Sequential"):
        plain.export_merged(tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_peft_loads_what_does_not_generate(tmp_path: Path, ids: Tensor) -> None:
    """An encoder's adapter, and one of a decoder that classifies."""
    from peft import PeftModel
    from transformers import BertConfig, BertModel, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertModel(BertConfig(vocab_size=64, **sizes)).eval()
    llama = LlamaForSequenceClassification(tiny_llama().config).eval()
    for name, model, targets in (("bert", bert, ["query", "value"]), ("llama", llama, ["q_proj", "v_proj"])):
        plain = copy.deepcopy(model)
        chain = attach(model, targets=targets, r=2)
        disturb(chain)
        chain.export_adapter(tmp_path / name)
        loaded = PeftModel.from_pretrained(plain, tmp_path / name).eval()
        torch.testing.assert_close(loaded(ids)[0], model(ids)[0])


def test_a_name_that_ends_another(tmp_path: Path) -> None:
    """PEFT applies a pattern to every module whose name ends with it."""
    from peft import PeftModel

    block = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "up": nn.Linear(8, 8), "block": block})
    plain = copy.deepcopy(model)
    chain = attach(model, targets=["fc", "up"], r=2, rank_pattern={"^fc": 4})
    disturb(chain)
    chain.export_adapter(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").base_model.model
    x = torch.randn(3, 8)
    for name in ("fc", "up", "block.fc"):
        torch.testing.assert_close(loaded.get_submodule(name)(x), model.get_submodule(name)(x))
    chain.save(tmp_path / "chain")


def test_format_round_trip() -> None:
    factors = {
        "a.x": Factors(torch.randn(2, 5), torch.randn(3, 2), 4.0),
        "b.x": Factors(torch.randn(1, 4), torch.randn(6, 1), 8.0),
        "c.x": Factors(torch.randn(2, 5), torch.randn(3, 2), 4.0),
    }
    fields: dict[str, Any] = {"targets": ["x"], "base_name": "m", "base_revision": None, "dropout": 0.0}
    files = encode(factors, **fields)
    assert files == encode(factors, **fields)  # the hash of a link depends on nothing else
    back = decode(files)
    for name, f in factors.items():
        assert torch.equal(back[name].a, f.a)
        assert torch.equal(back[name].b, f.b)
        assert back[name].scale == f.scale

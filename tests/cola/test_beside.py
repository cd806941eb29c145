"""What is trained beside the links: heads, embeddings, norms and the rows of new tokens. Nothing of it is lost."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from cola_fast import UserError, attach, load_chain
from cola_fast import train as train_run
from cola_fast.commands.report import describe, dry_run
from cola_fast.config import load
from cola_fast.layers.trained_modules import settled

from ..conftest import snapshot, tiny_llama

LABELS = 3
NEW = (64, 65)  # tokens


def classifier(seed: int = 0) -> nn.Module:
    """A tiny Llama whose backbone is always the same, and whose head is fresh: another one for every seed."""
    backbone = tiny_llama()
    config = copy.deepcopy(backbone.config)
    config.num_labels = LABELS
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(backbone.model.state_dict())
    return model.eval()


def with_tokens(seed: int = 0, **keys: Any) -> nn.Module:
    """With room for two new tokens, which start at random."""
    model = tiny_llama(**keys)
    torch.manual_seed(seed)
    model.resize_token_embeddings(66)
    return model.eval()


MAKERS: dict[str, Any] = {"head": classifier, "tokens": with_tokens}
HALF = ("half", "half-tied", "half-rows")  # in bf16
ALSO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model, its keys, attach's keys
    "head": ("head", {}, {"train_also": "score"}),
    "head-and-norms": ("head", {}, {"train_also": ("score", "input_layernorm")}),
    "half": ("head", {}, {"train_also": ("score", "norm", "embed_tokens")}),
    "half-tied": ("tokens", {"tie_word_embeddings": True}, {"train_also": "lm_head"}),
    "half-rows": ("tokens", {}, {"train_tokens": NEW}),
    "embeddings": ("tokens", {}, {"train_also": ("embed_tokens", "lm_head")}),
    "tied-embeddings": ("tokens", {"tie_word_embeddings": True}, {"train_also": "embed_tokens"}),
    "rows": ("tokens", {}, {"train_tokens": NEW}),
    "tied-rows": ("tokens", {"tie_word_embeddings": True}, {"train_tokens": NEW}),
}
EXACT = {what: 0.05 if what in HALF else 1e-5 for what in ALSO}  # a product in another order, rounded to 16 bits
every = pytest.mark.parametrize("what", ALSO)


def made(what: str, seed: int = 0) -> nn.Module:
    maker, keys, _ = ALSO[what]
    model: nn.Module = MAKERS[maker](seed, **keys)
    return model.bfloat16() if what in HALF else model


def attached(what: str, seed: int = 0) -> Any:
    return attach(made(what, seed), r=2, alpha=4, **ALSO[what][2])


IDS = torch.tensor([[5, 64, 9, 12, 3], [7, 8, 65, 64, 1]])


def ids(what: str) -> Tensor:
    return IDS if ALSO[what][0] == "tokens" else IDS % 64


@torch.no_grad()
def logits(model: nn.Module, what: str) -> Tensor:
    found: Tensor = model(ids(what)).logits
    return found.float()


def train(chain: Any, what: str, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.02)
    for _ in range(steps):
        output = chain.model(ids(what)).logits
        (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(what: str, folder: Path) -> Any:
    """Two sealed links and an open one, in a folder."""
    chain = attached(what)
    for k in range(2):
        train(chain, what, seed=k)
        if k == 0:
            chain.save(folder)
        chain.tie()
        chain.extend()
    train(chain, what, seed=7)
    chain.save(folder)
    return chain


@every
def test_attaching_changes_nothing_and_detaching_leaves_plain_modules(what: str) -> None:
    model = made(what)
    before, kinds = logits(model, what), {name: type(m) for name, m in model.named_modules()}
    chain = attached(what)
    assert float((logits(chain.model, what) - before).abs().max()) < EXACT[what]
    train(chain, what)
    chain.tie()
    after = logits(chain.model, what)
    assert not torch.equal(after, before)
    found = chain.detach()
    assert {name: type(m) for name, m in found.named_modules()} == kinds
    assert {k: (v.shape, v.dtype) for k, v in found.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert float((logits(found, what) - after).abs().max()) < EXACT[what]
    assert all(p.requires_grad for p in found.parameters())


@every
def test_a_fresh_start_of_another_process_does_not_matter(what: str, tmp_path: Path) -> None:
    """The head, or the new rows, that the next process draws are others; the chain has its own."""
    chain = trained(what, tmp_path / "run")
    live = logits(chain.model, what)
    again = load_chain(made(what, seed=1), tmp_path / "run")
    assert torch.equal(logits(again.model, what), live)
    values = again.beside.values()
    assert all(torch.equal(value, values[name]) for name, value in chain.beside.values().items())
    for links in (0, 1):
        early = load_chain(made(what, seed=2), tmp_path / "run", links=links)
        expected = chain.beside.start if links == 0 else chain.links[0].also()
        assert all(torch.equal(value, expected[name].to(value)) for name, value in early.beside.values().items())
    train(again, what, seed=9)
    train(chain, what, seed=9)
    chain.folder = None  # two chains, one folder
    assert chain.tie().sha256 == again.tie().sha256
    assert torch.equal(logits(chain.model, what), logits(again.model, what))


def test_only_the_rows_of_new_tokens_change() -> None:
    for tied in (False, True):
        what = "tied-rows" if tied else "rows"
        before = {k: v.clone() for k, v in made(what).state_dict().items()}
        chain = attached(what)
        train(chain, what)
        after = settled(chain.model, chain.model.state_dict())
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
            assert changed == list(NEW)
        trained = sum(p.numel() for _, p in chain.beside.named_parameters())
        assert trained == (1 if tied else 2) * len(NEW) * 32


def test_small_steps_of_a_16_bit_head_add_up() -> None:
    chain = attached("half")
    start = chain.beside.values()["score.weight"].clone()
    optimizer = torch.optim.SGD(chain.parameters(), lr=1.0)
    for _ in range(64):
        for p in chain.parameters():
            p.grad = torch.full_like(p, 2.0**-16)
        optimizer.step()
    moved = chain.beside.values()["score.weight"] - start
    assert torch.allclose(moved, torch.full_like(moved, -(2.0**-10)), rtol=1e-2)
    assert chain.model.score(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


LOADER = """
import json, sys
from pathlib import Path
import torch, transformers
from peft import PeftModel
from tests.cola.test_beside import ALSO, HALF, logits, made
for what in ALSO:
    folder = Path(sys.argv[1], what)
    model = PeftModel.from_pretrained(made(what, seed=5), folder / "adapter").eval()
    kind = getattr(transformers, json.loads((folder / "merged" / "config.json").read_text())["architectures"][0])
    dtype = torch.bfloat16 if what in HALF else torch.float32
    merged = kind.from_pretrained(folder / "merged", dtype=dtype).eval()
    torch.save([logits(model, what), logits(merged, what)], folder / "logits.pt")
"""


def test_peft_and_transformers_load_it_in_a_new_process(tmp_path: Path) -> None:
    live = {}
    for what in ALSO:
        chain = trained(what, tmp_path / what / "run")
        live[what] = logits(chain.model, what)
        chain.export_adapter(tmp_path / what / "adapter")
        chain.export_merged(tmp_path / what / "merged")
        assert torch.equal(logits(chain.model, what), live[what])
    subprocess.run([sys.executable, "-c", LOADER, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    for what, expected in live.items():
        adapter, merged = torch.load(tmp_path / what / "logits.pt")
        tolerance = 0.02 if what in HALF else 1e-5  # 16 bits: links that are in the weights, or beside them
        assert float((adapter - expected).norm() / expected.norm()) < tolerance, what
        assert float((merged - expected).norm() / expected.norm()) < tolerance, what
        config = json.loads((tmp_path / what / "adapter" / "adapter_config.json").read_text())
        assert config["modules_to_save"] or config["trainable_token_indices"]


def test_each_link_is_an_adapter_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    chain = attached("head")
    train(chain, "head")
    chain.save(tmp_path / "run")
    chain.tie()
    peft = PeftModel.from_pretrained(classifier(seed=3), tmp_path / "run" / "links" / "000")
    assert torch.allclose(logits(peft, "head"), logits(chain.model, "head"), atol=1e-5)


def test_an_imported_adapter_keeps_the_head(tmp_path: Path) -> None:
    other = attach(classifier(), r=2)
    other.export_adapter(tmp_path / "adapter")
    chain = attached("head")
    chain.model.score.weight.data.add_(1.0)
    link = chain.import_adapter(tmp_path / "adapter")
    assert torch.equal(link.also()["score.weight"], chain.model.score.weight)


@every
def test_copied_and_pickled(what: str) -> None:
    chain = attached(what)
    train(chain, what)
    live = logits(chain.model, what)
    copied = copy.deepcopy(chain.model)
    for other in (copied, pickle.loads(pickle.dumps(chain.model))):
        assert float((logits(other, what) - live).abs().max()) < EXACT[what]
    for p in copied.parameters():
        p.data.add_(1.0)
    assert torch.equal(logits(chain.model, what), live)


# --- what is not kept is refused --------------------------------------------------------------------------------------


def test_what_is_unfrozen_by_hand_is_refused(tmp_path: Path) -> None:
    chain = attach(classifier(), r=2)
    chain.save(tmp_path / "run")
    before = snapshot(tmp_path)
    chain.model.score.weight.requires_grad_(True)
    actions = (chain.tie, lambda: chain.save(tmp_path / "run"), lambda: chain.export_adapter(tmp_path / "adapter"))
    for action in actions:
        with pytest.raises(UserError, match=r"score.weight is trained too .*train_also=\('score',\)"):
            action()
    with torch.no_grad():
        chain.model.score.weight.add_(0.5)
    chain.model.score.weight.requires_grad_(False)  # trained, and frozen again
    for action in actions:
        with pytest.raises(UserError, match=r"score.weight is not as it was when the chain was attached"):
            action()
    assert snapshot(tmp_path) == before
    chain.export_merged(tmp_path / "merged")  # what the model is
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["score.weight"], chain.model.score.weight)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.q_proj(x))
        return out


def test_running_statistics_count_as_trained(tmp_path: Path) -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    chain = attach(Normed(), r=2, targets="q_proj")
    chain.model.train()(x)
    with pytest.raises(UserError, match=r"norm.running_mean is not as it was"):
        chain.save(tmp_path / "run")
    chain = attach(Normed(), r=2, targets="q_proj", train_also="norm")
    chain.model.train()(x)
    chain.save(tmp_path / "run")
    again = load_chain(Normed(), tmp_path / "run")
    assert torch.equal(again.model.eval()(x), chain.model.eval()(x))


def test_embeddings_that_are_resized_afterwards_are_refused(tmp_path: Path) -> None:
    chain = attach(tiny_llama(), r=2)
    chain.model.resize_token_embeddings(66)
    with pytest.raises(UserError, match=r"is trained too|is not as it was"):
        chain.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"train_also": "scores"}, "train_also name 'scores' matches no module. Did you mean score"),
        ({"train_also": "score.weight"}, "score.weight, which is a parameter: name its module, score"),
        ({"train_also": 3}, "train_also is 3, but must be the name of a module, or a list of names"),
        ({"train_also": ["q_proj"]}, "q_proj is a target of the chain and in train_also"),
        ({"train_also": ["act_fn"]}, "without parameters"),
        ({"train_tokens": [64]}, "train_tokens has 64, but the model's embeddings have 64 rows: call "),
        ({"train_tokens": [-1]}, "train_tokens has -1"),
        ({"train_tokens": "64"}, "train_tokens is '64', but must be a list of token numbers"),
        ({"train_tokens": [1], "train_also": "embed_tokens"}, "train_also trains whole: leave one of them out"),
    ],
)
def test_what_cannot_be_trained(keys: dict[str, Any], sentence: str) -> None:
    model = classifier()
    before = {name: (type(m), m.training) for name, m in model.named_modules()}
    with pytest.raises(UserError) as caught:
        attach(model, r=2, **keys)
    assert sentence in str(caught.value)
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == before


def test_4_bit_modules_cannot_be_trained(load_nf4: Any) -> None:
    with pytest.raises(UserError, match="is quantised and cannot be trained"):
        attach(load_nf4(), r=2, targets="q_proj", train_also="k_proj")


@pytest.mark.parametrize("problem", ["labels", "no-head", "start", "start-lost"])
def test_a_model_or_file_that_does_not_fit(problem: str, tmp_path: Path) -> None:
    chain = attached("head")
    train(chain, "head")
    chain.save(tmp_path / "run")
    chain.tie()
    model, sentence = classifier(), "start.safetensors"
    if problem == "labels":
        model.score, sentence = nn.Linear(32, 5, bias=False), r"score.weight.*but the model has \[5, 32\]"
    elif problem == "no-head":
        model, sentence = tiny_llama(), "this model has no module of that name"
    elif problem == "start":
        path = tmp_path / "run" / "start.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        (tmp_path / "run" / "start.safetensors").unlink()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(UserError, match=sentence):
        load_chain(model, tmp_path / "run")
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_a_head_that_nothing_trains_is_told_of() -> None:
    with pytest.warns(UserWarning, match=r"score is frozen: .* attach with train_also=\('score',\)"):
        attach(classifier(), r=2)
    for keys in ({"train_also": "score"}, {"targets": ["score", "q_proj"]}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(classifier(), r=2, **keys)  # type: ignore[arg-type]


def test_all_linear_leaves_what_is_trained_whole() -> None:
    chain = attach(tiny_llama(), r=2, targets="all-linear", train_also="mlp")
    assert not any("mlp" in name for name in chain.layers)
    assert {n.rpartition(".")[2] for n in chain.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_it_is_counted_and_shown(config_file: Callable[..., str], tmp_path: Path) -> None:
    path = config_file(chain__train_also=["norm"], chain__train_tokens=[5, 6], schedule__links=1, schedule__steps=1)
    told = dry_run(load(path))
    links = sum(p.numel() for p in attach(tiny_llama(), r=2).parameters())
    assert f"{links + 32 + 2 * 2 * 32:,} trainable parameters" in told
    assert "of them 32 beside the links, model.norm.weight" in told
    assert "of them 64 beside the links, lm_head.token_rows" in told
    train_run(load(path), quiet=True)
    assert "beside   model.norm, the rows of 2 tokens" in describe(tmp_path / "run")
    chain = load_chain(tiny_llama(), tmp_path / "run")
    assert "beside   model.norm, rows of 2 tokens: 160 trained whole" in repr(chain)
    assert "norm" not in repr(chain).split("beside")[0].replace("layernorm", "")


@every
def test_other_people_s_saves_hold_it(what: str, tmp_path: Path) -> None:
    chain = attached(what)
    train(chain, what)
    live = logits(chain.model, what)
    chain.model.save_pretrained(tmp_path / "saved")
    dtype = torch.bfloat16 if what in HALF else torch.float32
    read = type(made(what)).from_pretrained(tmp_path / "saved", dtype=dtype).eval()  # type: ignore[attr-defined]
    difference = float((logits(read, what) - live).norm() / live.norm())
    assert difference < (0.02 if what in HALF else 1e-5)

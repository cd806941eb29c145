"""A chain's folder: what load_chain refuses, what it falls back to, and what the record says."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_fast import UserError, attach, load_chain, store
from cola_fast.errors import Note
from cola_fast.layers.layer import LoRALinear
from cola_kernels import merge_

from ..conftest import disturb, snapshot, tiny_llama
from .test_chain import logits, relative


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    chain = attach(tiny_llama(), r=2)
    chain.save(tmp_path / "run")
    for k in range(2):
        disturb(chain, seed=k)
        chain.tie()
        chain.extend()
    chain.save(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", ["truncate", "edit", "remove"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_link_is_named_and_the_model_untouched(saved: Path, damage: str, file: str) -> None:
    path = saved / "links" / "001" / file
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if damage == "truncate" else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    model = tiny_llama()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match=rf"links/001/{file} is (not the file|missing)"):
        load_chain(model, saved)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="this model's weights differ"):
        load_chain(tiny_llama(seed=1), saved)


def test_a_model_with_tied_links_is_refused(saved: Path) -> None:
    """Folding twice is the one mistake that would be silent."""
    model = tiny_llama()
    load_chain(model, saved).detach()
    with pytest.raises(UserError, match="already"):
        load_chain(model, saved)


def test_a_chain_may_be_loaded_in_another_dtype(saved: Path, ids: Tensor) -> None:
    wide, narrow = tiny_llama(), tiny_llama(dtype=torch.bfloat16)
    load_chain(wide, saved)
    load_chain(narrow, saved)
    assert relative(logits(narrow, ids), logits(wide, ids)) < 0.05


def test_an_earlier_point_can_be_looked_at_but_not_written(saved: Path, ids: Tensor) -> None:
    before = snapshot(saved)
    model = tiny_llama()
    chain = load_chain(model, saved, links=1)
    assert (len(chain.links), chain.open_link) == (1, None)
    whole = tiny_llama()
    load_chain(whole, saved)
    chain.replay(1)
    assert torch.equal(logits(model, ids), logits(whole, ids))
    earlier = load_chain(tiny_llama(), saved, links=1)
    earlier.extend()
    with pytest.raises(UserError, match="earlier point"):
        earlier.tie()
    with pytest.raises(UserError, match="earlier point"):
        earlier.save(saved)
    with pytest.raises(UserError, match="links=3"):
        load_chain(tiny_llama(), saved, links=3)
    assert snapshot(saved) == before


@pytest.mark.parametrize("how", ["flip", "cut", "renamed", "removed", "all removed"])
def test_a_state_that_is_damaged_is_not_replaced_in_silence(saved: Path, how: str) -> None:
    """The one before it holds the open link as it was earlier."""
    load_chain(tiny_llama(), saved).save(saved)  # now two states of link 2
    newest = sorted((saved / "state").iterdir())[-1]
    data = newest.read_bytes()
    if how == "flip":
        newest.write_bytes(data[:2000] + bytes([data[2000] ^ 4]) + data[2001:])
    elif how == "cut":
        newest.write_bytes(data[:100])
    elif how == "renamed":
        newest.rename(newest.with_name(f"00000009-{'0' * 16}.pt"))
    elif how == "removed":
        newest.unlink()
    else:
        shutil.rmtree(saved / "state")
    with pytest.raises(UserError, match=r"(is damaged|is missing).* The open link was in it: restore it"):
        load_chain(tiny_llama(), saved)
    assert load_chain(tiny_llama(), saved, links=2).open_link is None


@pytest.mark.parametrize("changes", [{"seed": 1}, {"alpha": 32}, {"dropout": 0.1}, {"r": 3}])
def test_a_state_of_another_chain_is_refused(saved: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    other = attach(tiny_llama(), **{"r": 2, **changes})
    other.save(tmp_path / "other")
    for _ in range(2):
        disturb(other)
        other.tie()
        other.extend()
    other.save(tmp_path / "other")
    shutil.rmtree(saved / "state")
    shutil.copytree(tmp_path / "other" / "state", saved / "state")
    with pytest.raises(UserError, match=r"state/\S+ belongs to another chain\. The open link was in it"):
        load_chain(tiny_llama(), saved)


def test_only_two_states_are_kept(model: nn.Module, tmp_path: Path) -> None:
    chain = attach(model)
    for _ in range(5):
        chain.save(tmp_path)
    assert [p.name[:9] for p in sorted((tmp_path / "state").iterdir())] == ["00000003-", "00000004-"]


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another dropout": lambda r: r.update(dropout=0.5),
    "another alpha": lambda r: r.update(alpha=1.0),
    "another seed": lambda r: r.update(seed=7),
    "no links": lambda r: r.update(links=[]),
    "a link twice": lambda r: r["links"].append(r["links"][1]),
    "links in another order": lambda r: r["links"].reverse(),
    "a module's name": lambda r: r["modules"].update({"model.layers.1.self_attn.w_proj": r["modules"].popitem()[1]}),
    "what a fold kept": lambda r: r["links"][0]["fold"].update(retained=0.5),
    "no checksum": lambda r: r.pop("sha256"),
    "another format": lambda r: r.update(format=1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_record_that_was_changed_is_refused(saved: Path, edit: str) -> None:
    path = saved / "chain.json"
    record = json.loads(path.read_text())
    EDITS[edit](record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"chain.json (is not what was written|has lost its checksum)"):
        load_chain(tiny_llama(), saved)


RESEALED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a link twice": (lambda r: r["links"].append(r["links"][1]), "link 2: its index is 1"),
    "a module of no link": (
        lambda r: r["modules"].pop("model.layers.0.self_attn.q_proj"),
        "modules that the chain has",
    ),
    "a folder elsewhere": (lambda r: r["links"][0].update(folder="../../elsewhere"), "its folder is"),
    "a file elsewhere": (lambda r: r["links"][0].update(sha256={"../x": "0" * 64}), "sha256 does not name"),
    "links as a mapping": (lambda r: r.update(links={}), "links is no list"),
    "a rank as text": (lambda r: r.update(r="2"), "r is no rank"),
    "an infinite alpha": (lambda r: r.update(alpha=float("inf")), "alpha is no number"),
    "an unknown init": (lambda r: r.update(init="magic", open=None), "magic"),
    "an open link too far": (lambda r: r.update(open=7), "link 7 is said to be open"),
    "other ranks": (
        lambda r: r["links"][0]["ranks"].update({"model.layers.0.self_attn.q_proj": 1}),
        "do not agree on the modules and ranks of link 0",
    ),
}


@pytest.mark.parametrize("edit", RESEALED)
def test_a_record_that_no_chain_has_is_refused(saved: Path, edit: str) -> None:
    """Its checksum is right: somebody has made it."""
    path = saved / "chain.json"
    record = store.read_sealed(path)[0]
    change, sentence = RESEALED[edit]
    change(record)
    store.write_sealed(path, record)
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_chain(tiny_llama(), saved)


def test_a_folder_of_an_earlier_version_is_read_with_a_note(saved: Path, ids: Tensor) -> None:
    """Format 1 had no checksums."""
    model = tiny_llama()
    load_chain(model, saved)
    record = store.read_sealed(saved / "chain.json")[0]
    for key in ("open", "state", "about"):
        del record[key]
    (saved / "chain.json").write_text(json.dumps({**record, "format": 1}))
    for number, path in enumerate(sorted((saved / "state").iterdir())):
        state = torch.load(path)
        del state["chain"]
        path.unlink()
        torch.save(state, saved / "state" / f"{number:08d}.pt")
    old = tiny_llama()
    with pytest.warns(Note) as notes:
        chain = load_chain(old, saved)
    said = sorted(str(n.message) for n in notes)
    assert [("chain.json" in said[0], ".pt" in said[1]), len(said)] == [(True, True), 2]
    assert torch.equal(logits(old, ids), logits(model, ids))
    chain.save(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_chain(tiny_llama(), saved)
    assert len(again.links) == 2


def test_another_chain_in_the_folder_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="already holds a chain"):
        attach(tiny_llama()).save(saved)


@pytest.mark.parametrize("content", ['{"format": 99}', "[]", "{", None], ids=["newer", "list", "cut", "absent"])
def test_unreadable_chain_files(saved: Path, content: str | None) -> None:
    path = saved / "chain.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"chain.json (has format|is damaged|is missing)"):
        load_chain(tiny_llama(), saved)


def test_a_chain_stays_where_it_was_saved(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder was relative, and the process has moved."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    chain = attach(model)
    chain.save("run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    disturb(chain)
    chain.tie()
    chain.extend()
    assert not any((tmp_path / "elsewhere").iterdir())
    monkeypatch.chdir(tmp_path)
    loaded = load_chain(tiny_llama(), "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded.extend()
    loaded.tie()
    assert len(load_chain(tiny_llama(), tmp_path / "run").links) == 2
    for export in (chain.export_adapter, chain.export_merged):
        with pytest.raises(UserError, match="elsewhere is the folder you are in"):
            export(".")


def test_a_chain_on_many_modules_is_loaded(tmp_path: Path) -> None:
    """Forty blocks: all names together are longer than any pattern that is taken."""
    chain = attach(tiny_llama(num_hidden_layers=40), r=1, targets="all-linear")
    chain.save(tmp_path / "run")
    assert load_chain(tiny_llama(num_hidden_layers=40), tmp_path / "run").layers.keys() == chain.layers.keys()


def test_a_saved_chain_can_move(saved: Path, tmp_path: Path, ids: Tensor) -> None:
    here = tiny_llama()
    load_chain(here, saved)
    shutil.move(saved, tmp_path / "elsewhere")
    there = tiny_llama()
    load_chain(there, tmp_path / "elsewhere")
    assert torch.equal(logits(here, ids), logits(there, ids))


def test_the_record_says_what_the_fold_kept(saved: Path) -> None:
    record = json.loads((saved / "chain.json").read_text())
    assert [entry["index"] for entry in record["links"]] == [0, 1]
    assert all(entry["fold"]["retained"] == pytest.approx(1, abs=1e-5) for entry in record["links"])


def test_report_measures_what_was_lost() -> None:
    """An update below half a bf16 spacing is lost by nearest rounding; stochastic rounding keeps it in expectation."""
    weight = torch.ones(256, 256, dtype=torch.bfloat16)
    a, b = torch.ones(1, 256), torch.full((256, 1), 2**-10)
    kept = {r: merge_(weight.clone(), a, b, 1.0, rounding=r, report=True) for r in ("nearest", "stochastic")}
    assert kept["nearest"] == (0.0, 1.0)
    # 65,536 draws that move by 2**-7 with probability 1/8: standard deviation of the mean sqrt(7) / 256
    assert abs(kept["stochastic"].retained - 1) < 4 * 7**0.5 / 256

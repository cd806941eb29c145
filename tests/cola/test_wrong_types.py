"""Whatever is given as an argument from Python, what is wrong with it is one sentence, and the model is as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cola_fast import ChainCallback, UserError, attach, load_chain
from cola_fast.layers.layer import LoRALinear

from ..conftest import snapshot, tiny_llama

WRONG: list[Any] = [
    None, True, -1, 3.5, float("nan"), 10**400, "x", "a\0b", b"x", [], [1], [[]], ["q"], {}, {"a": 1}, {"q_proj": "x"},
    {"q_proj"}, (1, 2), object(), torch.ones(2), print, nn.Linear(2, 2), Path("nowhere"),
]  # fmt: skip


def refusals(call: Callable[[Any], Any]) -> list[str]:
    """The sentences. What is no UserError is not caught."""
    sentences = []
    for wrong in WRONG:
        with suppress(UserError), noting(sentences):
            call(wrong)
    assert all(len(sentence) < 900 for sentence in sentences)
    return sentences


@contextmanager
def noting(sentences: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        sentences.append(str(error))
        raise


@pytest.mark.parametrize("key", inspect.signature(attach).parameters)
def test_attach(key: str) -> None:
    def call(wrong: Any) -> None:
        model = wrong if key == "model" else tiny_llama()
        try:
            attach(model, **{} if key == "model" else {key: wrong})
        except UserError:
            assert not isinstance(model, nn.Module) or not any(isinstance(m, LoRALinear) for m in model.modules())
            raise

    assert len(refusals(call)) > len(WRONG) / 2


@pytest.mark.parametrize("key", ["r", "rank_pattern", "batches", "original"])
def test_extend(model: nn.Module, key: str) -> None:
    chain = attach(model)
    chain.tie()

    def call(wrong: Any) -> None:
        chain.extend(**{key: wrong})
        chain.tie()

    assert len(refusals(call)) > len(WRONG) / 2
    assert chain.open_link is None


@pytest.mark.parametrize("key", ["model", "folder", "links"])
def test_load_chain(key: str, tmp_path: Path) -> None:
    attach(tiny_llama()).save(tmp_path / "run")
    before = snapshot(tmp_path)
    right = {"folder": tmp_path / "run"}
    sentences = refusals(lambda wrong: load_chain(**{"model": tiny_llama(), **right, key: wrong}))
    assert len(sentences) >= len(WRONG) - 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("key", ["chain", "links", "method", "shares", "ranks", "lr_span", "optimizer_state"])
def test_the_callback(model: nn.Module, key: str) -> None:
    """Its sentences speak of its own arguments."""
    chain = attach(model)

    sentences = refusals(lambda wrong: ChainCallback(**{"chain": chain, key: wrong}))
    assert len(sentences) >= len(WRONG) - 2
    assert all(sentence.startswith((f"{key} is ", f"{key} has ", f"{key}[0] is ")) for sentence in sentences)


@pytest.mark.parametrize("method", ["save", "export_adapter", "export_merged", "import_adapter"])
def test_folders(model: nn.Module, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chain = attach(model)
    assert len(refusals(getattr(chain, method))) >= len(WRONG) - 2  # "x" and a path are folders


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: attach(tiny_llama(), init=["pissa"]), r"^init is \['pissa'\], but must be one of gaussian"),
        (lambda: attach(tiny_llama(), gate="dorra"), r"^gate is 'dorra', but must be one of .* Did you mean dora"),
        (lambda: attach(tiny_llama(), alpha="16"), r"^alpha is '16', but it must be a finite number"),
        (lambda: attach(tiny_llama(), seed="1"), r"^seed is '1', but must be a whole number"),
        (lambda: attach(tiny_llama(), batches=3), r"^batches is a int of int, but must be a list"),
        (lambda: attach(tiny_llama(), original="x"), r"^original is 'x', but must be the 16-bit model"),
        (lambda: attach(tiny_llama()).save(3), r"^3 is no path: give a folder"),
        (lambda: attach(tiny_llama()).save("run", extra=[1]), r"^extra is \[1\], but must be a mapping"),
        (
            lambda: ChainCallback(tiny_llama()),
            r"^chain is LlamaForCausalLM.*, but must be what .*attach",
        ),
        (lambda: ChainCallback(attach(tiny_llama()), links="3"), r"^links is '3' \(str\), but must be a whole number"),
    ],
    ids=["init", "gate", "alpha", "seed", "batches", "original", "folder", "extra", "chain", "links"],
)
def test_sentences(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        call()

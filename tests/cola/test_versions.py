"""Versions of other libraries that no test covers are refused in one sentence, before anything changes."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from cola_fast import ChainCallback, UserError, accelerate_peft, attach
from cola_fast.config import ModelConfig
from cola_fast.training.models import load_model

from .conftest import tiny_llama


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda version: monkeypatch.setattr(importlib.metadata, "version", lambda package: version)


@pytest.mark.parametrize("version", ["0.3.0", "0.99.1"])
def test_peft(version: str, installed: Any) -> None:
    model = tiny_llama()
    installed(version)
    with pytest.raises(UserError, match=rf"is tested with peft 0.19 to 0.21, but {version} is installed: pip install"):
        accelerate_peft(model)


def test_transformers(installed: Any) -> None:
    chain = attach(tiny_llama(), r=2)
    installed("4.57.1")
    sentence = r"is tested with transformers 5.17 to .*, but 4.57.1 is installed: pip install"
    with pytest.raises(UserError, match=sentence):
        ChainCallback(chain)
    with pytest.raises(UserError, match=sentence):
        load_model(ModelConfig(name="anything"))


def test_a_newer_transformers_is_let_through(installed: Any) -> None:
    chain = attach(tiny_llama(), r=2)
    installed("5.99.0")
    ChainCallback(chain, links=2)


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="needs peft, which is not installed"):
        accelerate_peft(tiny_llama())

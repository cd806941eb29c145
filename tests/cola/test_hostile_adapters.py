"""Adapters that nobody should fold: one sentence, and nothing has changed, in memory or on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola_fast import attach
from cola_fast.chain.adapters import read_adapter

from ..conftest import tiny_llama
from .test_adapters import ADAPTERS, refused, save_adapter

Tensors = dict[str, Tensor]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def filled(key: str, value: float) -> Callable[[Tensors], Tensors]:
    return lambda t: {**t, key: torch.full_like(t[key], value)}


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "nan in A": (filled(A, float("nan")), r"q_proj in .* holds NaN or infinite numbers"),
    "infinite in B": (filled(B, float("inf")), r"q_proj in .* holds NaN or infinite numbers"),
    "an update that overflows": (
        lambda t: filled(A, 1e30)(filled(B, 1e30)(t)),
        r"larger ones than the model",
    ),
    "a scale that overflows": (filled(B, 3e38), r"larger ones than the model"),
    "B without its A": (
        lambda t: {k: v for k, v in t.items() if k != A},
        r"lora_B.weight, without lora_A, which",
    ),
    "A without its B": (
        lambda t: {k: v for k, v in t.items() if k != B},
        r"lora_A.weight, without lora_B, which",
    ),
    "whole numbers": (
        lambda t: {**t, A: t[A].to(torch.int8)},
        r"are torch.int8 and torch.float32, but must",
    ),
    "complex numbers": (lambda t: {**t, B: t[B].to(torch.complex64)}, r"torch.complex64, but must be floating"),
    "one number": (lambda t: {**t, A: torch.ones(())}, r"are \[\] and \[32, 4\], no pair"),
    "three dimensions": (lambda t: {**t, A: t[A][None]}, r"no pair"),
    "no rank": (lambda t: {**t, A: torch.ones(0, 32), B: torch.ones(32, 0)}, r"are \[0, 32\] and \[32, 0\], no pair"),
    "another rank": (lambda t: {**t, A: t[A][:1].clone(), B: t[B][:, :1].clone()}, r"have rank 1, but .* says 4"),
    "another name": (lambda t: {**t, "x" * 500: t[A].clone()}, r"holds xxx.*, which is no LoRA factor"),
    "no tensors": (lambda t: {}, r"has no LoRA factors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors(case: str, ids: Tensor, tmp_path: Path) -> None:
    edit, sentence = TENSORS[case]
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    refused(tmp_path, sentence, ids)


CONFIGURATIONS: dict[str, tuple[Any, str]] = {
    "a list": ([], r"adapter_config.json holds \[\], but must be a mapping"),
    "null": (None, r"holds None, but must be a mapping"),
    "alpha infinite": ({"lora_alpha": float("inf")}, r"has lora_alpha inf, but must have a finite number"),
    "alpha nan": ({"lora_alpha": float("nan")}, r"has lora_alpha nan, but"),
    "alpha huge": ({"lora_alpha": 1e300}, r"larger ones than the model"),
    "alpha endless": ({"lora_alpha": 10**400}, r"has lora_alpha a whole number of 1329 bits, but"),
    "alpha as text": ({"lora_alpha": "16"}, r"has lora_alpha '16', but must have a finite number"),
    "alpha as a list": ({"lora_alpha": [16]}, r"has lora_alpha \[16\], but"),
    "alpha true": ({"lora_alpha": True}, r"has lora_alpha True, but"),
    "alpha null": ({"lora_alpha": None}, r"has lora_alpha None, but"),
    "rank as text": ({"r": "4"}, r"has r '4', but"),
    "another rank": ({"r": 8}, r"have rank 4, but adapter_config.json says 8: give the two files that belong"),
    "a rank pattern that is a list": ({"rank_pattern": ["q_proj"]}, r"rank_pattern \['q_proj'\], but must map"),
    "an alpha pattern that is text": ({"alpha_pattern": "q_proj"}, r"alpha_pattern 'q_proj', but must map"),
    "an alpha that is a list": ({"alpha_pattern": {"q_proj": [1]}}, r"has alpha_pattern 'q_proj' \[1\], but must have"),
    "an alpha that is infinite": ({"alpha_pattern": {"q_proj": float("inf")}}, r"has alpha_pattern 'q_proj' inf, but"),
    "a hostile pattern": (
        {"alpha_pattern": {"(?:" + "(?=.*.*.*.*x)|" * 60 + ".)*": 1}},
        r"has a pattern that cannot be looked for: it repeats repetitions, which takes too long",
    ),
    "a back reference": (
        {"alpha_pattern": {r"(.*)\1": 1}},
        r"a pattern that cannot be looked for: it uses groupref",
    ),
    "no pattern": (
        {"alpha_pattern": {"(q_proj": 1}},
        r"has '\(q_proj' in alpha_pattern, which is no pattern",
    ),
    "a group of the search's own": ({"alpha_pattern": {"q)(_proj": 1}}, r"in alpha_pattern, which is no pattern"),
    "a type that is a list": ({"peft_type": ["LORA"]}, r"is of type \['LORA'\], but"),
    "an init that is a list": ({"init_lora_weights": [1]}, r"was initialised with \[1\], which may"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_hostile_configurations(case: str, ids: Tensor, tmp_path: Path) -> None:
    edit, sentence = CONFIGURATIONS[case]
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit} if isinstance(edit, dict) else edit))
    refused(tmp_path, sentence, ids)


@pytest.mark.parametrize("text", ["[" * 50_000, "\xff", "9" * 5000, ""], ids=["deep", "latin", "digits", "nothing"])
def test_a_configuration_that_is_no_json(text: str, ids: Tensor, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    (tmp_path / "adapter" / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(tmp_path, r"adapter_config.json (cannot be read|is damaged)", ids)


def test_a_folder_in_the_place_of_a_file(ids: Tensor, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).unlink()
        (tmp_path / "adapter" / name).mkdir()
        refused(tmp_path, rf"{name} (is damaged|is no file)", ids)


def test_an_update_that_the_bases_dtype_cannot_hold(tmp_path: Path) -> None:
    """70,000 is a number in fp32, but infinite in fp16."""
    save_adapter(tmp_path / "adapter", **ADAPTERS["plain"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(filled(B, 70_000.0)(load_file(file)), file)
    attach(tiny_llama(), r=2).import_adapter(tmp_path / "adapter")
    model = tiny_llama(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"larger ones than the model's float16 can hold"):
        attach(model, r=2).import_adapter(tmp_path / "adapter")
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_unusual_numbers_that_are_fine(tmp_path: Path) -> None:
    """A negative alpha, and factors in 8 bits, are what they are."""
    save_adapter(tmp_path / "adapter", **{**ADAPTERS["plain"], "lora_alpha": -7})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value.to(torch.float8_e5m2) for key, value in load_file(file).items()}, file)
    assert {f.scale for f in read_adapter(tmp_path / "adapter").values()} == {-7 / 4}
    chain = attach(tiny_llama(), r=2)
    chain.import_adapter(tmp_path / "adapter")
    assert chain.links[0].factors()

"""Somebody's program, as a type checker sees it: tests/test_typed_client.py checks it beside the installed package.

A line with `type: ignore` is wrong on purpose. Strict checking refuses an ignore that hides nothing, so each of these
lines shows that the package's types arrive.
"""

from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import cola_fast
import cola_kernels


def train_by_hand(model: nn.Module, folder: Path) -> cola_fast.Chain:
    options = cola_fast.ChainOptions(r=8, alpha=16, targets=("q_proj",), dropout=0.05)
    chain = cola_fast.attach(model, options, seed=1)
    assert_type(chain, cola_fast.Chain)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-3)
    optimizer.step()
    link = chain.tie()
    assert_type(link.index, int)
    chain.extend(4)
    chain.save(folder)
    print(chain.export_adapter(folder / "adapter", rank=4), len(chain.links))
    assert_type(chain.detach(), nn.Module)
    return cola_fast.load_chain(model, folder)


def use_the_op(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    report = cola_kernels.merge_(weight, a, b, 2.0, rounding="stochastic", report=True)
    assert_type(report, cola_kernels.FoldReport | None)
    return cola_kernels.lora_linear(x, weight, a, b, 2.0, dropout=0.1)


def lend(model: nn.Module) -> None:
    report = cola_fast.accelerate_peft(model)
    print(report)
    report.undo()


def refused(error: cola_fast.UserError) -> ValueError:
    return error


def wrong(model: nn.Module) -> None:
    cola_fast.ChainOptions(r="8")  # type: ignore[arg-type]
    cola_fast.ChainOptions(rank=8)  # type: ignore[call-arg]
    cola_fast.attach(model, seed="8")  # type: ignore[arg-type]
    cola_fast.attach(model).knot()  # type: ignore[attr-defined]
    cola_kernels.merge_(model, 1.0)  # type: ignore[call-arg, arg-type]

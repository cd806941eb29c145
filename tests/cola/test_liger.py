"""liger-kernel's own kernels, in Triton's interpreter: the same loss, gradients and links as without them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cola_fast import attach, load_chain
from cola_fast.config import from_dict
from cola_fast.data.loss import batch_loss, needed_logits
from cola_fast.training import liger, trainer
from cola_fast.training.models import load_model

from ..conftest import disturb, tiny_llama


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter lacks for these kernels: floats as arguments, and the GPU's rsqrt."""
    pytest.importorskip("liger_kernel")
    if torch.cuda.is_available():
        # Triton then compiles for it, and the patches below are for the interpreter only
        pytest.skip("kernels are not interpreted beside a GPU")
    import liger_kernel.ops.rms_norm
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: 1 / tl.sqrt(x))


@pytest.fixture
def module() -> Iterator[Any]:
    """The module of Llama's classes, which must be left as it was."""
    names = vars(sys.modules[type(tiny_llama()).__module__])
    before = dict(names)
    yield before
    assert names == before


def test_the_same_loss_and_gradients(interpreted: None, module: Any) -> None:
    ids = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(4, 11)
    targets = ids[:, positions + 1].clone()
    targets[0, :4] = -100
    batch = SimpleNamespace(
        input_ids=ids, positions=positions, targets=targets, attention_mask=None, position_ids=None, labelled=17
    )
    model = tiny_llama().train()
    chain = attach(model, targets="all-linear", r=2)
    disturb(chain)
    plain = batch_loss(needed_logits(model, batch), batch)[0]
    expected = torch.autograd.grad(plain, chain.parameters())
    with liger.kernels(model):
        kinds = {m._get_name() for m in model.modules()}
        assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= kinds
        assert module["apply_rotary_pos_emb"] is not vars(sys.modules[type(model).__module__])["apply_rotary_pos_emb"]
        fused = liger.summed_loss(model, batch)
        found = torch.autograd.grad(fused, chain.parameters())
        with torch.no_grad():
            logits = needed_logits(model.eval(), batch)  # as evaluation asks for them
    assert float(fused) == pytest.approx(float(plain), rel=1e-5)
    assert float(batch_loss(logits, batch)[0]) == pytest.approx(float(plain), rel=1e-5)
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).norm()) <= 1e-4 * float(e.norm())


@pytest.mark.slow
def test_the_same_links(
    interpreted: None, module: Any, raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    raw_config["schedule"] |= {"links": 2, "steps": 2}
    raw_config["chain"] |= {"dropout": 0.0}
    raw_config["train"] |= {"batch_size": 2}
    raw_config["data"] |= {"eval": None, "eval_share": 0.0}
    heads: list[int] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        heads.extend([self.out_features] * self.training)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    chains = []
    monkeypatch.setattr(liger, "obstacle", lambda *_: None)
    for fused in (False, True):
        heads.clear()
        raw_config["train"] |= {"use_liger": fused}
        config = from_dict({**raw_config, "out": str(tmp_path / str(fused))})
        trainer.train(config, quiet=True)
        assert (64 in heads) == (not fused)  # the logits
        chains.append(load_chain(load_model(config.model), config.out))
    for one, other in zip(*(chain.links for chain in chains), strict=True):
        for name, f in one.factors().items():
            g = other.factors()[name]
            assert float((f.b @ f.a - g.b @ g.a).norm() / (f.b @ f.a).norm()) < 1e-3


@pytest.mark.parametrize(
    ("asked", "says"), [(True, "liger-kernel is off: the model is on no GPU\n"), (False, "")], ids=["on", "off"]
)
def test_off_with_a_note(
    asked: bool, says: str, raw_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw_config["schedule"] |= {"links": 1, "steps": 1}
    raw_config["train"] |= {"use_liger": asked}
    trainer.train(from_dict(raw_config))
    assert [line for line in capsys.readouterr().err.splitlines(keepends=True) if "liger" in line] == [says][
        : bool(says)
    ]


@pytest.mark.parametrize("problem", ["missing", "model", "head"])
def test_obstacles(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if problem != "missing":
        pytest.importorskip("liger_kernel")
    model: Any = tiny_llama()
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    if problem == "missing":
        monkeypatch.setattr(liger.importlib.util, "find_spec", lambda _: None)
    elif problem == "model":
        model.config.model_type = "abacus"
    else:
        model.lm_head = nn.Identity()
    says = {"missing": "pip install 'cola_fast[liger]'", "model": "for a abacus", "head": "is a Identity"}[problem]
    assert says in str(liger.obstacle(model))

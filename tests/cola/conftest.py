"""What several tests share: ways to run a group of layers, and a worker whose trainings can be killed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cola_kernels.autograd
from cola_fast.chain.bases import DenseBase
from cola_fast.layers import grouping
from cola_kernels import small

from ..conftest import tiny_llama


@pytest.fixture(params=["fused", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the fused op, and once with what a GPU runs where little is to do: nodes of PyTorch's own autograd."""
    if request.param == "fused":
        return
    fused = grouping.lora_linear_group

    def group(x: Tensor, *members: Any, dropout: float) -> tuple[Tensor, ...]:
        return fused(x, *members, dropout=dropout) if dropout else small.lora_linear_group(x, *members)

    def one(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Any, *, dropout: float) -> Tensor:
        return group(x, [weight], [a], [b], [scale], [bias], dropout=dropout)[0]

    monkeypatch.setattr(grouping, "lora_linear_group", group)
    monkeypatch.setattr(grouping, "lora_linear", one)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of members of each op that is run, in order."""
    sizes: list[int] = []
    alone, together = grouping.lora_linear, grouping.lora_linear_group
    monkeypatch.setattr(grouping, "lora_linear", lambda *a, **k: sizes.append(1) or alone(*a, **k))
    monkeypatch.setattr(
        grouping, "lora_linear_group", lambda x, w, *a, **k: sizes.append(len(w)) or together(x, w, *a, **k)
    )
    return sizes


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer, alone or not, draws the same mask from the same shape: so that both can be compared."""
    monkeypatch.setattr(cola_kernels.autograd, "as_seed", lambda seed, device: torch.tensor(7, device=device))


@contextmanager
def third_fold_raises(error: type[BaseException]) -> Iterator[None]:
    """Memory that runs out, or Ctrl-C, at the third module."""
    fold, calls = DenseBase.fold, itertools.count(1)

    def failing(*args: Any, **keys: Any) -> Any:
        if next(calls) == 3:
            raise error
        return fold(*args, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseBase, "fold", failing)
        yield


@contextmanager
def served(module: str, **defaults: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """A process of `module` that answers a line of JSON with another, and spares each request the imports."""
    command = [sys.executable, "-m", module]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(**keys: Any) -> dict[str, Any]:
            print(json.dumps({**defaults, **keys}), file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield run
        process.stdin.close()


@pytest.fixture(scope="session")
def worker() -> Iterator[Callable[..., dict[str, Any]]]:
    with served("tests.cola.crash_worker") as run:
        yield lambda config, **keys: run(config=config, **keys)


def sealed(run: Path) -> list[str]:
    record = json.loads((run / "chain.json").read_text())
    return [link["sha256"]["adapter_model.safetensors"] for link in record["links"]]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Count the calls of a function that accelerate_peft's layers fuse."""
    from cola_fast.layers import peft_layers

    calls: list[int] = []
    op = peft_layers.lora_linear
    monkeypatch.setattr(peft_layers, "lora_linear", lambda *args, **keys: calls.append(1) or op(*args, **keys))

    def count(function: Callable[[], Any]) -> int:
        calls.clear()
        function()
        return len(calls)

    return count


@pytest.fixture(scope="session")
def load_nf4(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    """A random Llama with biases in 4 bits, as transformers and bitsandbytes load it."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder: Path = tmp_path_factory.mktemp("biased") / "llama"
    tiny_llama(hidden_size=64, intermediate_size=128, attention_bias=True).save_pretrained(folder)

    def load(
        dtype: torch.dtype = torch.float32,
        *,
        compute: Any = None,
        kind: str = "nf4",
        double: bool = True,
        repacks: bool = False,
    ) -> nn.Module:
        """repacks: leave bitsandbytes its way of running in eval mode on a CPU."""
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute or dtype,
        )  # fmt: skip
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = repacks
        return model

    return load

"""A world small enough for a test: a random Llama, its tokenizer, and a task it can learn."""

from __future__ import annotations

import getpass
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a broken test
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
import yaml
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # triton decides at its import: the kernels run interpreted, on request

torch.set_num_threads(1)  # tiny tensors; and two workers share two cores

# Inductor's cache takes code for wide vectors for code for narrow ones where ATEN_CPU_CAPABILITY forces those, and half
# of a result is then not written. So each kind has a cache of its own.
KIND = f"{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability().lower()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor-{KIND}")))


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **keys: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = LlamaConfig(
        vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, **{**sizes, **keys},
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(settings).to(dtype).eval()
    return model


def disturb(chain: Any, scale: float = 0.05, seed: int = 1) -> None:
    """Pretend the open link has been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in chain.layers.values():
            layer.lora_B.normal_(0, scale, generator=generator)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws, and so its verdict, is the same each time."""
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama as a checkpoint folder, with a word-level tokenizer."""
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


def make_tiny_folder(place: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = place / "tiny-llama"
    words = ["<s>", "</s>", "<unk>", "it", "was", "good", "bad", *(f"w{i}" for i in range(57))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows of whole blocks of 64, as 4-bit weights need them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model") / "wide-llama"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sentences of which the majority of words is below w28 (label 0) or not (label 1)."""
    return make_task_files(tmp_path_factory.mktemp("data"))


def make_task_files(folder: Path) -> dict[str, str]:
    import random

    source = random.Random(0)
    files = {}
    for split, count in (("train", 96), ("eval", 32), ("test", 32)):
        rows = []
        for _ in range(count):
            label = source.randrange(2)
            words = [f"w{source.randrange(28 * label, 28 * label + 28)}" for _ in range(source.randrange(3, 9))]
            rows.append({"text": " ".join(words), "label": label})
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    return files


@pytest.fixture
def raw_config(tiny_folder: Path, task_files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A small but complete training configuration, as YAML would give it."""
    return {
        "out": str(tmp_path / "run"),
        "model": {"name": str(tiny_folder), "dtype": "fp32", "device": "cpu"},
        "data": {
            **task_files,
            "format": "classification",
            "template": "{text} it was",
            "verbalisers": {"0": " bad", "1": " good"},
            "max_length": 32,
        },
        "chain": {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
        "schedule": {"links": 3, "steps": 12, "lr": 0.02},
        "train": {"batch_size": 8, "save_every": 2, "log_every": 1, "eval_batch_size": 32},
    }


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """Write the configuration, with changes given as `section__key=value`, and return its path."""

    def write(**changes: Any) -> str:
        for key, value in changes.items():
            *sections, last = key.split("__")
            tree = raw_config
            for section in sections:
                tree = tree.setdefault(section, {})
            tree[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw_config))
        return str(path)

    return write


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to show that nothing has changed."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }

"""What is trained when whole steps are compared: models of known shapes with random weights, on random words.

Neither speed nor memory depends on the values. A model is written once to the cache folder, as a checkpoint with a
tokenizer of its own, so that every trainer reads it by its public way in. `demo` is the exception: the real model and
the real data of `cola demo`.
"""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from cola_fast import config
from cola_fast.commands import assets
from cola_fast.config import Config

from . import harness

WORDS = 256
SHAPES: dict[str, dict[str, Any]] = {  # as transformers' LlamaConfig names them
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Llama-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Workload:
    """A training run of fixed size. Every token carries loss; without packing every row is `length` tokens."""

    model: str
    length: int  # tokens of a row
    batch: int  # rows of a step
    in_4bit: bool = False  # NF4 with double quantisation, as QLoRA
    checkpointing: bool = False
    packing: bool = False  # rows of several sequences, of an eighth to a half of a row each
    rank: int = 16
    dropout: float = 0.0
    dtype: str = field(default_factory=harness.native_dtype)
    targets: str | tuple[str, ...] = "all-linear"

    def __str__(self) -> str:
        kind = self.dtype if not self.in_4bit else "QLoRA" if self.dtype == "bf16" else f"QLoRA in {self.dtype}"
        words = [self.model, kind, f"{self.batch} x {self.length}"]
        words += [f"R = {self.rank}", f"dropout {self.dropout:g}"]
        words += ["checkpointing"] * self.checkpointing + ["packed"] * self.packing
        words += [] if isinstance(self.targets, str) else [" and ".join(self.targets)]
        return ", ".join(words)

    @property
    def possible(self) -> bool:
        """Whether what it needs is installed."""
        return not self.in_4bit or importlib.util.find_spec("bitsandbytes") is not None

    def config(self, steps: int) -> Config:
        """As `cola train` takes it: one link of `steps` steps, nothing evaluated."""
        return config.from_dict(
            {
                "model": {
                    "name": str(model_folder(self.model)),
                    "load_in_4bit": self.in_4bit,
                    "dtype": self.dtype,
                    "attention": "sdpa",
                },
                "data": {
                    "train": str(_sentences(self, steps)),
                    "eval_share": 0.0,
                    "format": "text",
                    "max_length": self.length,
                },
                "chain": {
                    "method": "lora",
                    "r": self.rank,
                    "alpha": 2 * self.rank,
                    "dropout": self.dropout,
                    "targets": self.targets if isinstance(self.targets, str) else list(self.targets),
                    "rounding": "nearest",  # the knot at the end is not timed: the quicker one
                },
                "schedule": {"steps": steps, "lr": 1e-3, "lr_shape": "constant"},
                "train": {
                    "batch_size": self.batch,
                    "packing": self.packing,
                    "activation_checkpointing": self.checkpointing,
                    "save_every": steps + 1,
                },
            }
        )

    def flops(self, tokens: float, *, full: bool = False) -> float:
        """Of a step on `tokens` tokens, the model's own: 2 a weight and token forward, 2 for dX, 2 for dW where a
        weight is trained; attention over half of a row. Recomputation and what an adapter adds are not in it."""
        s = SHAPES[self.model]
        hidden, layers, heads = s["hidden_size"], s["num_hidden_layers"], s["num_attention_heads"]
        kv = hidden * s["num_key_value_heads"] // heads
        block = 2 * hidden * (hidden + kv) + 3 * hidden * s["intermediate_size"]
        weights = layers * block + hidden * s["vocab_size"]
        attention = 6 * layers * hidden * self.length * (0.35 if self.packing else 1)  # of a row, the mean token's own
        return float(tokens * ((6 if full else 4) * weights + attention))


def demo(steps: int, dtype: str) -> Config:
    """`cola demo`'s model and task as one link without a schedule."""
    raw = yaml.safe_load(resources.files("cola_fast.commands").joinpath("demo.yaml").read_text(encoding="utf-8"))
    raw["model"] |= {"name": str(assets.smollm2()), "dtype": dtype}
    raw["data"] |= {"train": str(assets.sentiment()["train"]), "eval": None, "test": None, "eval_share": 0.0}
    raw["chain"] |= {"rounding": "nearest"}
    raw["schedule"] |= {"links": 1, "epochs": None, "steps": steps, "lr_shape": "constant", "warmup": 0.0}
    raw["train"] |= {"save_every": steps + 1}
    return config.from_dict(raw)


def model_folder(name: str) -> Path:
    """The checkpoint, bf16, written at the first call."""
    folder = _folder() / name
    if not folder.exists():
        harness.say(f"writing a {name} of random weights to {folder}")
        unfinished = folder.with_name(f"{name}.{random.getrandbits(32):x}")
        _make_model(name).save_pretrained(unfinished)
        _tokenizer().save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def _make_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(**SHAPES[name], max_position_embeddings=16384, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    with harness.device():
        return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _sentences(workload: Workload, steps: int) -> Path:
    """A file of enough of them. Common words are common, so that there is something to learn."""
    draw, size = random.Random(0), workload.length
    count = workload.batch * steps * (4 if workload.packing else 1)
    path = _folder() / f"{'packed' if workload.packing else 'whole'}-{size}-{count}.jsonl"
    if not path.exists():
        lines = []
        for _ in range(count):
            length = draw.randint(size // 8, size // 2) if workload.packing else size
            words = (f"w{int(WORDS * draw.random() ** 3)}" for _ in range(length))
            lines.append(json.dumps({"text": " ".join(words)}))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _folder() -> Path:
    folder = assets.cache_folder() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

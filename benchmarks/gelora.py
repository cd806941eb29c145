"""How does the intrinsic dimension of hidden states change with depth, and which ranks does GeLoRA make of it?

SmolLM2-135M-Instruct and all-MiniLM-L6-v2 on the same movie-review sentences, every linear of every block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import harness
from .registry import Options
from .report import describe, markdown

PLOT = harness.RESULTS / "gelora.png"
EXAMPLES, BATCH = 2000, 32


def run(options: Options) -> dict[str, Any]:
    from transformers import AutoModel, AutoTokenizer

    from cola_fast.commands import assets, ranks_report
    from cola_fast.ranks import block_ranks

    count = 200 if options.quick else EXAMPLES
    lines = assets.sentiment("movie")["train"].read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["text"] for line in lines]
    found = []
    for folder in (assets.smollm2(), assets.minilm()):
        harness.say(f"{folder.name}: hidden states of {len(texts)} sentences")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(harness.device()).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        blocks = block_ranks(model, batches(tokenizer, texts), targets="all-linear")
        found.append(ranks_report.Geometry(folder.name, "movie-review sentences", len(texts), None, tuple(blocks)))
    if not options.quick:
        PLOT.parent.mkdir(parents=True, exist_ok=True)
        PLOT.write_bytes(ranks_report.draw(found))
    return {"models": [one.to_dict() for one in found]}


def batches(tokenizer: Any, texts: list[str]) -> Iterator[Mapping[str, Tensor]]:
    for start in range(0, len(texts), BATCH):
        made = tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        yield {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    rows = []
    for model in result["models"]:
        blocks = model["blocks"]
        dimensions = [block["dimension"] for block in blocks] + [blocks[-1]["next_dimension"]]
        ranks = [block["rank"] for block in blocks]
        rows.append(
            [
                model["model"],
                str(len(blocks)),
                f"{dimensions[0]:.1f}",
                f"{max(dimensions):.1f}",
                f"{dimensions[-1]:.1f}",
                " ".join(map(str, ranks)),
                f"{sum(ranks) / len(ranks):.2f}",
            ]
        )
    header = ["", "blocks", "dimension at the first", "largest", "after the last", "ranks by block", "mean rank"]
    note = f"{result['models'][0]['examples']} movie-review sentences, fp32. {describe(result)}"
    return {"gelora": f"{markdown(header, rows)}\n\n{note}"}

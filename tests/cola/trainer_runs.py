"""What the tests of ChainCallback and their worker process share: arguments and data for a short training."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = {
    "max_steps": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "cosine",
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"


def token_rows(count: int = 48, length: int = 10) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def labelled_rows(count: int = 48) -> list[dict[str, torch.Tensor]]:
    """Of three classes: where in the vocabulary the first token is."""
    return [{**row, "labels": row["input_ids"][0] * 3 // 64} for row in token_rows(count)]

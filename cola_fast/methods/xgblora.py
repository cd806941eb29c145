"""XGBLoRA: boosting with many weak links."""

from __future__ import annotations

from .registry import Method, register

register(
    Method(
        "xgblora",
        "arXiv 2410.19694",
        "many short links of rank 1, each on a random subset of the blocks, with an L2 penalty. The number of links, "
        "the share of blocks and the penalty's weight are ours, not the paper's",
        {
            "chain": {"r": 1, "share": 0.5},
            "schedule": {"links": 16, "optimizer_state": "reset"},
            "train": {"optimizer": "adam", "weight_decay": 1e-4},
        },
    )
)

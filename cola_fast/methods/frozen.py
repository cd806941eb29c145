"""Methods that train one factor of a link and leave the other at its random start."""

from __future__ import annotations

from .registry import Method, register

register(
    Method(
        "rac-lora",
        "arXiv 2410.08305",
        "a chain in which A of each link is random and frozen and B is trained (`frozen: b` for the reverse)",
        {"chain": {"frozen": "a"}, "schedule": {"links": 3, "optimizer_state": "reset"}},
    ),
    Method(
        "ffa-lora",
        "arXiv 2403.12313",
        "one link, A random and frozen; LoRA-FA (arXiv 2308.03303) is the same",
        {"chain": {"frozen": "a"}, "schedule": {"links": 1}},
    ),
)

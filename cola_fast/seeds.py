"""Seeds: an independent one for each use of a run's one seed."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """An independent 63-bit seed for each use: link 2 of q_proj in layer 5 always gets the same."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

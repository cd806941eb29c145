"""What is looked at before the open link is sealed: afterwards it is too late."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..layers.factors import Factors
from . import peers
from .open_link import moves

if TYPE_CHECKING:
    from .chain import Chain


def has_moved(chain: Chain, name: str, factors: Factors) -> bool:
    """Whether A and B of an open link are not what it started from. Gates are not looked at."""
    starts = chain.open_link.starts if chain.open_link is not None else {}
    if name in starts:
        return not (torch.equal(factors.a, starts[name].a) and torch.equal(factors.folded().b, starts[name].b))
    return moves(factors)


def warn_of_idle(chain: Chain) -> None:
    """Of a link that has not been trained, or of some of its modules."""
    live, gated, index = chain.live_factors(), chain.settings.gate is not None, len(chain.links)
    if gated:  # closed gates do not say that nothing was trained, but B = 0 does
        live = {name: f._replace(e=None) for name, f in live.items()}
    idle = [name for name, f in live.items() if not has_moved(chain, name, f)]
    if len(idle) == len(live) and not any(layer.rescales() for layer in chain.layers.values()):
        warnings.warn(
            f"Link {index} changes nothing: its factors are those that it was opened with. Train it before tie(); an "
            "optimizer holds the factors of the link that was open when it was made, so make a new one from "
            "chain.parameters() after every extend().",
            stacklevel=3,
        )
    elif idle and not gated:
        warnings.warn(
            f"{len(idle)} of the {len(live)} modules of link {index} had no gradient, such as {idle[0]}: its forward "
            "was never called, or nothing of it reached the loss.",
            stacklevel=3,
        )


def require_same_everywhere(chain: Chain) -> None:
    """Refuses a link that is not the same in all processes of somebody's own loop."""
    if peers.count() == 1:
        return
    assert chain.open_link is not None
    digest = hashlib.sha256(repr((chain.open_link.index, chain.settings, chain.identity["fingerprint"])).encode())
    for factors in (chain.live_factors(), chain.open_link.starts):
        for name, f in factors.items():
            digest.update(f"{name} {f.alpha}".encode())
            for part in (part for part in f if isinstance(part, torch.Tensor)):
                digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for name, value in chain.beside.values().items():
        digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    found = peers.exchange(digest.hexdigest(), "tie()")
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        raise UserError(
            f"Process {other} has trained another link {chain.open_link.index} than process 0, and nothing was tied: "
            "their gradients were not shared. DistributedDataParallel and accelerator.prepare know the parameters that "
            "there were when they wrapped the model: wrap chain.model again after every extend(), and attach with the "
            "same arguments everywhere."
        )


def require_room(chain: Chain) -> None:
    """Refuses a link that would leave infinite weights, which nothing could take back."""
    for name, factors in chain.live_factors().items():
        finite = all(bool(part.isfinite().all()) for part in factors if isinstance(part, torch.Tensor))
        if finite:  # `SealedLink.seal` tells of those that are not
            refuse_overflow(chain, name, factors, "go back to the last good state and lower the learning rate")


def refuse_overflow(chain: Chain, name: str, factors: Factors, remedy: str) -> None:
    layer = chain.layers[name]
    if not chain.base.holds(layer, factors):
        dtype = str(layer.compute_dtype).removeprefix("torch.")
        raise UserError(
            f"Folding link {len(chain.links)} would leave numbers in {name} that {dtype} cannot hold, and it was not "
            f"tied: {remedy}, or load the model in bf16 or fp32."
        )

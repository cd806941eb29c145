"""RUN/best: the open link as it was at the best evaluation, and how many sealed links it stands on."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from . import peft_format, store
from .chain import Chain
from .construct import load_chain
from .errors import UserError

FOLDER = "best"
FILE = "best.json"


def save_best(chain: Chain, run: Path, *, step: int, loss: float) -> None:
    factors = chain.open_factors()
    files = peft_format.encode(factors, **chain.peft_fields(factors))
    about = {
        "links": len(chain.links),
        "step": step,
        "loss": loss,
        "difference": chain.open_link is not None and bool(chain.open_link.starts),
        "sha256": {name: store.sha256(data) for name, data in files.items()},
    }
    store.write_folder(run / FOLDER, {**files, FILE: store.to_json(about)})


def load_best(model: nn.Module, run: Path) -> Chain:
    """The chain at its best evaluation: its first sealed links folded, the best link open on top."""
    folder = run / FOLDER
    if not (folder / FILE).exists():
        raise UserError(f"{run} has no best checkpoint: it was trained without a validation set.")
    about = store.read_json(folder / FILE)
    files = {name: store.read_checked(folder / name, digest) for name, digest in about["sha256"].items()}
    chain = load_chain(model, run, links=about["links"])
    factors, starts = peft_format.decode(files), {}
    if about.get("difference"):  # what it started from leaves the weights again, rounded as it was then
        halves = {name: f.halves() for name, f in factors.items()}
        factors = {name: trained for name, (trained, _) in halves.items()}
        starts = {name: taken.negated() for name, (_, taken) in halves.items()}
    chain.open_with(factors, starts)
    return chain

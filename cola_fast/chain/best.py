"""RUN/best: the open link as it was at the best evaluation, and how many sealed links it stands on.

best/best.json           which adapter is the best, with its hashes; replaced atomically
best/<sha256>/           the link, a PEFT adapter. A better one is written beside it, and the old one goes at last
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from .. import store
from ..errors import UserError, note
from . import peft_format
from .attach import load_chain
from .chain import Chain
from .chain_json import binding, read_record
from .writing import peft_fields

FOLDER = "best"
FILE = "best.json"


def save_best(chain: Chain, run: Path, *, step: int, loss: float) -> None:
    factors = chain.open_factors()
    files = peft_format.encode(factors, **peft_fields(chain, factors))
    hashes = {name: store.sha256(data) for name, data in files.items()}
    name = store.content_hash(hashes)[: store.MARK]
    about = {
        "chain": binding(chain.record(chain.links), len(chain.links)),
        "links": len(chain.links),
        "step": step,
        "loss": loss,
        "difference": chain.open_link is not None and bool(chain.open_link.starts),
        "folder": name,
        "files": hashes,
    }
    folder = run / FOLDER
    if not _is_whole(folder / name, hashes):
        store.write_folder(folder / name, files)
    store.write_sealed(folder / FILE, about)
    with suppress(OSError):  # those before it; they do no harm
        for path in folder.iterdir():
            if path.name not in (name, FILE):
                store.remove(path)


def _is_whole(folder: Path, hashes: Mapping[str, str]) -> bool:
    try:
        return all(store.read_checked(folder / name, digest) for name, digest in hashes.items())
    except UserError:
        return False


def load_best(model: nn.Module, run: Path) -> Chain:
    """The chain at its best evaluation: its first sealed links folded, the best link open on top."""
    path = run / FOLDER / FILE
    with store.reading(path):
        if not path.exists():
            raise UserError(f"{run} has no best checkpoint: it was trained without a validation set.")
    about, sealed = store.read_sealed(path)
    if not sealed:
        note(f"{path} was written by an earlier version and carries no checksum: damage to it would go unnoticed.")
        about = {**about, "files": about.get("sha256"), "folder": "."}
    record = read_record(run)
    _check(about, len(record["links"]), path)
    if sealed and about.get("chain") != binding(record, about["links"]):
        raise UserError(f"{path} belongs to another chain than {run}: restore both from one copy.")
    folder = run / FOLDER / about["folder"]
    files = {name: store.read_checked(folder / name, digest) for name, digest in about["files"].items()}
    factors, starts, also = peft_format.decode(files), {}, peft_format.decode_also(files)
    strange = next((name for name in factors if name not in record["modules"]), None)
    if strange is not None:
        raise UserError(f"{folder} has a link on {strange}, which {run} does not cover: restore both from one copy.")
    chain = load_chain(model, run, links=about["links"])
    if about.get("difference"):  # what it started from leaves the weights again, rounded as it was then
        halves = {name: f.halves() for name, f in factors.items()}
        factors = {name: trained for name, (trained, _) in halves.items()}
        starts = {name: taken.negated() for name, (_, taken) in halves.items()}
    chain.open_with(factors, starts)
    if chain.beside:
        chain.beside.set(also, str(folder))
    return chain


def _check(about: Mapping[str, Any], links: int, path: Path) -> None:
    files, folder = about.get("files"), about.get("folder")
    whole = (
        type(about.get("links")) is int
        and 0 <= about["links"] <= links
        and isinstance(folder, str)
        and re.fullmatch(r"\.|[0-9a-f]+", folder) is not None
        and isinstance(files, dict)
        and set(files) == {peft_format.CONFIG_FILE, peft_format.TENSOR_FILE}
        and all(isinstance(digest, str) for digest in files.values())
    )
    if not whole:
        raise UserError(f"{path} is damaged (it names no adapter of this chain): restore it from a copy.")

"""One process of somebody's own loop, several scenes one after the other. Run by test_peers.py.

    python -m tests.cola.loop_worker FOLDER        with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Prints a line of JSON: scene -> what this process has seen.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)

from cola_fast import UserError, attach, load_chain
from cola_fast.chain import peers

from ..conftest import tiny_llama

Wrap = Callable[[nn.Module], nn.Module]


def train(model: nn.Module, chain: Any, *, by_hand: bool = False) -> None:
    """A few steps on data of this process's own, and a new optimizer, as a loop of one's own has it."""
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        ids = torch.randint(0, 64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in chain.parameters() if by_hand else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def told(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def loop(wrap: Wrap, *, by_hand: bool = False, **keys: Any) -> dict[str, Any]:
    """Three links, the model wrapped again for each."""
    chain = attach(tiny_llama(dtype=torch.bfloat16), r=2, **keys)
    notes: list[str] = []
    for link in range(3):
        train(wrap(chain.model), chain, by_hand=by_hand)
        chain.tie()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if link < 2:
                chain.extend()
        notes += [str(warning.message) for warning in caught]
    return {"links": [link.sha256 for link in chain.links], "weights": weights(chain.model), "notes": notes}


def accelerated() -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return loop(accelerator.prepare)


def apart(folder: Path) -> dict[str, Any]:
    """Wrapped once, as people do."""
    chain = attach(tiny_llama(), r=2)
    if dist.get_rank() == 0:
        chain.save(folder / "apart")
    model = DistributedDataParallel(chain.model)
    train(model, chain)
    chain.tie()
    chain.extend()
    train(model, chain)
    before = weights(chain.model)
    refusal = told(chain.tie)
    return {
        "refusal": refusal, "links": len(chain.links), "open": chain.open_link is not None,
        "unchanged": weights(chain.model) == before, "on disk": len(list((folder / "apart" / "links").iterdir())),
    }  # fmt: skip


def seeds_of_their_own() -> dict[str, Any]:
    chain = attach(tiny_llama(), r=2, seed=dist.get_rank())
    train(DistributedDataParallel(chain.model), chain)
    return {"refusal": told(chain.tie)}


def one_writes(folder: Path) -> dict[str, Any]:
    """Process 0 saves, all go on from it; then its disk fails, and nobody's link is sealed."""
    run = folder / "one"
    chain = attach(tiny_llama(), r=2)
    train(DistributedDataParallel(chain.model), chain)
    refusal = told(lambda: chain.save(run))
    dist.barrier()
    chain = load_chain(tiny_llama(), run)
    train(DistributedDataParallel(chain.model), chain)
    chain.tie()
    chain.extend()
    dist.barrier()
    again = weights(load_chain(tiny_llama(), run, links=1).model)
    train(DistributedDataParallel(chain.model), chain)
    dist.barrier()
    if dist.get_rank() == 0:
        (run / "links" / "000").rename(run / "kept")
        (run / "links").rmdir()
        (run / "links").write_text("a file")
    dist.barrier()
    failed = told(chain.tie)
    dist.barrier()
    if dist.get_rank() == 0:
        (run / "links").unlink()
        (run / "links").mkdir()
        (run / "kept").rename(run / "links" / "000")
    dist.barrier()
    sealed = len(chain.links)
    chain.tie()
    dist.barrier()
    loaded = load_chain(tiny_llama(), run)
    return {
        "refusal": refusal, "again": again, "failed": failed, "sealed": sealed,
        "same": weights(loaded.model) == weights(chain.model),
    }  # fmt: skip


def only_one_ties() -> dict[str, Any]:
    chain = attach(tiny_llama(), r=2)
    peers.PATIENCE = timedelta(seconds=1)
    refusal = told(chain.tie) if dist.get_rank() == 0 else None
    peers.PATIENCE = timedelta(minutes=1)
    return {"refusal": refusal, "links": len(chain.links)}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    scenes: dict[str, Callable[[], dict[str, Any]]] = {
        "wrapped": lambda: loop(DistributedDataParallel),
        "pissa": lambda: loop(DistributedDataParallel, init="pissa"),
        "by hand": lambda: loop(lambda model: model, by_hand=True),
        "accelerate": accelerated,
        "apart": lambda: apart(folder),
        "seeds": seeds_of_their_own,
        "one": lambda: one_writes(folder),
        "only one": only_one_ties,
    }
    print(json.dumps({name: scene() for name, scene in scenes.items()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

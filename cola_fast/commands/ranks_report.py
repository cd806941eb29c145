"""What `cola ranks` tells: the dimension of the hidden states by depth, and the ranks that GeLoRA makes of it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import store
from ..config import Config
from ..errors import UserError
from ..ranks import BlockRank, block_ranks, example_batches

DIMENSION, RANK = "#1f5fa8", "#c2571a"


@dataclass(frozen=True)
class Geometry:
    model: str
    data: str
    examples: int
    mean_rank: float | None  # the budget, if there was one
    blocks: tuple[BlockRank, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(config: Config) -> Geometry:
    """On the first `chain.gelora.examples` training examples of a configuration. Raises UserError as `train` does."""
    from ..data.tables import named
    from ..training.models import load_model, load_tokenizer
    from ..training.prepare import read_data
    from ..training.run import date_for

    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    data = read_data(config, model, tokenizer, date_for(store.given_path(config.out)))
    settings = config.chain.gelora
    examples = data.train[: settings.examples]
    batches = example_batches(examples, limit=settings.examples)
    blocks = block_ranks(model, batches, targets=config.chain.targets, mean_rank=settings.mean_rank)
    return Geometry(config.model.name, named(config.data.train), len(examples), settings.mean_rank, tuple(blocks))


def table(found: Geometry) -> str:
    lines = [f"{'block':28} {'dimension in':>12} {'out':>7} {'rank':>5}  modules"]
    for block in found.blocks:
        leaves = ", ".join(name.rsplit(".", 1)[-1] for name in block.modules)
        lines.append(f"{block.block:28} {block.dimension:12.2f} {block.next_dimension:7.2f} {block.rank:5d}  {leaves}")
    ranks = [block.rank for block in found.blocks]
    lines.append(f"{len(ranks)} blocks, mean rank {sum(ranks) / len(ranks):.2f}, from {found.examples} examples")
    return "\n".join(lines)


def write(found: Geometry, folder: str | Path) -> None:
    """ranks.yaml, ranks.json and ranks.png; files of those names are replaced."""
    folder = store.given_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be a folder ({error.strerror}): choose another with --out.") from None
    pattern = {name: rank for block in found.blocks for name, rank in block.modules.items()}
    chain = {"chain": {"scaling": "constant", "rank_pattern": pattern}}
    store.write_file(folder / "ranks.yaml", yaml.safe_dump(chain, sort_keys=False).encode())
    store.write_file(folder / "ranks.json", (json.dumps(found.to_dict(), indent=1) + "\n").encode())
    store.write_file(folder / "ranks.png", draw([found]))


def draw(several: Sequence[Geometry], titles: Sequence[str] | None = None) -> bytes:
    """A PNG: one column a model, intrinsic dimension above rank, by depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(several), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(several), sharex="col", squeeze=False)
    for column, found in enumerate(several):
        above, below = axes[:, column]
        blocks, depth = found.blocks, range(len(found.blocks))
        dimensions = [block.dimension for block in blocks] + [blocks[-1].next_dimension]
        above.plot(range(len(dimensions)), dimensions, color=DIMENSION, marker="o", markersize=4)
        above.set_ylabel("intrinsic dimension (TwoNN)")
        above.set_title((titles or [Path(f.model).name for f in several])[column], fontsize=10)
        below.bar([place + 0.5 for place in depth], [block.rank for block in blocks], color=RANK, width=0.8)
        below.set_ylabel("rank")
        below.set_xlabel("depth (boundaries between blocks)")
        below.yaxis.get_major_locator().set_params(integer=True)
        above.set_ylim(bottom=0)
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.25)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    return image.getvalue()

"""What the command line tells about a run: its plan before, its scores and contents after."""

from __future__ import annotations

import gc
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..chain.attach import load_chain
from ..chain.best import load_best
from ..chain.chain_json import newest_state, read_record
from ..config import Config
from ..errors import UserError
from ..store import given_path, refuse_existing
from ..training.models import load_model, load_tokenizer, quantised_as, stored_as, unquantised
from ..training.plan import plan_run, size_of
from ..training.prepare import read_data
from ..training.progress import Progress
from ..training.run import begun, read_run
from .scores import Scores


def dry_run(config: Config) -> str:
    """Trainable parameters, a memory estimate and the schedule, as text."""
    plan = plan_run(config)
    need, schedule, c, t = plan.need, plan.schedule, config.chain, config.train
    percent = f"{need.trained / need.total:.2%}"
    lines = [
        f"model      {config.model.name}, {need.total / 1e6:,.1f} M parameters, {plan.dtype} on {plan.device}",
        f"link       {plan.layers} layers, {need.trained:,} trainable parameters ({percent})",
        *(f"           of them {size:,} beside the links, {name}" for name, size in plan.beside.items()),
        f"           on {plan.coverage}",
        *([] if c.ranks == "uniform" else [f"           at rank {c.r}; {c.ranks} chooses ranks before it trains"]),
        *(f"data       {note}" for note in plan.data.notes),
        f"schedule   {schedule.total} steps of {t.batch_size * t.accumulation} rows, {len(plan.feed)} batches an epoch,"
        f" lr {config.schedule.lr:g} {config.schedule.lr_shape}, {config.schedule.lr_span}",
    ]
    step = 0
    for span in schedule.spans:
        place = f"link {span.index + 1} of {len(schedule.spans)}"
        lines.append(f"  {place}   steps {step + 1} to {step + span.steps}, rank {span.rank}")
        step += span.steps
    lines.append(f"memory     weights {size_of(need.weights)}, link with optimizer {size_of(need.link)}")
    if need.step is None:
        lines.append(f"           a step: not estimated, this model cannot be run without data ({need.obstacle})")
    else:
        shape = " x ".join(map(str, plan.batch.input_ids.shape))
        lines.append(f"           a step {size_of(need.step)} at its highest ({shape} tokens, the longest batch)")
        lines.append(f"           together about {size_of(need.peak or 0)}, and what libraries hold beside tensors")
    return "\n".join(lines)


def score_run(
    folder: str | Path, *, best: bool = False, merged: Path | None = None, trust_remote_code: bool = False
) -> list[dict[str, Any]]:
    """Scores of the base, after each link, with the open link if there is one, and of the merged export reloaded.

    merged: the run's own merged export, where there is one already; otherwise one is made for this.
    """

    run = given_path(folder)
    record, config = read_run(run, trust_remote_code=trust_remote_code)
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    data = read_data(config, model, tokenizer, begun(record))
    if not data.test:
        raise UserError(f"{run} has no test or validation rows: set data.test or data.eval, or data.eval_share.")
    with tempfile.TemporaryDirectory() as temporary, Progress("scoring", parts=1 + len(record["links"])) as progress:
        scores = Scores(data.test, batch_size=config.train.eval_batch_size, progress=progress)
        chain = load_chain(model, run, links=0)
        scores.add("base", model)
        for entry in record["links"]:
            chain.replay(1)
            ranks = sorted(set(entry["ranks"].values()))
            rank, count = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}", entry["index"] + 1
            name = f"after {count} link{'s' if count > 1 else ''}"
            scores.add(name, model, rank=rank, retained=entry["fold"].get("retained"))
        chain.detach(discard=True)
        del chain, model
        if merged is None:
            chain = load_chain(load_model(config.model), run)
            if chain.open_link is not None:
                scores.add("with the open link", chain.model)
            merged = chain.export_merged(Path(temporary) / "merged").path
            del chain
        gc.collect()
        exported = replace(unquantised(config.model), name=str(merged), gguf_file=None, revision=None)
        scores.add("merged export", load_model(exported))
        if best:
            gc.collect()
            scores.add("best checkpoint", load_best(load_model(config.model), run).model)
    return scores.rows


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text; columns that no row fills are left out."""
    columns = {
        "model": ("model", str),
        "rank": ("rank", str),
        "loss": ("loss", "{:.4f}".format),
        "accuracy": ("accuracy", "{:.3f}".format),
        "retained": ("kept by the fold", "{:.3f}".format),
        "examples": ("examples", str),
        "same_as": ("same weights as", str),
    }
    used = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [[columns[key][0] for key in used]]
    cells += [["" if row.get(key) is None else columns[key][1](row[key]) for key in used] for row in rows]  # type: ignore[operator]
    widths = [max(len(line[i]) for line in cells) for i in range(len(used))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def export_run(
    folder: str | Path,
    to: str,
    *,
    out: str | None = None,
    best: bool = False,
    onto: str = "base",
    rank: int | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Rebuild the chain on its base and export it. Returns a sentence saying what is where.

    onto: "base", the one it was trained on, or "original": the 16-bit weights that a 4-bit base was quantised from.
    rank: to cut an adapter to.
    """

    run = given_path(folder)
    _, config = read_run(run, trust_remote_code=trust_remote_code)
    if rank is not None and to != "adapter":
        raise UserError(f"--rank is for --to adapter, but --to is {to}: leave it out.")
    target = given_path(out) if out else run / "export" / to
    refuse_existing(target)
    stored, kind = stored_as(config.model), quantised_as(config.model)
    if onto == "original" and (to == "adapter" or kind is None):
        raise UserError("--onto original is for the merged export of a chain on a quantised base: leave it out.")
    if onto == "original" and stored is not None:
        raise UserError(
            f"--onto original needs the weights from before they were quantised, but {config.model.name} is stored in "
            f"{stored.size}: leave it out, or give chain.export_merged(folder, onto=model) the original in Python."
        )
    model = load_model(config.model)
    chain = load_best(model, run) if best else load_chain(model, run)
    links = len(chain.links) + (chain.open_link is not None)
    if to == "adapter":
        return f"{links} links as one PEFT adapter: {chain.export_adapter(target, rank)}"
    original = load_model(unquantised(config.model)) if onto == "original" else None
    exported = chain.export_merged(target, load_tokenizer(config.model), onto=original)
    base = ", its weights dequantised" if kind is not None and original is None else ""
    return f"{links} links merged into {config.model.name}{base}: {exported}"


def describe(folder: str | Path) -> str:
    """The chain, link by link, and where training stands. Reads chain.json and the state, no weights."""

    run = given_path(folder)
    record = read_record(run)
    state, passed = newest_state(run, record)
    base = record["base"]
    lines = [
        f"base     {base['name']}"
        + (f" at {base['revision']}" if base["revision"] else "")
        + f", {record['base_kind']}",
        f"modules  {len(record['modules'])}, alpha {record['alpha']:g}, dropout {record['dropout']:g}",
    ]
    if record.get("beside"):
        tokens = len(record["beside"]["tokens"])
        rows = [f"the rows of {tokens} tokens"] if tokens else []
        lines.append(f"beside   {', '.join([*record['beside']['modules'], *rows])}")
    for entry in record["links"]:
        fold = entry["fold"]
        kept = f", kept {fold['retained']:.4f} in the fold" if fold else ""
        digest = entry["sha256"]["adapter_model.safetensors"][:12]
        ranks = sorted(set(entry["ranks"].values()))
        lines.append(f"{entry['folder']}  sealed, rank {'-'.join(map(str, ranks))}, sha256 {digest}{kept}")
    position = (state or {}).get("extra", {}).get("position")
    if state is not None and state["open"] == len(record["links"]):
        lines.append("open link" + (f", at step {position['step']}" if position else ""))
    if position:
        lines.append(f"steps    {position['step']}, {position['tokens']:,} tokens, {position['seconds']:.0f} s")
    size = 0
    for file in run.rglob("*"):
        with suppress(FileNotFoundError):  # a run that is being trained writes and removes files
            size += file.stat().st_size if file.is_file() else 0
    return "\n".join([*lines, *(f"damaged  {sentence}" for sentence in passed), f"on disk  {size_of(size)}"])

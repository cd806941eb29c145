"""The lean trainer: one loop over links and steps. It fills its slots from the configuration and knows no method.

    for each link:  open it, make its optimizer
        for each step:  accumulate, clip, step; log, evaluate, save as configured
        knot:  save, tie (seal, record, fold), open the next link, save

Everything that decides the next step (factors, optimizer, data order, counters) is in the state that `Chain.save`
writes beside the chain, so a run killed at any moment continues to the same links, bit for bit.

Several processes share the forward passes of a step, see `world`. The configuration says what is computed, whoever does
it: a step is `accumulation` batches of `batch_size` rows, and dropout is seeded by the number of the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import console, world
from ..chain.attach import attach, rebuild
from ..chain.best import save_best
from ..chain.chain import Chain
from ..chain.chain_json import newest_state, read_record
from ..config import Config
from ..data.batches import Batch, Feed
from ..data.loss import batch_loss, needed_logits
from ..data.rows import Data
from ..errors import UserError, note
from ..layers.sharding import shard
from ..methods import AFTER_STEP, GRADIENT, PERTURB, STATE, Step
from ..seeds import derive_seed
from . import liger, out_of_memory
from .batch_checks import wants_flat
from .evaluate import Score, evaluate
from .journal import Journal
from .models import checkpoint_activations, load_tokenizer
from .optimizer import load_state as load_optimizer_state
from .optimizer import make_optimizer, next_state, set_lr, state_of
from .position import Position, position_in, require_position
from .prepare import (
    chain_options,
    check_batches,
    choose_ranks,
    load_base,
    looked_at,
    original_model,
    prepare,
    read_data,
    rehearse,
)
from .progress import Progress
from .run import Run
from .schedule import Schedule
from .signals import collected_signals


@dataclass(frozen=True)
class Result:
    run: Path
    steps: int
    links: int
    score: Score | None  # the last evaluation
    best_loss: float | None
    seconds: float


class Interrupted(Exception):
    """Stopped by a signal, after saving everything needed to resume."""


def train(config: Config, *, quiet: bool = False) -> Result:
    """Train a chain as configured, or resume the one in `config.out`.

    Raises UserError for bad input (nothing on disk has changed then), for a loss that is not finite and for a full disk
    (the last good state is kept), and Interrupted after Ctrl-C or SIGTERM.
    """
    with world.joined(), Run(config) as run:
        config = run.config
        quiet = quiet or not world.is_main()
        with world.together():
            model, device = load_base(config)
            tokenizer = load_tokenizer(config.model)
            data = read_data(config, model, tokenizer, run.date)
            schedule, feed = prepare(config, data, flat=wants_flat(model))
        with world.together():
            if device is not None:
                shard(model, device)
            check_batches(config, model, data)
            resuming = run.started
            state = None
            if resuming:
                record = read_record(run.path)
                state, passed = newest_state(run.path, record)
                at = require_position(record, state, run.path)
                if passed:
                    note(f"{passed[0]} Going on from step {at.step}: the links will be the same.")
                chain = rebuild(model, run.path, record, state)
            else:
                chain = attach(
                    model, chain_options(config, model, data), seed=config.train.seed,
                    first_rank=schedule.spans[0].rank, batches=looked_at(config, data, 0),
                    original=original_model(config),
                )  # fmt: skip
            for span in schedule.spans:
                chain.ranks(span.rank)
            if chain.open_link is not None:
                rehearse(chain, config)
            chain.about = run.about
            obstacle = liger.obstacle(model, chain.beside) if config.train.use_liger else None
            use_liger = config.train.use_liger and not obstacle
            loss = liger.summed_loss if use_liger else _summed_loss
            loop = _Loop(config, run.path, model, chain, data, schedule, feed, state, loss, quiet)
        run.claim()
        if run.started != resuming:
            raise UserError(
                f"Another process has started {run.path} meanwhile: run the same command again to resume it."
            )
        if not quiet:
            for line in data.notes:
                console.tell(f"data: {line}")
        if obstacle and not quiet:
            console.tell(f"liger-kernel is off: {obstacle}")
        with liger.kernels(model) if use_liger else nullcontext(), out_of_memory.told(config):
            return loop.run()


def _summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    return batch_loss(needed_logits(model, batch), batch)[0]


class _Loop:
    def __init__(
        self,
        config: Config,
        run: Path,
        model: nn.Module,
        chain: Chain,
        data: Data,
        schedule: Schedule,
        feed: Feed,
        state: dict[str, Any] | None,
        summed_loss: Callable[[nn.Module, Batch], Tensor],
        quiet: bool,
    ) -> None:
        self.config, self.path, self.model, self.chain = config, run, model, chain
        self.data, self.schedule, self.feed, self.quiet = data, schedule, feed, quiet
        self.summed_loss = summed_loss
        self.device = next(model.parameters()).device
        self.journal = Journal(run, steps=schedule.total, links=len(schedule.spans), quiet=quiet)
        self.at = Position()
        self.resumed = state is not None
        self.score: Score | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_state: dict[int, dict[str, Any]] = {}  # to be loaded into the next optimizer
        gradient = config.train.gradient
        self.change_gradients = None if gradient is None else GRADIENT.choose(gradient)
        after_step = config.train.after_step
        self.after_step = None if after_step is None else AFTER_STEP.choose(after_step)
        self.pending: list[tuple[int, Tensor]] = []  # losses not yet looked at: reading one waits for the GPU
        self.unlogged: list[float] = []  # losses of the steps since the last row of metrics
        if state is not None and state["extra"]:
            self._restore(state["extra"], position_in(state, run))
        if config.train.activation_checkpointing:
            checkpoint_activations(model)
        model.train()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        at = self.at
        self.journal.open(
            self.config.train.loggers, step=at.step, link=at.link, tokens=at.tokens, seconds=at.seconds,
            resumed=self.resumed,
        )  # fmt: skip
        with collected_signals() as self.signals:
            try:
                if not self.resumed:
                    self._evaluate()
                while self.at.link < len(self.schedule.spans) and not (self.at.stopping and not self.at.knot_due):
                    if not self.at.knot_due:
                        self._open_link()
                    while not self.at.knot_due:
                        self._step()
                    self._knot()
            finally:
                self.journal.close()
        self.journal.draw()
        best = None if math.isinf(self.at.best_loss) else self.at.best_loss
        return Result(self.path, self.at.step, len(self.chain.links), self.score, best, self.at.seconds)

    def _open_link(self) -> None:
        """Make sure the link is open and has its optimizer; save, so that a run always has a state to resume from."""
        fresh = self.chain.open_link is None
        if fresh:
            link = self.at.link
            pattern = choose_ranks(self.config, self.model, self.data, link)
            batches = looked_at(self.config, self.data, link)
            self.chain.extend(self.schedule.spans[link].rank, rank_pattern=pattern, batches=batches)
        self.optimizer = make_optimizer(self.chain, self.config.train)
        load_optimizer_state(self.optimizer, self.optimizer_state)
        self.optimizer_state = {}
        if fresh or self.chain.folder is None:
            self._save()

    def _step(self) -> None:
        assert self.optimizer is not None
        at, t = self.at, self.config.train
        batches = [next(self.feed) for _ in range(t.accumulation)]
        labelled = sum(batch.labelled for batch in batches)  # the mean is over the step's tokens, not over its batches
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        with self._perturbed():
            for number in range(world.rank(), t.accumulation, world.size()):
                # who computes a batch makes no difference to its dropout: neither its seed nor which layers run as one
                torch.manual_seed(derive_seed(t.seed, "dropout", at.step * t.accumulation + number))
                self.chain.grouping.held = number >= world.size()
                batch = batches[number].to(self.device)
                part = self.summed_loss(self.model, batch) / labelled
                part.backward()
                loss += part.detach()
        self._share_gradients(loss)
        if self.change_gradients is not None:
            self.change_gradients(self.chain.pairs(), t)
        if t.clip is not None:
            nn.utils.clip_grad_norm_(self.chain.parameters(), t.clip)
        lr = self.schedule.lr(at.step, at.link, at.link_start)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        if self.after_step is not None:
            done = (at.step + 1 - at.link_start) / self.schedule.spans[at.link].steps
            self.after_step(self.chain.pairs(), Step(lr, done, t, self.optimizer.state))
        self.optimizer.zero_grad(set_to_none=True)

        at.step += 1
        at.tokens += sum(batch.tokens for batch in batches)
        self.pending.append((at.step, loss))
        self.journal.step()
        if at.step - at.link_start >= self.schedule.spans[at.link].steps:
            at.knot_due = True
        if at.step % t.log_every == 0 or at.step == 1 or at.knot_due:
            self._log_training(lr)
        elif self.device.type == "cpu":
            self._check_losses()
        if at.knot_due or (t.eval_every and at.step % t.eval_every == 0):
            self._evaluate()
        if at.knot_due:
            if self.unlogged:  # an evaluation has ended the link: its losses are not the next one's
                self._log_training(lr)
            return
        if world.anyone(bool(self.signals)):
            self._save()
            raise Interrupted(f"Stopped after step {at.step}; the same command resumes from there.")
        if at.step % t.save_every == 0:
            self._save()

    def _share_gradients(self, loss: Tensor) -> None:
        """Each rank's sums become those of the whole step, and `loss` with them."""
        if world.size() == 1:
            return
        for p in self.chain.parameters():
            if p.grad is None:  # a module that this rank's batches did not come by
                p.grad = torch.zeros_like(p)
        world.sum_([*(p.grad for p in self.chain.parameters() if p.grad is not None), loss])

    def _perturbed(self) -> AbstractContextManager[None]:
        t, at = self.config.train, self.at
        if t.perturb is None:
            return nullcontext()
        seed = derive_seed(t.seed, "perturb", at.step)
        return PERTURB.choose(t.perturb)(self.chain.layers, at.step / self.schedule.total, seed, t)

    def _knot(self) -> None:
        at = self.at
        if self.optimizer is not None:
            self.optimizer_state = state_of(self.optimizer, self.chain)
        if len(self.chain.links) == at.link:  # else: killed after sealing, and the link has been folded on loading
            self._save()
            self.chain.tie()
        link = self.chain.links[at.link]
        self.journal.row({"event": "knot", "step": at.step, "link": at.link, "sha256": link.sha256, **link.fold})
        c, seed = self.config.schedule, derive_seed(self.config.train.seed, "state", at.link)
        change = STATE.choose(c.optimizer_state)
        self.optimizer_state = next_state(self.optimizer_state, lambda state: change(state, c.prune, seed))
        self.optimizer = None
        at.link, at.link_start, at.knot_due = at.link + 1, at.step, False
        at.link_best_loss, at.link_stale = math.inf, 0
        if at.link == len(self.schedule.spans) or at.stopping:
            self._save()
        self.journal.say(f"link {at.link} of {len(self.schedule.spans)} tied at step {at.step}")
        self.journal.draw()

    # --- looking and keeping ------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        if not self.data.eval:
            return
        self._check_losses()
        at, began = self.at, time.perf_counter()
        with Progress(f"step {at.step}: validating", quiet=self.quiet) as progress:
            size = self.config.train.eval_batch_size
            self.score = evaluate(self.model, self.data.eval, batch_size=size, tell=progress)
        self.journal.leave_out(time.perf_counter() - began)
        self.journal.row({"event": "eval", "step": at.step, "link": at.link, **asdict(self.score)})
        self.journal.say(f"step {at.step}: validation {self.score}")
        if at.step == 0:
            return
        at.stale, at.link_stale = at.stale + 1, at.link_stale + 1
        if self.score.loss < at.link_best_loss:
            at.link_best_loss, at.link_stale = self.score.loss, 0
        if self.score.loss < at.best_loss:
            at.best_loss, at.stale = self.score.loss, 0
            world.lead(lambda: save_best(self.chain, self.path, step=at.step, loss=at.best_loss))
        if self.config.train.early_stop and at.stale >= self.config.train.early_stop:
            at.knot_due = at.stopping = True
        if self.config.schedule.plateau and at.link_stale >= self.config.schedule.plateau:
            at.knot_due = True

    def _save(self) -> None:
        self._check_losses()
        self._check_factors()
        self.at.seconds = self.journal.seconds
        extra = {
            "position": asdict(self.at),
            "unlogged": self.unlogged,
            "feed": self.feed.state_dict(),
            "optimizer": {"state": state_of(self.optimizer, self.chain) if self.optimizer else self.optimizer_state},
        }
        self.chain.save(self.path, extra)

    def _restore(self, extra: dict[str, Any], at: Position) -> None:
        self.at = at
        self.unlogged = extra.get("unlogged", [])
        self.feed.load_state_dict(extra["feed"])
        self.optimizer_state = extra["optimizer"]["state"]

    def _check_losses(self) -> None:
        """Look at the losses of the last steps. One that is not finite ends the run before anything is saved."""
        if not self.pending:
            return
        losses = torch.stack([loss for _, loss in self.pending]).tolist()
        bad = [(step, loss) for (step, _), loss in zip(self.pending, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            step, loss = bad[0]
            world.lead(lambda: self._refuse(f"The loss became {loss}", step))
        self.pending = []
        self.unlogged += losses

    def _check_factors(self) -> None:
        """A step can poison the factors while its loss is still finite; such a state is not one to go back to."""
        finite = [p.isfinite().all() for p in self.chain.parameters()]
        if finite and not bool(torch.stack(finite).all()):
            world.lead(lambda: self._refuse("The link's factors became NaN or infinite", self.at.step))

    def _refuse(self, what: str, step: int) -> None:
        kept = "nothing had been saved" if self.chain.folder is None else f"{self.path} keeps its last good state"
        raise UserError(
            f"{what} at step {step}: training stopped, {kept}. With another `out`, lower schedule.lr, add "
            "schedule.warmup, or look for a bad row in the data."
        )

    def _log_training(self, lr: float) -> None:
        self._check_losses()
        loss, self.unlogged = sum(self.unlogged) / len(self.unlogged), []
        at = self.at
        self.journal.training(step=at.step, link=at.link, tokens=at.tokens, loss=loss, lr=lr)

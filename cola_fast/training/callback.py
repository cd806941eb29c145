"""`ChainCallback`: a chain's schedule inside `transformers.Trainer` and the trainers built on it, such as TRL's.

The Trainer keeps its loop, data, optimizer and checkpoints. At the end of a link's span the callback ties the link,
opens the next, and puts the new factors into the optimizer in place of the old ones.

A checkpoint holds the chain in its folder `chain`, which is all that counts on resuming. The Trainer's own model file
has all links in its weights: loading it and folding the links again would apply them twice, so the Trainer's load
is made to change nothing, and the links are folded into the untouched base, as `load_chain` does it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, get_scheduler

from ..chain.chain import Chain
from ..chain.copies import drop_open_link, restore, save_copy
from ..chain.save_pretrained import forget_unpacking, merged_weight
from ..config import ScheduleConfig, from_dict
from ..errors import UserError, shown
from ..layers.layer import PARTS
from ..methods import METHODS, preset
from ..versions import require_tested
from .schedule import Schedule, Span, plan

FOLDER = "chain"  # in a checkpoint
SAMPLES = 64


class ChainCallback(TrainerCallback):
    """Tie and extend `chain` on schedule while a Trainer trains its model.

        chain = cola_fast.attach(model, r=8)
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[ChainCallback(chain, links=3)])
        trainer.train()  # or trainer.train(resume_from_checkpoint=True)
        chain.export_adapter("my-adapter")

    The Trainer's steps are divided among the links; its arguments decide optimizer, learning rate and checkpoints.

    Args:
        chain: freshly attached to the model the Trainer gets.
        links: how many. None: as the method says.
        method: fills in what is not given here, see `methods`.
        shares: relative length of each link; equal when absent.
        ranks: rank of each link; the chain's own when absent. The first is open already: attach with
            `first_rank=ranks[0]`.
        lr_span: "global" leaves the Trainer's learning-rate curve alone; "restart" repeats it for every link.
        optimizer_state: "reset" or "keep" the optimizer's moments at a tie.

    Raises:
        UserError: when made, for a schedule that makes no sense; from the Trainer, before the first step, for what
            cannot be right: `load_best_model_at_end`, more than one process, a chain that has been used already, a
            checkpoint of another chain or schedule.
    """

    def __init__(
        self,
        chain: Chain,
        links: int | None = None,
        *,
        method: str = "cola",
        shares: tuple[float, ...] | None = None,
        ranks: tuple[int, ...] | None = None,
        lr_span: str | None = None,
        optimizer_state: str | None = None,
    ) -> None:
        keys = {
            "links": links, "shares": shares, "ranks": ranks, "lr_span": lr_span, "optimizer_state": optimizer_state,
        }  # fmt: skip
        require_tested("transformers", "ChainCallback")
        if not isinstance(chain, Chain):
            raise UserError(f"chain is {shown(chain)}, but must be what cola_fast.attach returns.")
        self.chain = chain
        if not isinstance(method, str):
            raise UserError(f"method is {shown(method)}, but must be the name of one, see `cola methods`.")
        if optimizer_state not in (None, "reset", "keep"):
            raise UserError(f"optimizer_state is {shown(optimizer_state)}, but must be reset or keep.")
        self.config = _checked(method, {key: value for key, value in keys.items() if value is not None})
        _require_attached(chain, method)
        self.schedule: Schedule | None = None
        self._load_hook: Any = None
        forget_unpacking(chain.model)  # of 4-bit weights, over which the Trainer's first checkpoint would stumble
        if getattr(chain.model, "is_quantized", False):  # the Trainer asks for adapters on it, and knows PEFT's only
            cast(Any, chain.model)._hf_peft_config_loaded = True
        self._loaded: dict[str, Tensor] = {}  # samples of what the Trainer's model file holds

    # --- the Trainer's events -----------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if args.load_best_model_at_end:
            raise UserError(
                "load_best_model_at_end would put the weights of an older checkpoint under a chain that has moved on: "
                "set it to False; with metric_for_best_model the best checkpoint is still kept, and "
                "cola_fast.load_chain(base_model, trainer.state.best_model_checkpoint + '/chain') brings it back."
            )
        if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
            raise UserError(
                "ChainCallback works in a single process on one device, but the Trainer is set up for several: start "
                "it without a distributed launcher, with CUDA_VISIBLE_DEVICES naming one GPU."
            )
        vars(self.chain.model).pop("_hf_peft_config_loaded", None)
        self.chain.saves.unguard()
        self._load_hook = model.register_load_state_dict_pre_hook(self._load_nothing)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        if self._load_hook is None:
            raise UserError(
                "ChainCallback must know the Trainer from its start: pass it as Trainer(..., callbacks=[...])."
            )
        self._load_hook.remove()
        self.chain.saves.guard()
        self._require_fresh(model)
        self._require_in(optimizer)
        if state.max_steps < self.config.links:
            raise UserError(
                f"The Trainer makes {state.max_steps} steps, but the chain is to have {self.config.links} links, and "
                "each needs at least one: raise max_steps or num_train_epochs, or lower links."
            )
        self.schedule = plan(replace(self.config, steps=state.max_steps), rank=self.chain.settings.r, steps_per_epoch=1)
        spans = self.schedule.spans
        for span in spans:
            self.chain.ranks(span.rank)
        opened = self.chain.open_link
        if opened is None or opened.ranks != self.chain.ranks(spans[0].rank):
            raise UserError(
                f"The first link's rank is {spans[0].rank}, but the chain was opened with another: attach it with "
                f"first_rank={spans[0].rank}."
            )
        before = dict(self.chain.link_parameters())
        if state.global_step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.chain.open_link is None:  # resumed at its very end, where the Trainer may take one step more
            self.chain.extend()
        # the state that the Trainer has loaded is that of the link which has been reopened
        swap_parameters(optimizer, before, dict(self.chain.link_parameters()), keeps=lambda old, new: True)
        if self.config.lr_span == "restart":
            restart_curve(lr_scheduler, args, spans)

    def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        assert self.schedule is not None
        spans, tied = self.schedule.spans, len(self.chain.links)
        if tied == len(spans):
            self._end()
            return
        if state.global_step < sum(span.steps for span in spans[: tied + 1]):
            return
        before = dict(self.chain.link_parameters())
        self.chain.tie()
        if tied + 1 < len(spans):
            self.chain.extend(spans[tied + 1].rank)
        after = dict(self.chain.link_parameters())
        keep = self.config.optimizer_state == "keep"
        swap_parameters(optimizer, before, after, keeps=lambda old, new: keep and old.shape == new.shape)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.schedule is not None
        if len(self.chain.links) == len(self.schedule.spans):
            self._end()

    def _end(self) -> None:
        """As the last link left it: a Trainer that is resumed at its very end may have taken one step more."""
        drop_open_link(self.chain)
        if self.chain.beside:
            self.chain.beside.set(self.chain.links[-1].also(), "The last link")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.schedule is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_copy(self.chain, checkpoint / FOLDER, {"step": state.global_step, "spans": self._spans()})

    # --- resuming -----------------------------------------------------------------------------------------------------

    def _load_nothing(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """Before the Trainer loads a checkpoint's model file: give every entry the value the model has already."""
        self._loaded |= self._samples(state_dict)
        state_dict.clear()
        state_dict.update(module.state_dict())

    def _resume(self, checkpoint: Path) -> None:
        folder = checkpoint / FOLDER
        if not folder.is_dir():
            raise UserError(
                f"{checkpoint} holds no chain: either it was cut off while being written, then resume from the one "
                "before it; or it was not made in this output_dir, then set output_dir to the folder that holds it."
            )
        if not (checkpoint / "optimizer.pt").exists():
            raise UserError(f"{checkpoint} has no optimizer state (save_only_model), so it cannot be resumed exactly.")
        extra = restore(self.chain, folder)
        if extra["spans"] != self._spans():
            raise UserError(
                f"{checkpoint} belongs to another schedule (links of {[s['steps'] for s in extra['spans']]} steps, now "
                f"{[s['steps'] for s in self._spans()]}): resume with the arguments it was started with."
            )
        for key, values in self._written().items():
            if not torch.equal(self._loaded.get(key, values), values):
                raise UserError(
                    f"{folder} and the checkpoint that is being resumed hold different links: set output_dir to the "
                    "folder that holds the checkpoint."
                )
        self._loaded = {}

    def _written(self) -> dict[str, Tensor]:
        """Samples of what the Trainer's model file holds if it is of this chain: weights with all links in them. Those
        of earlier versions hold weights as they are, and factors."""
        if any(key.rpartition(".")[2] in PARTS or not v.is_floating_point() for key, v in self._loaded.items()):
            return self._samples(self.chain.model.state_dict())
        samples: dict[str, Tensor] = {}
        for name, layer in self.chain.layers.items():
            samples |= self._samples({f"{name}.weight": merged_weight(layer, self.chain.base.merging)})
        return samples

    def _samples(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Some values of every weight and factor of the chain, enough to tell one chain from another."""
        names = {f"{layer}.{part}" for layer in self.chain.layers for part in ("weight", *PARTS)}
        flat = {name: tensors[name].detach().flatten() for name in names if name in tensors}
        return {name: values[:: max(1, len(values) // SAMPLES)].cpu() for name, values in flat.items()}

    def _require_fresh(self, model: nn.Module) -> None:
        modules = set(model.modules())
        if not self.chain.layers or not modules.issuperset(self.chain.layers.values()):
            raise UserError("The chain is not attached to the Trainer's model: give both the same model.")
        if self.chain.links:
            raise UserError(
                f"The chain has {len(self.chain.links)} sealed links already: load the base model again, attach, and "
                "make a new Trainer."
            )

        if self.chain.open_link is not None and self.chain.open_link.starts:
            raise UserError(
                f"The chain's links start with init={self.chain.settings.init}, which changes the weights, so that the "
                "Trainer's checkpoints could not be resumed: use `cola train` for it, or another init."
            )

    def _require_in(self, optimizer: Any) -> None:
        self.chain.require_all_kept()
        held = {p for group in optimizer.param_groups for p in group["params"]}
        left_out = next((name for name, p in self.chain.named_parameters() if p not in held), None)
        if left_out is not None:
            raise UserError(
                f"The Trainer's optimizer does not hold {left_out}, which the chain trains: let the Trainer make it, "
                "or make it from chain.parameters()."
            )

    def _spans(self) -> list[dict[str, int]]:
        assert self.schedule is not None
        return [asdict(span) for span in self.schedule.spans]


def swap_parameters(
    optimizer: Any,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    *,
    keeps: Callable[[nn.Parameter, nn.Parameter], bool],
) -> None:
    """Put the parameters `after` where `before` are in the optimizer's groups, matched by name.

    After the last tie there is none: the old ones stay, without state, so that the groups keep the sizes that a resumed
    Trainer expects.

    keeps: whether the new one (the second) inherits the old one's state; otherwise its own is empty, Adam's `step` too.
    """
    names = {parameter: name for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [after.get(names[p], p) if p in names else p for p in group["params"]]
    for parameter, name in names.items():
        state, heir = optimizer.state.pop(parameter, None), after.get(name)
        if state and heir is not None and keeps(parameter, heir):
            optimizer.state[heir] = state


def restart_curve(scheduler: Any, args: Any, spans: tuple[Span, ...]) -> None:
    """Make the Trainer's learning-rate curve begin anew, and be as long as the span, for every link."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate may have wrapped it
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise UserError(
            f"lr_span is restart, but {type(scheduler).__name__} is not a curve over the steps: choose an "
            "lr_scheduler_type such as linear or cosine, or lr_span='global'."
        )
    curves = [_curve(args, span.steps) for span in spans]
    ends = list(accumulate(span.steps for span in spans))

    def at(step: int) -> float:
        link = next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)
        return float(curves[link](step - ends[link] + spans[link].steps))

    scheduler.lr_lambdas = [at] * len(scheduler.lr_lambdas)
    scheduler._last_lr = [base * at(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def _curve(args: Any, steps: int) -> Any:
    """Step -> share of the learning rate, as the Trainer would make it for a training of that many steps."""
    nobody = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        nobody,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0]


def _require_attached(chain: Chain, method: str) -> None:
    """What a method sets of the links themselves is `attach`'s to do."""
    for key, value in preset([method], {}).get("chain", {}).items():
        if key == "ranks":
            raise UserError(
                f"The method {method} chooses ranks from data, which ChainCallback cannot: attach with rank_pattern="
                "gelora_ranks(...) and scaling='constant', and leave method out; or use `cola train`."
            )
        found = getattr(chain.settings, key)
        if found != value:
            raise UserError(
                f"The method {method} sets {key} to {value!r}, but this chain has {found!r}: attach it with "
                f"{key}={value!r}, or use `cola train`."
            )


def _checked(method: str, schedule: Mapping[str, Any]) -> ScheduleConfig:
    """The section `schedule` of a configuration, checked as one; its length and learning rate are the Trainer's."""
    trainers = {"model": {"name": "the Trainer's"}, "data": {"train": "the Trainer's"}}
    try:
        config = from_dict({**trainers, "chain": {"method": method}, "schedule": {**schedule, "steps": 1}})
    except UserError as error:  # which speaks of a configuration's keys
        raise UserError(re.sub(r"\b(?:schedule|chain)\.(?=[a-z])", "", str(error))) from None
    own = [f"train.{key}" for key in METHODS[method].defaults.get("train", {})]
    own += ["schedule.rewarm"] if config.schedule.rewarm else []
    if config.schedule.optimizer_state not in ("reset", "keep"):
        own.append(f"schedule.optimizer_state: {config.schedule.optimizer_state}")
    if own:
        raise UserError(f"The method {method} sets {', '.join(own)}, which the Trainer cannot do: use `cola train`.")
    return config.schedule

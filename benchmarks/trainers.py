"""One training step's time in two trainers, on the demo's model and data: this library's `train()` and transformers'
`Trainer` on a PEFT model. Everything that a user can set is set alike:

    model, dtype, attention (what from_pretrained gives), threads, adapters on the same modules with the same rank,
    alpha, dropout and initial values; the same batches, tensor by tensor (our collator feeds the Trainer: examples,
    order, padding, mask and position_ids); AdamW (fused) with a constant learning rate, clipping at 1.0;
    no evaluation, saving or logging between the two clock readings; adapters in fp32, which is PEFT's default and ours

What remains is what the two do. PEFT computes the low-rank branch of a bf16 model in fp32 (it casts x up), we in bf16.
The Trainer asks the model for the logits of every position and their loss in fp32, we for those with a label only.

Each call trains afresh from the same start, so that all calls of a side repeat the same steps. The clock runs from the
end of the first step, which allocates, to the end of the last.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor

from cola_fast import assets, attach, config, metrics, models, trainer
from cola_fast.batches import Batch, Feed, collate
from cola_fast.config import Config
from cola_fast.data import load_data
from cola_fast.encode import IGNORE, Example
from cola_fast.peft_format import Factors

from . import harness


@dataclass(frozen=True)
class Times:
    seconds: float  # of every step but the first, together
    losses: list[float]  # of every step, if asked for


class Problem:
    """`steps` optimizer steps of the demo, as one link without a schedule."""

    def __init__(self, steps: int, dtype: str) -> None:
        import transformers

        self.steps = steps
        self.config = _configure(steps, dtype)
        transformers.utils.logging.disable_progress_bar()
        model = models.load_model(self.config.model)
        self.attention = getattr(model.config, "_attn_implementation", "")
        tokenizer = models.load_tokenizer(self.config.model)
        data = load_data(self.config.data, tokenizer, context=models.context_length(model), seed=self.config.train.seed)
        order = islice(self._feed(data.train, data.max_length).sampler, steps)
        self.examples = [data.train[i] for batch in order for row in batch for i in row]
        batches = list(islice(self._feed(data.train, data.max_length), steps))
        self.tokens = sum(batch.tokens for batch in batches[1:])  # between the clock readings
        c = self.config.chain
        chain = attach(model, r=c.r, alpha=c.alpha, targets=c.targets, seed=self.config.train.seed)
        self.initial: dict[str, Factors] = chain.open_factors()

    def _feed(self, examples: list[Example], max_length: int) -> Feed:
        return Feed(examples, self.config.train, max_length=max_length)


def ours(problem: Problem, *, each_loss: bool = False) -> Times:
    """`cola_fast.train`, by its own metrics."""
    log_every = 1 if each_loss else problem.steps
    with tempfile.TemporaryDirectory() as folder:
        chosen = replace(problem.config, out=f"{folder}/run", train=replace(problem.config.train, log_every=log_every))
        trainer.train(chosen, quiet=True)
        rows = [row for row in metrics.read(Path(chosen.out)) if row["event"] == "train"]
    losses = [row["loss"] for row in rows]
    return Times(problem.tokens / rows[-1]["tokens_per_second"], losses)


class _EveryPosition(Feed):
    """Batches that ask for the logits of every position, and for the loss there, ignored where there is no label."""

    def __next__(self) -> Batch:
        batch = super().__next__()
        targets = torch.full_like(batch.input_ids, IGNORE)
        targets[:, batch.positions] = batch.targets
        return replace(batch, positions=torch.arange(targets.shape[1]), targets=targets)


def ours_all_logits(problem: Problem) -> Times:
    """Our trainer without its leaving out of logits, to see what that is worth."""
    with patch.object(trainer, "Feed", _EveryPosition):
        return ours(problem)


def theirs(problem: Problem, *, each_loss: bool = False) -> Times:
    """`transformers.Trainer` on a PEFT model, by a callback that reads the clock."""
    import transformers

    clock = _clock()
    with tempfile.TemporaryDirectory() as folder:
        run = transformers.Trainer(
            model=peft_model(problem.config, problem.initial),
            args=_arguments(problem, folder, logging_steps=1 if each_loss else problem.steps),
            train_dataset=problem.examples,
            data_collator=inputs,
            callbacks=[clock],
        )
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    return Times(clock.ends[-1] - clock.ends[0], losses)


def _configure(steps: int, dtype: str) -> Config:
    raw = yaml.safe_load(resources.files("cola_fast").joinpath("demo.yaml").read_text(encoding="utf-8"))
    raw["model"] |= {"name": str(assets.smollm2()), "dtype": dtype}
    raw["data"] |= {"train": str(assets.sentiment()["train"]), "eval": None, "test": None, "eval_share": 0.0}
    raw["chain"] |= {"rounding": "nearest"}  # the knot is not timed: the quicker one
    raw["schedule"] |= {"links": 1, "epochs": None, "steps": steps, "lr_shape": "constant", "warmup": 0.0}
    raw["train"] |= {"save_every": steps + 1}
    return config.from_dict(raw)


def peft_model(config: Config, initial: Mapping[str, Factors]) -> Any:
    """The model of `config` with PEFT's adapters in the places and with the values of `initial`."""
    import peft

    c = config.chain
    lora = peft.LoraConfig(
        r=c.r,
        lora_alpha=c.alpha,
        target_modules=c.targets,
        lora_dropout=c.dropout,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(models.load_model(config.model), lora)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    if layers.keys() != initial.keys():
        raise harness.ParityError("PEFT puts adapters on other modules than we do.")
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(initial[name].a)
        layer.lora_B["default"].weight.data.copy_(initial[name].b)
    return model


def _arguments(problem: Problem, folder: str, *, logging_steps: int) -> Any:
    import transformers

    t = problem.config.train
    return transformers.TrainingArguments(
        output_dir=folder,
        max_steps=problem.steps,
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.accumulation,
        train_sampling_strategy="sequential",
        learning_rate=problem.config.schedule.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=t.betas[0],
        adam_beta2=t.betas[1],
        adam_epsilon=t.eps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.clip,
        seed=t.seed,
        use_cpu=harness.device().type == "cpu",
        dataloader_pin_memory=harness.device().type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=logging_steps,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def inputs(examples: list[Example]) -> dict[str, Tensor]:
    """A batch of ours as a model of transformers takes it: the token at i + 1 is the label of place i + 1."""
    batch = collate([[example] for example in examples])
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels[:, batch.positions + 1] = batch.targets
    given = {"input_ids": batch.input_ids, "labels": labels}
    optional = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return given | {name: tensor for name, tensor in optional.items() if tensor is not None}


def _clock() -> Any:
    import transformers

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, state.max_steps):
                harness.synchronize()
                self.ends.append(time.perf_counter())

    return Clock()

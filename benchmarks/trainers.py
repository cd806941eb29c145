"""One training run in several trainers: this library's `train()` and others. Everything a user can set is set alike:

    model, dtype, attention implementation, threads, adapters on the same modules with the same rank, alpha, dropout
    and initial values; the same batches, tensor by tensor (our collator feeds the others: examples, order, padding,
    mask, position_ids and packing); AdamW (fused) with a constant learning rate, clipping at 1.0; activation
    checkpointing on both sides or on none; no evaluation or saving between two clock readings; adapters in fp32, which
    is PEFT's default and ours

PEFT's prepare_model_for_kbit_training is left out: it would make the head and the norms fp32 on one side only.
What remains is what they do. PEFT computes the low-rank branch of a bf16 model in fp32 (it casts x up), we in bf16.
transformers' Trainer asks for the logits of every position and their loss in fp32, we for those with a label only.

    ours              cola_fast.train
    ours_all_logits   the same, made to compute every logit, to see what leaving them out is worth
    peft              transformers' Trainer on a PEFT model
    liger             the same with use_liger_kernel: fused loss, RMSNorm, RoPE and SwiGLU. Ours has none of Liger
    trl               TRL's SFTTrainer on a PEFT model
    unsloth           its model and its LoRA in transformers' Trainer; its own initial values
    full              transformers' Trainer on every weight of the model, in the model's dtype: another training

Each call trains afresh from the same start, so that all calls of a side repeat the same steps. The clock is read at the
end of the first step, which allocates, and of every `span` steps.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from cola_fast import attach
from cola_fast.config import Config
from cola_fast.data.batches import Batch, Feed, collate
from cola_fast.data.encode import IGNORE, Example
from cola_fast.data.rows import load_data
from cola_fast.training import metrics, models, prepare, trainer

from . import harness

Watch = Callable[[nn.Module], nn.Module]  # is shown the loaded model, before anything is attached to it


@dataclass(frozen=True)
class Times:
    samples: list[float]  # seconds a step, of each span
    losses: list[float]  # of the first step, then the mean of the steps of each span


class Problem:
    """A configuration's steps and batches: `config.schedule.steps` of them, read by the clock every `span`."""

    def __init__(self, config: Config, span: int | None = None) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        steps = config.schedule.steps
        assert steps is not None
        self.config, self.steps, self.span = config, steps, span or steps
        self.marks = sorted({1, *range(self.span, steps + 1, self.span)})
        empty = models.load_empty_model(config.model)
        self.attention = str(getattr(empty.config, "_attn_implementation", ""))
        tokenizer = models.load_tokenizer(config.model)
        data = load_data(config.data, tokenizer, context=models.context_length(empty), seed=config.train.seed)
        batches = islice(Feed(data.train, config.train, max_length=data.max_length).sampler, steps)
        self.rows = [[data.train[i] for i in row] for batch in batches for row in batch]
        size = config.train.batch_size
        self.tokens = [
            sum(len(example) for row in self.rows[i * size : (i + 1) * size] for example in row) for i in range(steps)
        ]

    @property
    def tokens_per_step(self) -> float:
        """Of the steps that are timed."""
        return sum(self.tokens[1:]) / max(1, self.steps - 1)


Side = Callable[[Problem, Watch], Times]


def ours(problem: Problem, watch: Watch = lambda model: model) -> Times:
    """`cola_fast.train`, by its own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        every_span = replace(problem.config.train, log_every=problem.span)
        chosen = replace(problem.config, out=f"{folder}/run", train=every_span)
        with patch.object(prepare, "load_model", lambda *given: watch(models.load_model(*given))):
            trainer.train(chosen, quiet=True)
        rows = [row for row in metrics.read(Path(chosen.out)) if row["event"] == "train"]
    spans = zip(pairwise(problem.marks), rows[1:], strict=False)
    seconds = [sum(problem.tokens[i:j]) / row["tokens_per_second"] / (j - i) for (i, j), row in spans]
    return Times(seconds, [row["loss"] for row in rows])


class _EveryPosition(Feed):
    """Batches that ask for the logits of every position, and for the loss there, ignored where there is no label."""

    def __next__(self) -> Batch:
        batch = super().__next__()
        targets = torch.full_like(batch.input_ids, IGNORE)
        targets[:, batch.positions] = batch.targets
        return replace(batch, positions=torch.arange(targets.shape[1]), targets=targets)


def ours_all_logits(problem: Problem, watch: Watch = lambda model: model) -> Times:
    with patch.object(prepare, "Feed", _EveryPosition):
        return ours(problem, watch)


def peft(problem: Problem, watch: Watch = lambda model: model) -> Times:
    return _run_trainer(problem, peft_model(problem.config, watch))


def liger(problem: Problem, watch: Watch = lambda model: model) -> Times:
    return _run_trainer(problem, peft_model(problem.config, watch), use_liger_kernel=True)


def trl(problem: Problem, watch: Watch = lambda model: model) -> Times:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def collator(items: list[dict[str, int]]) -> dict[str, Tensor]:
        given = inputs([problem.rows[item["row"]] for item in items])
        if not {"attention_mask", "position_ids"} & set(given):  # TRL wants one of them, also where it says nothing
            given["position_ids"] = torch.arange(given["input_ids"].shape[1])[None]
        return given

    with tempfile.TemporaryDirectory() as folder:
        run = SFTTrainer(
            model=peft_model(problem.config, watch),
            args=SFTConfig(**_arguments(problem, folder), dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_dict({"row": list(range(len(problem.rows)))}),
            processing_class=models.load_tokenizer(problem.config.model),
            data_collator=collator,
            callbacks=[clock := _clock(problem)],
        )
        return _timed(problem, run, clock)


def unsloth(problem: Problem, watch: Watch = lambda model: model) -> Times:
    from unsloth import FastLanguageModel

    m, c, t = problem.config.model, problem.config.chain, problem.config.train
    model, _ = FastLanguageModel.from_pretrained(
        m.name,
        max_seq_length=problem.config.data.max_length,
        dtype=torch.bfloat16,
        load_in_4bit=m.load_in_4bit,
    )
    lora = FastLanguageModel.get_peft_model(
        watch(model),
        r=c.r,
        lora_alpha=c.alpha,
        lora_dropout=c.dropout,
        use_gradient_checkpointing=t.activation_checkpointing,
    )
    return _run_trainer(problem, lora)


def full(problem: Problem, watch: Watch = lambda model: model) -> Times:
    if problem.config.model.load_in_4bit:
        raise harness.NotComparable("4-bit weights cannot be trained")
    return _run_trainer(problem, watch(models.load_model(problem.config.model)))


SIDES: dict[str, Side] = {
    "ours": ours,
    "ours_all_logits": ours_all_logits,
    "peft": peft,
    "liger": liger,
    "trl": trl,
    "unsloth": unsloth,
    "full": full,
}
TITLES = {
    "ours": "cola_fast",
    "ours_all_logits": "cola_fast, made to compute all logits",
    "peft": "transformers Trainer + PEFT",
    "liger": "transformers Trainer + PEFT + Liger",
    "trl": "TRL SFTTrainer + PEFT",
    "unsloth": "Unsloth",
    "full": "Trainer, full fine-tuning",
}
SAME_START = ("ours", "ours_all_logits", "peft", "liger", "trl")  # these follow the same losses
PATCHES = {"liger": "liger_kernel", "unsloth": "unsloth"}  # these change transformers for the rest of the process


def missing(side: str, device: torch.device) -> str | None:
    """Why a side cannot be measured here, if so."""
    package = PATCHES.get(side, "trl" if side == "trl" else "transformers" if side == "full" else "peft")
    if not side.startswith("ours") and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "needs a GPU" if side in PATCHES and device.type == "cpu" else None


# --- pieces -----------------------------------------------------------------------------------------------------------


def peft_model(config: Config, watch: Watch = lambda model: model) -> Any:
    """PEFT's adapters with the initial values that ours have."""
    import peft as library

    c = config.chain
    lora = library.LoraConfig(
        r=c.r, lora_alpha=c.alpha, target_modules=_as_peft_takes(c.targets), lora_dropout=c.dropout,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = watch(models.load_model(config.model))
    chain = attach(model, r=c.r, alpha=c.alpha, targets=c.targets, seed=config.train.seed)
    initial = chain.open_factors()
    chain.detach(discard=True)
    wrapped = library.get_peft_model(model, lora)
    layers = {name: layer for name, layer in wrapped.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    if layers.keys() != initial.keys():
        raise harness.ParityError("PEFT puts adapters on other modules than we do.")
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(initial[name].a)
        layer.lora_B["default"].weight.data.copy_(initial[name].b)
    return wrapped


def _as_peft_takes(targets: str | Sequence[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def _run_trainer(problem: Problem, model: Any, **arguments: Any) -> Times:
    """`transformers.Trainer`, by a callback that reads the clock."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        run = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**_arguments(problem, folder), **arguments),
            train_dataset=problem.rows,
            data_collator=inputs,
            callbacks=[clock := _clock(problem)],
        )
        return _timed(problem, run, clock)


def _timed(problem: Problem, run: Any, clock: Any) -> Times:
    import transformers

    run.remove_callback(transformers.PrinterCallback)
    run.train()
    spans = zip(pairwise(clock.ends), pairwise(problem.marks), strict=True)
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    return Times([(end - start) / (j - i) for (start, end), (i, j) in spans], losses)


def _arguments(problem: Problem, folder: str) -> dict[str, Any]:
    t = problem.config.train
    return {
        "output_dir": folder,
        "max_steps": problem.steps,
        "per_device_train_batch_size": t.batch_size,
        "gradient_accumulation_steps": t.accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": problem.config.schedule.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": t.betas[0],
        "adam_beta2": t.betas[1],
        "adam_epsilon": t.eps,
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.clip,
        "gradient_checkpointing": t.activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": t.seed,
        "bf16": False,  # the weights have their dtype; autocast would be another training
        "use_cpu": harness.device().type == "cpu",
        "dataloader_pin_memory": harness.device().type == "cuda",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_steps": problem.span,
        "logging_first_step": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def inputs(rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
    """A batch of ours as a model of transformers takes it: the token at i + 1 is the label of place i + 1."""
    batch = collate(rows)
    assert batch.positions is not None
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels[:, batch.positions + 1] = batch.targets
    given = {"input_ids": batch.input_ids, "labels": labels}
    optional = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return given | {name: tensor for name, tensor in optional.items() if tensor is not None}


def _clock(problem: Problem) -> Any:
    import transformers

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in problem.marks:
                harness.synchronize()
                self.ends.append(time.perf_counter())

    return Clock()

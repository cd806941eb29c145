"""Trains with transformers' Trainer, or TRL's SFTTrainer and RewardTrainer, in child processes, and kills them. Run by
test_callback.py.

Everything heavy is imported once; each command, a JSON line on stdin, forks a child.
Answers {"killed": bool, "code": n}.

    {"trainer": "transformers" | "classifier" | "trl" | "reward", "model": folder, "out": folder, "resume": bool,
     "kill": "step_end 5" | null}

kill: the event and the step at which the child gets SIGKILL; `step_end` is after the callback has done its part,
`save` before it has, `copied` in the middle of its part. A child that ends writes its links' hashes to OUT/links.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch

torch.set_num_threads(1)

import datasets
import transformers
import trl
from transformers import Trainer, TrainerCallback, TrainingArguments

import cola_fast
from cola_fast.chain import copies
from cola_fast.training import callback
from tests.cola.trainer_runs import CHAT_TEMPLATE, COMMON, labelled_rows, token_rows

transformers.utils.logging.disable_progress_bar()


class Killer(TrainerCallback):
    def __init__(self, when: str) -> None:
        self.event, step = when.split()
        self.step = int(step)

    def reached(self, event: str, state: Any) -> None:
        if (event, state.global_step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reached("step_end", state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.reached("save", state)
        if (self.event, self.step) == ("copied", state.global_step):

            class DyingOs:
                rename = staticmethod(lambda *_: os.kill(os.getpid(), signal.SIGKILL))

            copies.os = DyingOs  # type: ignore[assignment]


def train(command: dict[str, Any]) -> None:
    kind, folder = command["trainer"], command["model"]
    torch.manual_seed(1 if command["resume"] else 0)  # a fresh head of another process is another one
    keys: dict[str, Any] = {"r": 2, "alpha": 4, "dropout": 0.1}
    if kind in ("classifier", "reward"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1 if kind == "reward" else 3, pad_token_id=1
        )
        keys["train_also"] = "score"
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chain = cola_fast.attach(model, **keys)
    ours = callback.ChainCallback(chain, links=3)
    killer = Killer(command["kill"] or "never 0")
    callbacks = [ours, killer] if killer.event == "step_end" else [killer, ours]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.chat_template = "</s>", CHAT_TEMPLATE
    trainer: Any
    if kind in ("transformers", "classifier"):
        rows, few = (labelled_rows(), labelled_rows(8)) if kind == "classifier" else (token_rows(), token_rows(8))
        trainer = Trainer(
            model=model, args=TrainingArguments(command["out"], **COMMON), train_dataset=rows, eval_dataset=few,
            callbacks=callbacks,
        )  # fmt: skip
    else:
        make, arguments, data = {
            "trl": (trl.SFTTrainer, trl.SFTConfig, {"messages": [turns(i) for i in range(48)]}),
            "reward": (
                trl.RewardTrainer,
                trl.RewardConfig,
                {key: [turns(i + by) for i in range(48)] for key, by in (("chosen", 0), ("rejected", 3))},
            ),
        }[kind]
        few = {key: values[:8] for key, values in data.items()}
        trainer = make(
            model=model, args=arguments(command["out"], bf16=False, **COMMON), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict(data), eval_dataset=datasets.Dataset.from_dict(few),
            callbacks=callbacks,
        )  # fmt: skip
    trainer.train(resume_from_checkpoint=command["resume"])
    Path(command["out"], "links.json").write_text(json.dumps([link.sha256 for link in chain.links]))


def turns(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"w{i} w{i + 1}"}, {"role": "assistant", "content": f"w{i + 2} good"}]


def run(command: dict[str, Any]) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # stdout belongs to the protocol
        try:
            train(command)
            os._exit(0)
        except cola_fast.UserError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return {"killed": os.WIFSIGNALED(status), "code": os.WEXITSTATUS(status)}


if __name__ == "__main__":
    _ = (
        trl.SFTTrainer,
        trl.SFTConfig,
        trl.RewardTrainer,
        trl.RewardConfig,
    )  # imported when first asked for: have them before the first fork
    warm = False
    for line in sys.stdin:
        command = json.loads(line)
        if not warm:  # the model's own module, too
            transformers.AutoModelForCausalLM.from_pretrained(command["model"])
            warm = True
        print(json.dumps(run(command)), flush=True)

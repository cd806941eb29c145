"""The configuration: one tree of frozen dataclasses. YAML, `key=value` overrides and RUN/config.yaml all come from it.

Reading order: the dataclasses are the documentation of every key; `load` builds a tree from a file and overrides,
`to_yaml` turns it back. Nothing here imports torch, so `cola --help` stays fast.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from . import config_tree, plain_yaml
from .errors import UserError, reason, shown
from .methods import SLOTS, preset
from .methods.options import ChainOptions

LONGEST = 1_000_000  # characters of a configuration file


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise UserError(sentence)


def _require_positive(section: str, **values: float | None) -> None:
    for key, value in values.items():
        _require(
            value is None or value > 0, f"{section}.{key} is {value}, but it must be positive, or null to turn it off."
        )


@dataclass(frozen=True)
class ModelConfig:
    name: str = ""  # a folder, or a name on the Hugging Face hub
    revision: str | None = None
    load_in_4bit: bool = False  # quantise the linear layers to NF4 with double quantisation, as QLoRA does
    load_in_8bit: bool = False  # quantise them to bitsandbytes' LLM.int8
    task: Literal["causal-lm", "sequence-classification", "token-classification"] = "causal-lm"
    labels: tuple[str | int, ...] = ()  # of a classifying task: the classes, in the order of the head's outputs
    gguf_file: str | None = None  # a GGUF file inside that folder or repository
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device multiplies it natively, else fp32
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    attention: str | None = None  # transformers' attn_implementation: sdpa, eager, flash_attention_2
    trust_remote_code: bool = False

    def check(self) -> None:
        _require(bool(self.name), "model.name is missing: name a folder or a model on the hub.")
        if self.task == "causal-lm":
            _require(
                not self.labels, "model.labels names classes, but model.task is causal-lm: set a task that classifies."
            )
        else:
            _require(
                len(set(map(str, self.labels))) == len(self.labels) > 1,
                f"model.task is {self.task}, but model.labels does not name at least two different classes: list them "
                "in the order of the head's outputs.",
            )


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...] | str = ""  # files (jsonl, csv, txt, ...), patterns, folders, hub data sets: one, or a list
    eval: tuple[str, ...] | str | None = None  # the same; without it `eval_share` of the training rows is held out
    test: tuple[str, ...] | str | None = None  # used by `cola eval` (falls back to eval)
    eval_share: float = 0.05
    hub_config: str | None = None  # a hub data set's configuration name
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str = "test"
    format: Literal["auto", "text", "completion", "messages", "classification"] = "auto"
    columns: dict[str, str] | None = None  # known name -> your column: {prompt: question, completion: answer}
    template: str = "{text}"  # classification, or beside `response`: the prompt, with columns in braces
    response: str | None = None  # what to learn after the template's prompt, with columns in braces: "{answer}"
    learn: Literal["assistant", "all", "last"] = "assistant"  # messages: the assistant's turns, all, or its last one
    label_column: str = "label"
    words_column: str = "tokens"  # token-classification: lists of words; label_column has a list of labels for them
    verbalisers: dict[str, str] | None = None  # classification: label -> the words that stand for it
    text_unit: Literal["paragraph", "line", "file"] = "paragraph"  # what is one text of a .txt file
    max_length: int = 1024  # tokens
    too_long: Literal["truncate", "drop", "error"] = "truncate"  # the count is always reported
    limit: int | None = None  # use only the first rows

    def check(self) -> None:
        _require(bool(self.train), "data.train is missing: name a jsonl, csv or parquet file or a hub data set.")
        for key, given in (("train", self.train), ("eval", self.eval), ("test", self.test)):
            several = isinstance(given, tuple)
            _require(
                not several or bool(given and all(given)),
                f"data.{key} is {shown(given)}, but a list names at least one file, and no empty one.",
            )
        _require(self.max_length >= 2, f"data.max_length is {self.max_length}, but it must be at least 2 tokens.")
        share = self.eval_share
        _require(0 <= share < 1, f"data.eval_share is {share}, but it is a share of the rows in [0, 1).")
        _require_positive("data", limit=self.limit)
        _require(
            self.format != "classification" or bool(self.verbalisers and len(self.verbalisers) > 1),
            "data.format is classification, but data.verbalisers does not give the words of at least two labels.",
        )


@dataclass(frozen=True)
class GeLoRAConfig:
    examples: int = 1000  # of the training set, whose hidden states are looked at
    mean_rank: float | None = None  # rescale the ranks to this mean; as they come out when absent
    every_link: bool = False  # estimate again at every knot


@dataclass(frozen=True)
class ChainConfig(ChainOptions):
    method: str | tuple[str, ...] = "cola"  # one or several of `cola methods`; each fills in defaults for other keys
    ranks: str = "uniform"  # uniform or gelora
    gelora: GeLoRAConfig = field(default_factory=GeLoRAConfig)
    calibration: int = 32  # init: eva or lora-ga: training examples that each link's start looks at

    def check(self, section: str = "chain.") -> None:
        super().check(section)
        mean = self.gelora.mean_rank
        _require(mean is None or mean >= 1, f"{section}gelora.mean_rank is {mean}, but a rank is at least 1.")
        _require(len(self.targets) > 0, f"{section}targets is empty: name at least one module, or all-linear.")
        for where, count in (("gelora.examples", self.gelora.examples), ("calibration", self.calibration)):
            _require(count >= 1, f"{section}{where} is {count}, but it must be at least 1.")


@dataclass(frozen=True)
class ScheduleConfig:
    links: int = 1
    epochs: float | None = None  # over the whole chain; exactly one of epochs and steps
    steps: int | None = None
    shares: tuple[float, ...] | None = None  # relative length of each link; equal when absent
    ranks: tuple[int, ...] | None = None  # rank of each link; chain.r when absent
    plateau: int | None = None  # end a link after this many evaluations without a better loss
    lr: float = 1e-3
    lr_span: Literal["global", "restart"] = "global"  # one curve over the chain, or one per link
    lr_shape: Literal["linear", "cosine", "constant"] = "linear"
    lr_end: float = 0.0  # share of lr at the end of the span
    warmup: float = 0.0  # below 1: share of the span; otherwise steps
    rewarm: int = 0  # steps of a warm-up of each later link, back to the global curve
    optimizer_state: str = "reset"  # at a tie: reset, keep, prune-magnitude or prune-random; of equal ranks only
    prune: float = 0.9  # prune-...: the share of the optimizer's moments that is zeroed

    def check(self) -> None:
        for key, share in (("prune", self.prune), ("lr_end", self.lr_end)):
            _require(0 <= share <= 1, f"schedule.{key} is {share}, but it is a share between 0 and 1.")
        _require(
            self.rewarm == 0 or self.lr_span == "global",
            "schedule.rewarm returns to the global learning-rate curve: set schedule.lr_span to global, or use warmup.",
        )
        links = self.links
        _require(
            1 <= links <= 10_000, f"schedule.links is {links}, but a chain has at least 1 link and at most 10,000."
        )
        _require(
            (self.epochs is None) != (self.steps is None),
            "Give the chain's whole length once: either schedule.epochs or schedule.steps"
            + (", not both." if self.epochs is not None else "."),
        )
        length = self.steps if self.steps is not None else self.epochs
        _require(length is not None and length > 0, f"schedule's length is {length}, but it must be positive.")
        for key, values in (("shares", self.shares), ("ranks", self.ranks)):
            if values is not None:
                _require(
                    len(values) == links,
                    f"schedule.{key} has {len(values)} entries, but schedule.links is {links}: give one for each link.",
                )
                _require(min(values) > 0, f"schedule.{key} is {list(values)}, but every entry must be positive.")
        _require(self.lr > 0, f"schedule.lr is {self.lr}, but it must be positive.")
        for key, count in (("warmup", self.warmup), ("rewarm", self.rewarm)):
            _require(count >= 0, f"schedule.{key} is {count}, but it must not be negative.")
        _require_positive("schedule", plateau=self.plateau)


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 8  # sequences per forward pass
    accumulation: int = 1  # forward passes per optimizer step; several processes share them
    packing: bool = False  # concatenate sequences into rows of max_length, attention kept block-diagonal
    group_by_length: bool = True
    optimizer: str = "adamw"  # or adam (weight_decay: an L2 penalty), adamw-8bit, paged-adamw(-8bit), lora-rite
    gradient: str | None = None  # change A's and B's gradients: lora-pro or orthogonal
    perturb: str | None = None  # take the loss at noisy weights: flat-lora
    sigma: float = 0.05  # perturb: the noise's norm over the weight's, row by row, at the end of the run
    after_step: str | None = None  # change the gates after the optimizer's step: adalora or sora
    penalty: float = 0.0  # weight of a method's own term in the loss: gradient orthogonal, after_step sora
    budget: float = 1.0  # after_step: adalora: the share of a link's directions that is left at its end
    lr_ratio: float = 1.0  # learning rate of B over that of A
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0  # gradient norm
    activation_checkpointing: bool = False
    shard: bool = False  # of several processes, each keeps its share of the base's weights (FSDP2), not all of them
    use_liger: bool = False  # liger-kernel's norms, RoPE, SwiGLU and loss; off, with a note, where there is no GPU
    seed: int = 0
    eval_every: int | None = None  # steps; the end of every link is always evaluated
    eval_batch_size: int = 16
    early_stop: int | None = None  # end training after this many evaluations without a better loss
    save_every: int = 100  # steps; a checkpoint is also written at every knot
    log_every: int = 5
    loggers: tuple[Literal["tensorboard", "trackio"], ...] = ()

    def check(self) -> None:
        for key in ("lr_ratio", "eps"):
            _require(getattr(self, key) > 0, f"train.{key} is {getattr(self, key)}, but it must be positive.")
        for key in ("weight_decay", "sigma", "penalty"):
            _require(getattr(self, key) >= 0, f"train.{key} is {getattr(self, key)}, but it must not be negative.")
        _require(
            all(0 <= beta < 1 for beta in self.betas), f"train.betas is {list(self.betas)}, but both are in [0, 1)."
        )
        _require(
            0 < self.budget <= 1,
            f"train.budget is {self.budget}, but it is a share of directions, above 0 and at most 1.",
        )
        rows = self.accumulation
        _require(rows <= 1_000_000, f"train.accumulation is {rows}, but it is at most 1,000,000.")
        for key in ("batch_size", "accumulation", "save_every", "log_every", "eval_batch_size"):
            _require(getattr(self, key) >= 1, f"train.{key} is {getattr(self, key)}, but it must be at least 1.")
        _require_positive("train", eval_every=self.eval_every, early_stop=self.early_stop, clip=self.clip)


@dataclass(frozen=True)
class Config:
    out: str = "runs/cola"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, fill in the method's preset, check everything."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL in it
        raise UserError(f"{path} cannot be read as a YAML configuration: {reason(error)}.") from None
    if len(text) > LONGEST:
        raise UserError(f"{path} has more than {LONGEST} characters, but a configuration is short: name a YAML file.")
    try:
        raw = plain_yaml.parse(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line} is not valid YAML: {plain_yaml.problem(error)}.") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, but a configuration is a mapping of keys to values.")
    return from_dict(raw, overrides)


def from_dict(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The same from a mapping of the YAML's shape."""
    chosen = copy.deepcopy(dict(raw))
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{shown(item)} is not an override: write key=value, for example schedule.lr=1e-3.")
        try:
            config_tree.assign(chosen, config_tree.full_key(Config, key.strip()), plain_yaml.parse(value))
        except yaml.YAMLError as error:
            problem = plain_yaml.problem(error)
            raise UserError(f"{shown(item)} is not valid YAML ({problem}): put the value in quotes.") from None
    chain = chosen.get("chain")
    method = chain.get("method", ChainConfig.method) if isinstance(chain, dict) else ChainConfig.method
    names = method if isinstance(method, (list, tuple)) else [method]
    if isinstance(chain, dict) and len(names) == 1:
        chain["method"] = names[0]  # [cola] is cola, also to a run that is resumed
    config: Config = config_tree.build(
        Config,
        config_tree.merge(preset([name if isinstance(name, str) else shown(name) for name in names], chosen), chosen),
    )
    config = _at_home(config)
    validate(config)
    return config


def _at_home(config: Config) -> Config:
    """`~` as a shell reads it, in files and folders: in a YAML file, or behind a =, no shell has."""
    d = config.data

    def home(given: Any) -> Any:
        return tuple(map(home, given)) if isinstance(given, tuple) else given and os.path.expanduser(given)

    data = replace(d, train=home(d.train), eval=home(d.eval), test=home(d.test))
    return replace(config, out=os.path.expanduser(config.out), data=data)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config_tree.to_dict(config), sort_keys=False, allow_unicode=True)


def validate(config: Config) -> None:
    """Rules that types cannot say: each section's own, then those between sections. Each failure names its key."""
    for part in (config.model, config.data, config.chain, config.schedule, config.train):
        part.check()
    for slot in SLOTS:
        section, key = slot.key.split(".")
        name = getattr(getattr(config, section), key)
        if name is not None:
            slot.choose(name)
    _check_together(config)
    _check_task(config)


def _check_together(config: Config) -> None:
    m, d, c, s, t = config.model, config.data, config.chain, config.schedule, config.train
    rules = (
        (
            t.gradient is None or c.frozen is None,
            f"train.gradient is {t.gradient}, which needs both factors trained: set chain.frozen to null.",
        ),
        (
            t.after_step is None or c.gate is not None,
            f"train.after_step is {t.after_step}, which changes gates: set chain.gate.",
        ),
        (
            c.share == 1 or s.optimizer_state == "reset",
            f"schedule.optimizer_state is {s.optimizer_state}, but with chain.share below 1 links cover different "
            "modules: set it to reset.",
        ),
        (
            not (s.optimizer_state.startswith("prune") and t.optimizer not in ("adamw", "adam")),
            f"schedule.optimizer_state is {s.optimizer_state}, which prunes PyTorch's moments: use train.optimizer "
            "adamw.",
        ),
        (
            c.ranks == "uniform" or s.ranks is None,
            f"chain.ranks is {c.ranks}, which decides the rank of every module: leave schedule.ranks out.",
        ),
        (
            not (c.base == "dense" and m.load_in_4bit),
            "chain.base is dense, but model.load_in_4bit is set: use nf4, ledger or auto.",
        ),
        (
            not (t.shard and m.load_in_4bit),
            "train.shard is for 16- and 32-bit weights, but model.load_in_4bit is set: leave one of them out (without "
            "shard every process holds the whole 4-bit model).",
        ),
        (
            not t.shard or c.ranks == "uniform",
            f"train.shard is set, but chain.ranks is {c.ranks}, which looks into the model: run `cola ranks`, paste "
            "what it finds, or leave train.shard out.",
        ),
        (
            s.plateau is None or t.eval_every is not None,
            "schedule.plateau ends a link by its evaluations, but train.eval_every is not set: set both.",
        ),
        (
            d.template == DataConfig.template
            or bool(d.verbalisers)
            or d.response is not None
            or m.task == "sequence-classification",
            "data.template makes prompts, but neither data.verbalisers nor data.response is there: give the words of "
            "the labels, or what follows the prompt, such as '{answer}'.",
        ),
        (
            d.response is None or (not d.verbalisers and d.format in ("auto", "completion")),
            "data.response makes completions: leave data.verbalisers out, and data.format auto or completion.",
        ),
        (
            not d.columns or (not d.verbalisers and d.response is None and d.format != "classification"),
            "data.columns maps columns to known names, but data.template names columns itself: leave one of them out.",
        ),
    )
    for holds, sentence in rules:
        _require(holds, sentence)


def _check_task(config: Config) -> None:
    m, d, t = config.model, config.data, config.train
    if m.task == "causal-lm":
        return
    for holds, what in (
        (d.format == "auto", f"data.format is {d.format}"),
        (not d.verbalisers, "data.verbalisers is set"),
        (not d.columns, "data.columns is set"),
        (d.response is None, "data.response is set"),
        (d.learn == "assistant", f"data.learn is {d.learn}"),
        (not t.packing, "train.packing is set"),
        (config.chain.ranks == "uniform", f"chain.ranks is {config.chain.ranks}"),
        (not t.shard, "train.shard is set"),
    ):
        _require(holds, f"{what}, which model.task {m.task} has no use for: leave it out.")

"""ChainCallback in a real Trainer and a real SFTTrainer: the same links, killed and resumed or not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import cola_fast
from cola_fast import ChainCallback, UserError, attach, load_chain

from ..conftest import disturb, snapshot, tiny_llama
from .conftest import served
from .trainer_runs import COMMON, token_rows

SHORT = {**COMMON, "max_steps": 6, "eval_strategy": "no", "gradient_accumulation_steps": 1, "save_total_limit": None}


class Spy(TrainerCallback):
    """What the optimizer holds after each step, once the chain's callback has done its part."""

    def __init__(self, chain: Any) -> None:
        self.chain = chain
        self.states: list[int] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held.issuperset(self.chain.parameters())
        assert set(optimizer.state) <= held
        self.states.append(sum(len(optimizer.state.get(p, ())) for p in self.chain.parameters()))


def make(
    out: Path, model: nn.Module | None = None, *, keys: Any = None, callback: Any = None, **arguments: Any
) -> tuple[Any, Any, Spy]:
    model = tiny_llama() if model is None else model
    chain = attach(model, **{"r": 2, "alpha": 4, "dropout": 0.1, **(keys or {})})
    spy = Spy(chain)
    ours = ChainCallback(chain, **{"links": 3, **(callback or {})})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(out), **{**SHORT, **arguments}),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8),
        callbacks=[ours, spy],
    )
    return trainer, chain, spy


def hashes(chain: Any) -> list[str]:
    return [link.sha256 for link in chain.links]


# --- killed -----------------------------------------------------------------------------------------------------------


ONE_WORKER = pytest.mark.xdist_group("trainers")  # they share a process that imports TRL, and whole runs


@pytest.fixture(scope="module")
def worker() -> Iterator[Callable[..., dict[str, Any]]]:
    with served("tests.cola.trainer_worker", resume=False, kill=None) as run:
        yield run


@pytest.fixture(scope="module")
def whole(
    worker: Callable[..., dict[str, Any]], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The command of a run that was never killed, made once for each trainer."""

    @functools.cache
    def run(kind: str) -> dict[str, Any]:
        command = {"trainer": kind, "model": str(tiny_folder), "out": str(tmp_path_factory.mktemp("whole") / kind)}
        assert worker(**command) == {"killed": False, "code": 0}
        return command

    return run


def links(out: Path | str) -> list[str]:
    found: list[str] = json.loads((Path(out) / "links.json").read_text())
    return found


@pytest.mark.slow
@ONE_WORKER
@pytest.mark.parametrize("kind", ["transformers", "trl", "classifier", "reward"])
def test_killed_and_resumed(
    kind: str, worker: Callable[..., dict[str, Any]], whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """9 steps, knots after 3, 6 and 9, checkpoints after every second: killed in a link, at a knot, and at the end. A
    link's hash is of the head too, where one is trained: that of a resumed process starts at other numbers."""
    done = whole(kind)
    expected = links(done["out"])
    assert len(set(expected)) == 3
    assert len(list(Path(done["out"]).glob("checkpoint-*"))) == 2
    for when in ("step_end 3", "step_end 6", "step_end 7") if kind == "transformers" else ("step_end 5",):
        out = tmp_path / when
        command = {**done, "out": str(out)}
        assert worker(**command, kill=when)["killed"]
        assert worker(**command, resume=True) == {"killed": False, "code": 0}
        assert links(out) == expected
    assert worker(**done, resume=True) == {"killed": False, "code": 0}  # of a finished run
    assert links(done["out"]) == expected


@pytest.mark.slow
@ONE_WORKER
@pytest.mark.parametrize("when", ["save 6", "copied 6"])
def test_a_checkpoint_that_was_cut_off_is_refused(
    when: str, worker: Callable[..., dict[str, Any]], whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """The Trainer takes the newest folder, whole or not; the one before it still leads to the same links."""
    done = whole("transformers")
    command = {**done, "out": str(tmp_path / "out")}
    assert worker(**command, kill=when)["killed"]
    before = snapshot(tmp_path)
    assert worker(**command, resume=True) == {"killed": False, "code": 2}
    assert snapshot(tmp_path) == before
    assert worker(**command, resume=str(tmp_path / "out" / "checkpoint-4")) == {"killed": False, "code": 0}
    assert links(command["out"]) == links(done["out"])


# --- in one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "ranks", "base"),
    [
        ("reset", None, "dense"), ("reset", (4, 3, 2), "dense"), ("keep", None, "dense"), ("keep", (4, 3, 2), "dense"),
        ("reset", None, "ledger"), ("keep", None, "nf4"),
    ],
)  # fmt: skip
def test_every_checkpoint_leads_to_the_same_links(
    policy: str, ranks: Any, base: str, load_nf4: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Knots after 2, 4 and 6; a checkpoint after every step, so also those that end in a knot."""
    load = tiny_llama if base == "dense" else load_nf4
    options: dict[str, Any] = {
        "callback": {"ranks": ranks, "optimizer_state": policy}, "keys": {"first_rank": ranks and ranks[0]},
        "save_steps": 1, "save_total_limit": None,
    }  # fmt: skip
    options["keys"]["base"] = base
    trainer, chain, spy = make(tmp_path, load(), **options)
    trainer.train()
    assert "_hf_peft_config_loaded" not in vars(chain.model)  # what lets a 4-bit model pass the Trainer's check
    assert chain.open_link is None
    moments = [n > 0 for n in spy.states]
    assert moments == [True, policy == "keep" and ranks is None, True, policy == "keep" and ranks is None, True, False]
    for step in range(1, 7):
        saved = snapshot(tmp_path / f"checkpoint-{step}" / "chain")
        resumed, again, _ = make(tmp_path, load(), **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert hashes(again) == hashes(chain)
        assert again.open_link is None
        for one, other in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert snapshot(tmp_path / f"checkpoint-{step}" / "chain") == saved


@pytest.mark.parametrize("ranks", [None, (4, 3, 2)])
def test_moments_of_another_shape_than_the_factor_are_resumed(ranks: Any, tmp_path: Path) -> None:
    """Adafactor keeps a row's and a column's, as quantised moments have their own shapes, too."""
    options: dict[str, Any] = {
        "callback": {"ranks": ranks, "optimizer_state": "keep"}, "keys": {"first_rank": ranks and ranks[0]},
        "optim": "adafactor", "learning_rate": 1e-2, "save_steps": 1, "save_total_limit": None,
    }  # fmt: skip
    trainer, chain, spy = make(tmp_path, **options)
    trainer.train()
    assert [n > 0 for n in spy.states] == [True, ranks is None, True, ranks is None, True, False]
    for step in (1, 3):
        resumed, again, _ = make(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert hashes(again) == hashes(chain)


def test_a_checkpoint_holds_the_chain_of_its_own_step(tmp_path: Path) -> None:
    """It outlives the checkpoints before it, and loads without a Trainer."""
    trainer, chain, _ = make(tmp_path, save_steps=1, save_total_limit=1)
    trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    model = tiny_llama()
    assert hashes(load_chain(model, tmp_path / "checkpoint-6" / "chain")) == hashes(chain)
    ids = token_rows(4)[0]["input_ids"][None]
    assert torch.equal(model(ids).logits, trainer.model(ids).logits)
    chain.save(tmp_path / "elsewhere")
    assert len(load_chain(tiny_llama(), tmp_path / "elsewhere").links) == 3


def test_a_finished_run_that_is_resumed_leaves_what_is_beside_the_links(tmp_path: Path) -> None:
    """The Trainer takes one step more, at a learning rate that is not 0; the last link's values are the chain's."""
    keys = {"keys": {"train_also": "norm"}, "lr_scheduler_type": "constant", "save_steps": 6}
    make(tmp_path, **keys)[0].train()
    trainer, chain, _ = make(tmp_path, **keys)
    trainer.train(resume_from_checkpoint=True)
    sealed = chain.links[-1].also()
    assert torch.equal(chain.beside.values()["model.norm.weight"], sealed["model.norm.weight"])


def test_resumed_from_a_checkpoint_that_is_deleted_later(tmp_path: Path) -> None:
    first, chain, _ = make(tmp_path, save_steps=3)
    first.train()
    other, again, _ = make(tmp_path, save_steps=3, save_total_limit=1)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert hashes(again) == hashes(chain)
    assert not (tmp_path / "checkpoint-3").exists()
    again.export_adapter(tmp_path / "adapter")


def test_global_and_restarted_learning_rates(tmp_path: Path) -> None:
    rates = {}
    for span in ("global", "restart"):
        trainer, _, spy = make(tmp_path / span, callback={"lr_span": span, "shares": (1, 2)} | {"links": 2})
        trainer.train()
        rates[span] = spy.rates
    cosine = [0.01 * (1 + torch.cos(torch.tensor(torch.pi * s / 6)).item()) for s in range(6)]
    assert rates["global"] == pytest.approx(cosine)
    assert rates["restart"] == pytest.approx([0.02, 0.01, *(0.01 * (1 + c) for c in (1, 0.5**0.5, 0, -(0.5**0.5)))])


def test_a_restarted_curve_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"callback": {"lr_span": "restart"}, "warmup_steps": 1, "max_steps": 9}
    trainer, chain, spy = make(tmp_path, **options)
    trainer.train()
    assert spy.rates[0] == spy.rates[3] == spy.rates[6] == 0
    again, resumed, later = make(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert later.rates == spy.rates[6:]
    assert hashes(resumed) == hashes(chain)


def test_same_chain_as_our_own_trainer(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """The whole data set in every batch, so that its order does not matter; links equal up to rounding."""
    from cola_fast.config import from_dict
    from cola_fast.data.rows import load_data
    from cola_fast.training.models import load_tokenizer

    raw_config["chain"] |= {"dropout": 0.0}
    raw_config["schedule"] |= {"steps": 6, "lr_shape": "linear"}
    raw_config["data"] |= {"limit": 12}
    raw_config["train"] |= {"batch_size": 12, "group_by_length": False}
    config = from_dict(raw_config)
    cola_fast.train(config, quiet=True)

    tokenizer = load_tokenizer(config.model)
    examples = load_data(config.data, tokenizer, context=64, seed=0).train

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(example) for example in batch)
        pad = [(list(e.input_ids), list(e.labels), width - len(e)) for e in batch]
        return {
            "input_ids": torch.tensor([ids + [1] * n for ids, _, n in pad]),
            "labels": torch.tensor([labels + [-100] * n for _, labels, n in pad]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for ids, _, n in pad]),
        }

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.model.name)
    chain = attach(model, r=2, alpha=4)
    arguments = {**SHORT, "per_device_train_batch_size": 12, "lr_scheduler_type": "linear", "save_strategy": "no"}
    Trainer(
        model=model, args=TrainingArguments(str(tmp_path / "hf"), remove_unused_columns=False, **arguments),
        train_dataset=examples, data_collator=collate, callbacks=[ChainCallback(chain, links=3)],
    ).train()  # fmt: skip
    ours = load_chain(AutoModelForCausalLM.from_pretrained(config.model.name), config.out)
    assert len(ours.links) == len(chain.links) == 3
    for mine, theirs in zip(ours.links, chain.links, strict=True):
        for name, f in mine.factors().items():
            g = theirs.factors()[name]
            assert float((f.b @ f.a - g.b @ g.a).norm() / (f.b @ f.a).norm()) < 1e-3


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        ({"links": 0}, "^links is 0"),
        ({"shares": (1, 2)}, "^shares has 2 entries, but links is 3"),
        ({"method": "polo"}, "^method is 'polo', but must be one of"),
        ({"lr_span": "local"}, "must be one of global, restart"),
        ({"optimizer_state": "prune-magnitude"}, "^optimizer_state is 'prune-magnitude', but must be reset or keep"),
        ({"method": "rac-lora"}, "rac-lora sets frozen to 'a', but this chain has None: attach it with frozen='a'"),
        ({"method": "gelora"}, "gelora chooses ranks from data, which .* attach with rank_pattern=gelora_ranks"),
    ],
    ids=["links", "shares", "method", "lr_span", "state", "another-chain", "ranks"],
)
def test_a_schedule_that_makes_no_sense(callback: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        make(tmp_path, callback=callback)


def test_load_best_model_at_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load_best_model_at_end"):
        make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)


def test_the_best_checkpoint_is_kept_and_loads(tmp_path: Path) -> None:
    """The advice in that refusal."""
    options = {"metric_for_best_model": "loss", "greater_is_better": False, "save_total_limit": 1}
    trainer, _, _ = make(tmp_path, eval_strategy="steps", eval_steps=2, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    again, _, _ = make(tmp_path / "score")
    loss = Trainer(
        model=load_chain(tiny_llama(), best + "/chain").model, args=again.args, eval_dataset=token_rows(8)
    ).evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.state.best_metric, abs=1e-6)


@pytest.mark.parametrize("problem", ["used", "other-model", "late", "too-few-steps", "rank", "plateau", "unfrozen"])
def test_refused_before_the_first_step(problem: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {}
    callback: dict[str, Any] = {}
    sentence = {
        "used": "1 sealed links already", "other-model": "not attached to the Trainer's model",
        "late": "from its start", "too-few-steps": "makes 2 steps, .* raise max_steps", "rank": "first_rank=3",
        "plateau": "lr_span is restart", "unfrozen": "model.norm.weight is trained too",
    }[problem]  # fmt: skip
    if problem == "too-few-steps":
        arguments["max_steps"] = 2
    if problem == "rank":
        callback["ranks"] = (3, 2, 1)
    if problem == "plateau":
        callback["lr_span"], arguments["lr_scheduler_type"] = "restart", "reduce_lr_on_plateau"
        arguments |= {"eval_strategy": "steps", "eval_steps": 2}
    trainer, chain, _ = make(tmp_path, callback=callback, **arguments)
    if problem == "used":
        disturb(chain)
        chain.tie()
        chain.extend()
    if problem == "other-model":
        trainer, _, _ = make(tmp_path)
        trainer.remove_callback(ChainCallback)
        ours = ChainCallback(attach(tiny_llama(), r=2), links=3)
        ours.on_init_end(trainer.args, None, None, model=trainer.model)
        trainer.add_callback(ours)
    if problem == "late":
        trainer.remove_callback(ChainCallback)
        trainer.add_callback(ChainCallback(chain, links=3))
    if problem == "unfrozen":
        trainer.model.model.norm.requires_grad_(True)
    weights = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(UserError, match=sentence):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("problem", ["schedule", "settings", "base", "elsewhere", "other-run", "no-optimizer"])
def test_checkpoints_that_do_not_fit(problem: str, tmp_path: Path) -> None:
    trainer, _, _ = make(tmp_path / "run", save_only_model=problem == "no-optimizer")
    trainer.train()
    out, sentence, options = tmp_path / "run", "", {}
    resume = str(out / "checkpoint-2")
    model = None
    if problem == "schedule":
        options, sentence = {"callback": {"links": 2}}, "another schedule"
    elif problem == "settings":
        options, sentence = {"keys": {"alpha": 5}}, "alpha was 4.0, is 5.0"
    elif problem == "base":
        model, sentence = tiny_llama(seed=8), "weights differ"
    elif problem == "elsewhere":
        out, sentence = tmp_path / "other", "set output_dir to the folder that holds it"
    elif problem == "other-run":
        out, sentence = tmp_path / "other", "hold different links"
        make(out, learning_rate=0.01)[0].train()
    else:
        sentence = "no optimizer state"
    again, _, _ = make(out, model, **options)
    with pytest.raises(UserError, match=sentence):
        again.train(resume_from_checkpoint=resume)

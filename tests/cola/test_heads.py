"""`cola train` on models with a head that classifies sequences or tokens: read, trained, killed, scored, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cola_fast import UserError, load_chain
from cola_fast.cli import main
from cola_fast.commands.report import dry_run, export_run, score_run
from cola_fast.config import from_dict, load
from cola_fast.data.heads import Head
from cola_fast.data.rows import load_data
from cola_fast.training.models import load_model, load_tokenizer
from cola_fast.training.trainer import train

from ..conftest import snapshot
from .conftest import sealed

TASK = {
    "model__task": "sequence-classification",
    "model__labels": [0, 1],
    "data__format": "auto",
    "data__verbalisers": None,
    "data__template": "{text}",
}


@pytest.fixture
def bert_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """An encoder as one finds them: trained to fill gaps, with no head that classifies, and no pooler."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=64, pad_token_id=1, **sizes))
    folder = tmp_path / "bert"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def word_files(task_files: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Every word has a label: whether it is below w28."""
    files = {}
    for split, path in task_files.items():
        rows = [json.loads(line)["text"].split() for line in Path(path).read_text().splitlines()]
        out = tmp_path / f"words-{split}.jsonl"
        labelled = [{"tokens": words, "label": ["low" if int(w[1:]) < 28 else "high" for w in words]} for words in rows]
        out.write_text("".join(json.dumps(row) + "\n" for row in labelled))
        files[split] = str(out)
    return files


def of_words(files: dict[str, str]) -> dict[str, Any]:
    keys = {f"data__{split}": path for split, path in files.items()}
    return {**TASK, **keys, "model__task": "token-classification", "model__labels": ["low", "high"]}


def test_the_whole_way(config_file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learns; the folder holds all there is; PEFT and transformers load what is exported."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    path = config_file(**TASK, schedule__steps=45, schedule__lr=0.05)
    assert "trainable parameters" in dry_run(load(path))
    assert main(["train", path]) == 0
    assert "score.weight" in capsys.readouterr().err  # that it is fresh is said
    rows = score_run(tmp_path / "run")
    assert rows[0]["model"] == "base"
    assert rows[-1]["accuracy"] >= 0.85 > 0.7 > rows[0]["accuracy"]
    by_name = {row["model"]: row for row in rows}
    assert abs(by_name["merged export"]["loss"] - by_name["after 3 links"]["loss"]) < 1e-5

    run = tmp_path / "run"
    live = load_chain(load_model(load(path).model), run).model
    for to in ("adapter", "merged"):
        export_run(run, to)
    kind = AutoModelForSequenceClassification
    base = kind.from_pretrained(load(path).model.name, num_labels=2, pad_token_id=1)  # its head is another one
    merged = kind.from_pretrained(run / "export" / "merged")
    assert merged.config.id2label == {0: "0", 1: "1"}
    assert merged.config.pad_token_id == live.config.pad_token_id
    ids = torch.randint(7, 60, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = live(ids).logits
        for other in (PeftModel.from_pretrained(base, run / "export" / "adapter").eval(), merged.eval()):
            assert float((other(ids).logits - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("task", ["sequence", "tokens", "encoder"])
def test_killed_and_resumed(
    task: str,
    worker: Callable[..., dict[str, Any]],
    config_file: Callable[..., str],
    word_files: dict[str, str],
    bert_folder: Path,
    tmp_path: Path,
) -> None:
    """Equal hashes, which are of the head, too."""
    keys: dict[str, Any] = of_words(word_files) if task == "tokens" else dict(TASK)
    if task == "encoder":
        keys |= {"model__name": str(bert_folder), "chain__targets": ["query", "value"]}
    keys |= {"schedule__links": 2, "schedule__steps": 4}
    whole = worker(config_file(out=str(tmp_path / "whole"), **keys))
    assert whole["code"] == 0, whole
    for n in range(25, whole["operations"][0], 30):
        run = tmp_path / f"killed-{n}"
        config = config_file(out=str(run))
        assert worker(config, kill_at_operation=n)["killed"]
        assert worker(config)["code"] == 0
        assert sealed(run) == sealed(tmp_path / "whole")
    scores = score_run(tmp_path / "whole")
    assert all(0 <= row["accuracy"] <= 1 for row in scores)
    assert abs(scores[-1]["loss"] - scores[-2]["loss"]) < 1e-5


def test_words_are_learned(config_file: Callable[..., str], word_files: dict[str, str]) -> None:
    result = train(load(config_file(**of_words(word_files), schedule__steps=30, schedule__lr=0.05)), quiet=True)
    assert result.score is not None
    assert result.score.accuracy is not None
    assert result.score.accuracy > 0.8  # half of the words are of each label


def test_padding_and_the_batch_do_not_matter(config_file: Callable[..., str]) -> None:
    from cola_fast.training.evaluate import evaluate
    from cola_fast.training.prepare import read_data

    config = load(config_file(**TASK))
    model = load_model(config.model)
    data = read_data(config, model, load_tokenizer(config.model), None)
    scores = [evaluate(model, data.eval, batch_size=size) for size in (1, 7, 32)]
    assert len({score.accuracy for score in scores}) == 1
    assert max(s.loss for s in scores) - min(s.loss for s in scores) < 1e-5


def test_a_word_of_several_tokens_is_labelled_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "good": 1, "##ness": 2, "bad": 3}
    inner = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"tokens": ["goodness", "bad", "good"], "label": ["b", "a", "b"]}) + "\n")
    raw = {"model": {"name": "x"}, "data": {"train": str(path), "eval_share": 0}, "schedule": {"steps": 1}}
    config = from_dict(raw)
    data = load_data(config.data, tokenizer, context=9, seed=0, head=Head("words", ("a", "b"), 0))
    assert data.train[0].input_ids == [1, 2, 3, 1]
    assert data.train[0].labels == [1, -100, 0, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__labels": [0]}, "model.labels does not name at least two different classes"),
        ({"model__labels": [0, "0"]}, "model.labels does not name at least two different classes"),
        ({"model__labels": [0, 2]}, "label is 1, which is not in model.labels (0, 2)"),
        ({"model__task": "causal-lm"}, "model.labels names classes, but model.task is causal-lm"),
        ({"data__verbalisers": {0: "a", 1: "b"}}, "data.verbalisers is set, which model.task sequence-classification"),
        ({"data__columns": {"text": "a"}}, "data.columns is set, which model.task sequence-classification"),
        ({"data__learn": "all"}, "data.learn is all, which model.task sequence-classification"),
        ({"data__response": "{a}"}, "data.response is set, which model.task sequence-classification"),
        ({"train__packing": True}, "train.packing is set"),
        ({"data__template": "{txt}"}, "data.template names 'txt'"),
        ({"model__task": "token-classification"}, "has no column 'tokens'"),
        ({"model__task": "regression"}, "must be one of causal-lm, sequence-classification, token-classification"),
    ],
)
def test_what_does_not_fit(
    changes: dict[str, Any],
    sentence: str,
    config_file: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config_file(**{**TASK, **changes})
    before = snapshot(tmp_path)
    assert main(["train", path]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error
    assert snapshot(tmp_path) == before


def test_a_checkpoint_that_lacks_more_than_its_head_is_refused(
    bert_folder: Path, config_file: Callable[..., str]
) -> None:
    from safetensors.torch import load_file, save_file

    path = bert_folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    config = load(config_file(**TASK, model__name=str(bert_folder)))
    with pytest.raises(UserError, match=r"lack 1 tensors of the model \(bert.encoder.layer.1.output.dense.weight\)"):
        load_model(config.model)


def test_a_head_of_other_classes_starts_afresh(tmp_path: Path, config_file: Callable[..., str]) -> None:
    """A classifier of five classes is trained on for two."""
    config = load(config_file(**TASK))
    model: nn.Module = load_model(load(config_file(**{**TASK, "model__labels": [0, 1, 2, 3, 4]})).model)
    model.save_pretrained(tmp_path / "five")  # type: ignore[operator]
    load_tokenizer(config.model).save_pretrained(tmp_path / "five")
    fresh: list[str] = []
    two = load_model(load(config_file(**TASK, model__name=str(tmp_path / "five"))).model, fresh)
    assert fresh == ["score.weight"]
    assert two.score.weight.shape == (2, 32)  # type: ignore[union-attr]

"""batches.py and layout.py: whatever the layout, a batch gives the numbers that its examples give one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_fast.config import Config, TrainConfig
from cola_fast.data import batches
from cola_fast.data import loss as of_logits
from cola_fast.data.batches import Batch, Feed, Sampler, choice_batches, collate
from cola_fast.data.encode import IGNORE, Example
from cola_fast.data.loss import batch_loss, candidate_scores, needed_logits
from cola_fast.data.rows import Data
from cola_fast.errors import UserError
from cola_fast.training.batch_checks import check_causal, check_packing, check_padding
from cola_fast.training.prepare import check_batches

VOCABULARY = 61


def llama(attention: str = "sdpa", **keys: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.3, **sizes, **keys)
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def mistral(attention: str) -> nn.Module:
    """With a sliding window shorter than the sequences."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.3,
        pad_token_id=None,
        **sizes,
    )
    config._attn_implementation = attention
    return MistralForCausalLM(config).eval()


def examples(kind: str, lengths: Sequence[int] = (5, 11, 3, 8, 11, 2)) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        if kind == "text":
            keep = [False] + [True] * (length - 1)
        elif kind == "completion":
            keep = [i >= length - (2 if length > 4 else 1) for i in range(length)]
        else:  # turns
            keep = [i % 4 in (1, 2) for i in range(length)]
        made.append(Example(ids, [token if k else IGNORE for token, k in zip(ids, keep, strict=True)]))
    return made


def one_by_one(model: nn.Module, parts: Sequence[Example]) -> Tensor:
    """The specification: no padding, no packing, all logits, PyTorch's own loss, summed."""
    losses = []
    for example in parts:
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        losses.append(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
    return torch.stack(losses).sum()


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def singles(parts: Sequence[Example]) -> list[list[Example]]:
    return [[example] for example in parts]


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["text", "completion", "turns"])
def test_a_batch_has_the_loss_and_gradient_of_its_examples(kind: str, packed: bool, attention: str) -> None:
    model, parts = llama(attention), examples(kind)
    rows = [parts[:2], parts[2:3], parts[3:]] if packed else singles(parts)
    batch = collate(rows)
    loss, count = batch_loss(needed_logits(model, batch), batch)
    expected = one_by_one(model, parts)
    assert count == batch.labelled == sum(label != IGNORE for e in parts for label in e.labels[1:])
    assert batch.tokens == sum(map(len, parts))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(model, loss), gradient(model, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_sliding_window_survives(packed: bool, attention: str) -> None:
    model, parts = mistral(attention), examples("completion")
    batch = collate([parts[:2], parts[2:]] if packed else singles(parts))
    loss, _ = batch_loss(needed_logits(model, batch), batch)
    torch.testing.assert_close(loss, one_by_one(model, parts), rtol=1e-5, atol=1e-5)


def test_flat_rows_restart_their_positions_and_cross_no_border() -> None:
    model, parts = llama(), examples("text")
    batch = collate([parts[:2], parts[2:]], flat=True)
    assert batch.input_ids.shape == (1, sum(map(len, parts)))
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    assert batch.position_ids[0].tolist() == [i for e in parts for i in range(len(e))]
    loss, _ = batch_loss(needed_logits(model, batch), batch)
    torch.testing.assert_close(loss, one_by_one(model, parts), rtol=1e-5, atol=1e-5)


def test_answers_of_unequal_prompts_need_few_positions() -> None:
    parts = examples("completion", (40, 9, 23, 17))
    left = collate(singles(parts))
    assert left.positions.tolist() == [37, 38]
    assert left.attention_mask is not None
    assert left.attention_mask.sum(-1).tolist() == [40, 9, 23, 17]


@pytest.mark.parametrize(("kind", "lengths"), [("text", (4, 9)), ("completion", (7, 7))], ids=["text", "equal-lengths"])
def test_no_mask_where_none_is_needed(kind: str, lengths: tuple[int, int]) -> None:
    batch = collate(singles(examples(kind, lengths)))
    assert batch.attention_mask is None
    assert batch.position_ids is None


def test_the_first_token_is_never_a_target_even_if_labelled() -> None:
    parts = [Example([1, 2, 3], [1, 2, 3]), Example([4, 5], [4, 5])]
    for rows in ([parts], singles(parts)):
        batch = collate(rows)
        assert sorted(batch.targets[batch.targets != IGNORE].tolist()) == [2, 3, 5]


def test_to_moves_every_tensor() -> None:
    for rows in ([examples("text")], singles(examples("completion"))):
        moved = collate(rows).to("meta")
        assert {value.device.type for value in vars(moved).values() if torch.is_tensor(value)} == {"meta"}
        assert isinstance(moved, Batch)


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tile", [1, 150, 10**6], ids=["rows", "ragged", "whole"])
def test_loss_and_gradient_match_pytorch(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_logits._LogLikelihood, "CPU_TILE", tile)
    batch = collate(singles(examples("turns")))
    logits = (4 * torch.randn(*batch.targets.shape, VOCABULARY)).to(dtype).requires_grad_()
    ours, count = batch_loss(logits, batch)
    wide = logits.detach().float().requires_grad_()
    theirs = F.cross_entropy(wide.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    got, want = (torch.autograd.grad(loss / count, at)[0] for loss, at in ((ours, logits), (theirs, wide)))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_accumulation_weighs_every_token_equally() -> None:
    model, parts = llama(), examples("turns", (12, 3, 5, 9, 4))
    whole = collate(singles(parts))
    loss, count = batch_loss(needed_logits(model, whole), whole)
    micro = [collate(singles(parts[:1])), collate(singles(parts[1:4])), collate(singles(parts[4:]))]
    assert len({batch.labelled for batch in micro}) == 3  # a mean of means would be wrong here
    total = sum(batch.labelled for batch in micro)
    accumulated = sum(gradient(model, batch_loss(needed_logits(model, b), b)[0] / total) for b in micro)
    torch.testing.assert_close(accumulated, gradient(model, loss / count), rtol=1e-4, atol=1e-6)


# --- which examples meet ----------------------------------------------------------------------------------------------

SHAPES = [
    pytest.param(n, size, keys, id=f"{n}-by-{size}-{'-'.join(keys) or 'grouped'}")
    for n, size in ((1, 4), (7, 3), (64, 8), (523, 5))
    for keys in ({}, {"group_by_length": False}, {"capacity": 40})
]


def lengths_of(count: int) -> list[int]:
    return torch.randint(1, 41, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@pytest.mark.parametrize(("count", "size", "keys"), SHAPES)
def test_every_example_once_per_epoch(count: int, size: int, keys: dict[str, Any]) -> None:
    lengths = lengths_of(count)
    sampler = Sampler(lengths, size, seed=3, **keys)
    for epoch in range(3):
        handed_out = list(itertools.islice(sampler, len(sampler)))
        assert sampler.epoch == epoch
        assert sorted(i for batch in handed_out for row in batch for i in row) == list(range(count))
        assert all(1 <= len(batch) <= size for batch in handed_out)
        limit = keys.get("capacity")
        for row in itertools.chain.from_iterable(handed_out):
            assert sum(lengths[i] for i in row) <= limit if limit else len(row) == 1


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    def epochs(seed: int, noise: int) -> list[Any]:
        torch.manual_seed(noise)
        sampler = Sampler(lengths_of(50), 4, seed=seed)
        return [list(itertools.islice(sampler, len(sampler))) for _ in range(2)]

    assert epochs(0, 1) == epochs(0, 2)
    assert epochs(0, 1) != epochs(1, 1)
    assert epochs(0, 1)[0] != epochs(0, 1)[1]


@pytest.mark.parametrize("keys", [{}, {"group_by_length": False}, {"capacity": 60}], ids=["grouped", "plain", "packed"])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 20])
def test_resuming_continues_with_the_very_next_batch(keys: dict[str, Any], stop: int) -> None:
    undisturbed, first, second = (Sampler(lengths_of(33), 5, seed=2, **keys) for _ in range(3))
    expected = list(itertools.islice(undisturbed, 30))
    before = list(itertools.islice(first, stop))
    second.load_state_dict(first.state_dict())
    assert before + list(itertools.islice(second, 30 - stop)) == expected


def test_a_position_in_other_data_is_refused() -> None:
    state = Sampler(lengths_of(33), 5, seed=2).state_dict()
    with pytest.raises(UserError, match=r"rows = 33, but now rows is 34"):
        Sampler(lengths_of(34), 5, seed=2).load_state_dict(state)


def test_grouping_saves_padding_and_starts_with_the_longest() -> None:
    lengths = lengths_of(800)

    def padding(group: bool) -> int:
        epoch = list(itertools.islice(sampler := Sampler(lengths, 8, seed=0, group_by_length=group), len(sampler)))
        sizes = [[lengths[row[0]] for row in batch] for batch in epoch]
        assert not group or max(sizes[0]) == max(lengths)
        return sum(max(size) * len(size) - sum(size) for size in sizes)

    assert padding(True) < 0.1 * padding(False)


def test_packs_are_tight() -> None:
    lengths = lengths_of(2000)
    rows = batches.pack(lengths, 128, seed=0)
    assert len(rows) <= 1.02 * sum(lengths) / 128 + 1
    with pytest.raises(ValueError, match="does not fit"):
        batches.pack([129], 128, seed=0)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_feed_hands_out_all_tokens_and_resumes(packing: bool) -> None:
    parts, config = examples("text", lengths_of(40)), TrainConfig(batch_size=4, packing=packing)
    first, second = (Feed([e for e in parts if len(e) > 1], config, max_length=64) for _ in range(2))
    epoch = list(itertools.islice(first, len(first)))
    assert sum(batch.tokens for batch in epoch) == sum(len(e) for e in parts if len(e) > 1)
    assert max(batch.input_ids.shape[1] for batch in epoch) <= 64
    assert any(batch.position_ids is not None for batch in epoch) == packing
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(first).input_ids, next(second).input_ids)


def test_eval_batches_cover_everything_once() -> None:
    model, parts = llama(), examples("completion")
    with torch.no_grad():
        found = sum(batch_loss(needed_logits(model, b), b)[0] for b in batches.eval_batches(parts, 4))
    torch.testing.assert_close(found, one_by_one(model, parts), rtol=1e-5, atol=1e-5)


# --- classification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [((3,), (9,), (4,)), ((3,), (9, 2, 2), (4, 8))], ids=["one-token", "several-tokens"])
def test_candidate_scores_are_summed_log_likelihoods(words: tuple[tuple[int, ...], ...]) -> None:
    model, parts = llama(), []
    for number, prompt in enumerate(e.input_ids for e in examples("text", (5, 12, 3, 9, 9))):
        gold = words[number % 3]
        labels = [IGNORE] * len(prompt) + list(gold)
        parts.append(Example(prompt + list(gold), labels, len(prompt), words, number % 3))

    def alone(example: Example, word: tuple[int, ...]) -> float:
        ids = example.input_ids[: example.prompt_length] + list(word)
        likelihood = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(likelihood[len(ids) - len(word) + i - 1, token]) for i, token in enumerate(word))

    found, answers, gold_tokens = [], [], 0
    with torch.no_grad():
        for choice in choice_batches(parts, 4):
            assert choice.batch.input_ids.shape[0] <= 4
            assert (choice.batch.input_ids.shape[0] == len(choice.answers)) == (len(words[1]) == 1)
            found.append(candidate_scores(needed_logits(model, choice.batch), choice.to("cpu")))
            answers += choice.answers.tolist()
            gold_tokens += choice.gold_tokens
        ordered = sorted(parts, key=len, reverse=True)
        expected = torch.tensor([[alone(e, word) for word in words] for e in ordered])
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)
    assert answers == [e.answer for e in ordered]
    assert gold_tokens == sum(len(words[e.answer]) for e in parts)


# --- does the model do what a batch asks? -----------------------------------------------------------------------------


def tiny(name: str) -> nn.Module:
    """Random models with their default initialisation, which makes leaks small."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    if name == "mamba":
        return t.MambaForCausalLM(t.MambaConfig(**sizes))
    if name == "bloom":
        return t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    if name == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 1}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **ends))
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    if name == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(num_local_experts=4, **sizes))
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(head_dim=8, sliding_window=4, pad_token_id=0, **sizes))


class Deaf(nn.Module):
    """Wraps a model and ignores what it is told about positions and masks."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **keys: Any) -> Any:
        return self.inner(input_ids, **keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_keeps_sequences_apart_passes(attention: str, dtype: torch.dtype) -> None:
    model = llama(attention, attention_dropout=0.5).to(dtype).train()
    check_packing(model)
    check_padding(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_does_not_is_refused(dtype: torch.dtype) -> None:
    model = Deaf(llama().to(dtype))
    with pytest.raises(UserError, match=r"Deaf does not keep .* under packing .*: set train\.packing to false"):
        check_packing(model)
    with pytest.raises(UserError, match=r"Deaf does not keep .* under padding"):
        check_padding(model)


def test_a_model_that_sees_the_answer_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    check_causal(llama())
    with pytest.raises(UserError, match="BertLMHeadModel sees the tokens that it is to predict"):
        check_causal(BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, **sizes)))


def test_one_sequence_at_a_time_needs_no_padding() -> None:
    """With verbalisers of several tokens the candidates are rows of one batch."""
    model, data = Deaf(llama()), Data("text", examples("text"), [], [], max_length=64)
    one = Config(train=TrainConfig(batch_size=1, eval_batch_size=1))
    check_batches(one, model, data)
    choice = replace(examples("text")[0], candidates=((1,), (2, 3)), answer=1)
    for config, given in ((Config(), data), (one, replace(data, train=[choice]))):
        with pytest.raises(UserError, match=r"under padding .* set train.batch_size and eval_batch_size to 1"):
            check_batches(config, model, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "packs"), [("gpt2", True), ("mixtral", True), ("gemma3", True), ("mamba", False), ("bloom", False)]
)
def test_who_can_be_packed(name: str, packs: bool, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    check_padding(model)
    if packs:
        check_packing(model)
    else:
        with pytest.raises(UserError, match=r"does not keep .* under packing"):
            check_packing(model)


def test_a_model_without_position_ids_is_refused() -> None:
    model = llama()
    forward = model.forward
    model.forward = lambda input_ids, use_cache=None, logits_to_keep=0: forward(
        input_ids, logits_to_keep=logits_to_keep
    )
    with pytest.raises(UserError, match=r"cannot be used for packing, its forward refuses the batch"):
        check_packing(model)

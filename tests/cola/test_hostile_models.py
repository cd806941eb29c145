"""Checkpoints that are not whole, not safetensors, or no models: one sentence each, before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola_fast.config import ModelConfig, TrainConfig
from cola_fast.data.batches import Feed
from cola_fast.data.encode import Example
from cola_fast.data.rows import Data
from cola_fast.errors import UserError
from cola_fast.training.checkpoint_files import refuse_not_finite
from cola_fast.training.models import context_length, load_empty_model, load_model, load_tokenizer
from cola_fast.training.prepare import require_vocabulary

from ..conftest import tiny_llama

Tensors = dict[str, Tensor]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A whole checkpoint of one's own."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, file: str = "config.json", **keys: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def load(folder: Path, **keys: Any) -> Any:
    return load_model(ModelConfig(**{"name": str(folder), "device": "cpu", "dtype": "fp32", **keys}))


def refused(folder: Path, sentence: str, function: Callable[..., Any] = load, **keys: Any) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        function(folder, **keys)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 900


# --- weights that are not whole ---------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {key: value for key, value in t.items() if key not in names}


def spoilt(value: float, name: str = "model.layers.1.mlp.up_proj.weight") -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        tensors[name][3, 5] = value
        return tensors

    return edit


INCOMPLETE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no head": (without("lm_head.weight"), r"lack 1 tensors of the model \(lm_head.weight\), which would be random"),
    "all but one": (
        lambda t: {"model.norm.weight": t["model.norm.weight"]},
        r"lack 20 tensors of the model \(lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm",
    ),
    "module.": (
        lambda t: {f"module.{key}": value for key, value in t.items()},
        r"lack 21 tensors .* It has 21 others \(module.lm_head.weight, .*\), with module. in front: take that off",
    ),
    "a model without its head": (
        lambda t: {key.removeprefix("model."): v for key, v in t.items() if key != "lm_head.weight"},
        r"lack 1 tensors of the model \(lm_head.weight\)",
    ),
    "another model": (
        lambda t: {"bert.pooler.weight": torch.ones(3)},
        r"lack 21 .* It has 1 others \(bert.pooler.weight",
    ),
    "another shape": (
        lambda t: {**t, "model.norm.weight": torch.ones(5)},
        r"do not fit its config.json: model.norm.weight \(5 instead of 32\)",
    ),
    "no shape": (
        lambda t: {**t, "lm_head.weight": torch.ones(())},
        r"do not fit its config.json: lm_head.weight \(one number instead of 64 x 32\)",
    ),
    "nan": (spoilt(float("nan")), r"NaN or infinite numbers in 1 tensors \(model.layers.1.mlp.up_proj.weight\)"),
    "infinite": (spoilt(-float("inf")), r"NaN or infinite numbers in 1 tensors \(model.layers.1.mlp.up_proj.weight\)"),
    "a nan embedding": (
        spoilt(float("nan"), "model.embed_tokens.weight"),
        r"numbers in 1 tensors \(model.embed_tokens",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_weights_that_are_not_whole_are_named(case: str, folder: Path) -> None:
    edit, sentence = INCOMPLETE[case]
    change(folder, edit)
    refused(folder, sentence)
    refused(folder, sentence, dtype="bf16")


def test_a_head_that_is_tied_is_not_missing(folder: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change(folder, lambda t: {**t, "unused.weight": torch.ones(2)})  # what is not used harms nobody
    load(folder)


def test_numbers_that_only_a_wider_dtype_holds(folder: Path) -> None:
    """3.4e38 becomes infinite in bf16."""
    change(folder, spoilt(3.4e38))
    load(folder)
    refused(folder, r"NaN or infinite numbers in 1 tensors .* wider dtype", dtype="bf16")


def test_weights_of_4_bits_are_looked_at_too(wide_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = Path(shutil.copytree(wide_folder, tmp_path / "model"))
    load(folder, load_in_4bit=True)
    change(folder, without("model.layers.0.self_attn.q_proj.weight"))
    refused(folder, r"lack 1 tensors of the model \(model.layers.0.self_attn.q_proj.weight\)", load_in_4bit=True)
    shutil.copy(wide_folder / "model.safetensors", folder)
    change(folder, spoilt(float("inf")))
    sentence = r"NaN or infinite numbers in \d tensors \(model.layers.1.mlp.up_proj.weight"
    refused(folder, sentence, load_in_4bit=True)


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "offset"])
def test_scales_of_4_bits_are_told_by_name(part: str, load_nf4: Any) -> None:
    model = load_nf4(double=part != "absmax")
    refuse_not_finite("m", model)
    state = model.model.layers[0].self_attn.q_proj.weight.quant_state
    tensor = {"absmax": state.absmax, "offset": state.offset, "nested_absmax": state.nested and state.state2.absmax}[
        part
    ]
    tensor.fill_(float("nan"))
    with pytest.raises(UserError, match=rf"in 1 tensors \(model.layers.0.self_attn.q_proj.weight.{part}\)"):
        refuse_not_finite("m", model)


# --- files ------------------------------------------------------------------------------------------------------------


def index(folder: Path, **files: str) -> None:
    weights = dict.fromkeys(load_file(folder / "model.safetensors"), "model-1.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**weights, **files}}))


def test_a_model_in_several_files_is_read(folder: Path) -> None:
    index(folder)
    load(folder)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("pytorch_model.bin", r"names 'pytorch_model.bin' as weights, but only .safetensors files are read"),
        ("model.pt", r"names 'model.pt' as weights, but only .safetensors"),
        ("model", r"names 'model' as weights, but only .safetensors"),
        ("../model.safetensors", r"which lies outside the model's folder"),
        ("a/../../model.safetensors", r"which lies outside the model's folder"),
        ("/etc/model.safetensors", r"which lies outside the model's folder"),
        ("..\\model.safetensors", r"which lies outside the model's folder"),
        ("c:\\model.safetensors", r"which lies outside the model's folder"),
        (7, r"names 7 as weights, but only .safetensors"),
        ([], r"is no index of weights: unhashable"),
    ],
    ids=str,
)
def test_an_index_names_safetensors_of_its_own_folder(
    file: Any, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(folder, **{"lm_head.weight": file})
    for name in ("pytorch_model.bin", "model.pt"):
        torch.save({"lm_head.weight": torch.zeros(64, 32)}, folder / name)
    opened: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **keys: opened.append(args))
    refused(folder, sentence)
    assert not opened


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "no", "[" * 5000], ids=str)
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    index(folder)
    (folder / INDEX).write_text(text)
    refused(folder, r"model.safetensors.index.json is no index of weights: ")


def test_a_configuration_cannot_name_pickled_weights(folder: Path) -> None:
    for file in ("pytorch_model.bin", 7, ["model.safetensors"]):
        configure(folder, transformers_weights=file)
        refused(folder, r"config.json of .* names .* as weights, but only .safetensors files are read")
    index(folder, **{"lm_head.weight": "pytorch_model.bin"})
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    configure(folder, transformers_weights="mine.safetensors.index.json")
    refused(folder, r"mine.safetensors.index.json names 'pytorch_model.bin' as weights")


def test_an_adapter_is_not_loaded_along_with_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, r"holds a PEFT adapter \(adapter_config.json\): give the model that it was made for")


@pytest.mark.parametrize("left", [0, 5, 100, 3000])
def test_weights_that_were_cut_off(left: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(folder, r"The model .* could not be loaded: ")


def test_weights_with_a_header_that_lies(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(folder, r"The model .* could not be loaded: ")


# --- configurations ---------------------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "a size that is text": ({"hidden_size": "a"}, "could not be loaded: "),
    "a size that is null": ({"hidden_size": None}, "could not be loaded: "),
    "a size that is a list": ({"hidden_size": [32]}, "could not be loaded: "),
    "a size that is negative": ({"hidden_size": -32}, "could not be loaded: "),
    "a size that is no multiple": ({"hidden_size": 33}, "could not be loaded|do not fit its config.json"),
    "another size": ({"intermediate_size": 40}, r"do not fit its config.json: model.layers.0.mlp.down_proj.weight \("),
    "no heads": ({"num_attention_heads": 0}, "could not be loaded: "),
    "layers that are text": ({"num_hidden_layers": "a"}, "could not be loaded: "),
    "layers without end": ({"num_hidden_layers": 10**12}, r"has num_hidden_layers 1000000000000: a model has fewer"),
    "an unknown activation": ({"hidden_act": "x"}, "could not be loaded: KeyError: 'x'"),
    "an activation that is a list": ({"hidden_act": ["silu"]}, "could not be loaded: "),
    "an unknown kind": ({"model_type": "x", "architectures": ["X"]}, "could not be loaded: "),
    "a kind that is a number": ({"model_type": 3}, "could not be loaded: "),
    "no kind": ("{}", "could not be loaded: "),
    "a list": ("[]", "could not be loaded: "),
    "a number": ("3", "could not be loaded: "),
    "null": ("null", "could not be loaded: "),
    "no JSON": ("{", "could not be loaded: "),
    "deep": ("[" * 50_000, "could not be loaded: "),
    "nothing": ("", "could not be loaded: "),
    "RoPE that is text": ({"rope_parameters": "x"}, "could not be loaded: "),
    "an unknown RoPE": ({"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}, "could not be loaded: "),
    "code of its own": (
        {"auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"}, "model_type": "x"},
        "could not",
    ),
    "8 bits at each call": (
        {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_8bit": True,
                "llm_int8_has_fp16_weight": True,
            }
        },
        "quantised to 8 bits, but",
    ),
    "8 bits that are 32": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        r"do not fit its config.json, which says 8 bits: model.layers.0.self_attn.q_proj.weight, .* are not",
    ),
    "4 bits that are 32": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
        r"do not fit its config.json, which says 4 bits: model.layers.0.self_attn.q_proj.weight, .* are not",
    ),
    "FP4": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised to fp4, but"),
    "FP8": ({"quantization_config": {"quant_method": "fp8"}}, "quantised to 'fp8', but a chain is trained on .*NF4"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised to 'gptq', but"),
    "quantised to nothing": ({"quantization_config": {}}, "quantised to None, but|could not be loaded"),
    "quantised to a list": ({"quantization_config": [4]}, "quantised to|could not be loaded"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_is_none_is_one_sentence(case: str, folder: Path) -> None:
    edit, sentence = CONFIGURATIONS[case]
    if isinstance(edit, str):
        (folder / "config.json").write_text(edit)
    else:
        configure(folder, **edit)
    refused(folder, sentence)
    if "do not fit" in sentence:
        return  # a dry run sees no weights

    def empty(folder: Path) -> None:
        load_empty_model(ModelConfig(name=str(folder)))

    refused(folder, sentence, empty)


@pytest.mark.parametrize("length", ["a", -1, [64], 0.5], ids=str)
def test_a_context_that_is_no_number(length: Any) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=length))
    with pytest.raises(UserError, match=r"max_position_embeddings .*, but a context is a number of tokens"):
        context_length(model)


# --- tokenizers -------------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, tuple[str, str]] = {
    "no JSON": ("tokenizer.json", "{"),
    "nothing": ("tokenizer.json", ""),
    "a list": ("tokenizer.json", "[]"),
    "deep": ("tokenizer.json", "[" * 50_000),
    "an unknown model": ("tokenizer.json", '{"version": "1.0", "model": {"type": "X", "vocab": {}}}'),
    "a vocabulary that is a number": (
        "tokenizer.json",
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": 3}}',
    ),
    "settings that are a list": ("tokenizer_config.json", "[]"),
    "settings that are null": ("tokenizer_config.json", "null"),
    "settings that are no JSON": ("tokenizer_config.json", "{"),
    "settings that are deep": ("tokenizer_config.json", '{"a":' * 50_000),
    "a token that is a number": (
        "tokenizer_config.json",
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 3}',
    ),
    "an unknown class": ("tokenizer_config.json", '{"tokenizer_class": 7}'),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_one_sentence(case: str, folder: Path) -> None:
    name, text = TOKENIZERS[case]
    (folder / name).write_text(text)

    def tokenizer(folder: Path) -> None:
        load_tokenizer(ModelConfig(name=str(folder)))

    refused(folder, r"The tokenizer of .* could not be loaded: ", tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_is_told() -> None:
    model = tiny_llama()

    def data(token: int, vocabulary: int) -> Data:
        return Data("text", [Example([1, token], [1, token])], [], [], 8, vocabulary=vocabulary)

    require_vocabulary(model, inside := data(63, 64))
    assert not inside.notes
    require_vocabulary(model, beside := data(63, 70))
    assert beside.notes == [
        "the tokenizer has 70 tokens, but the model embeddings of 64: the data uses none of the others, but another "
        "text may"
    ]
    with pytest.raises(
        UserError, match=r"gives token 64, but the model has embeddings of 64 tokens \(and the tokenizer has 70\)"
    ):
        require_vocabulary(model, data(64, 70))
    assert Feed(inside.train, TrainConfig(batch_size=1), max_length=8)


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    gguf = pytest.importorskip("gguf")

    def write(*left_out: str, **values: float) -> bytes:
        """A Llama as llama.cpp writes it, without the tensors in `left_out`; values: what a tensor is filled with."""
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(48)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(8)
        writer.add_vocab_size(64)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"w{i}" for i in range(64)])
        writer.add_token_merges(["w 1"])
        shapes = {"token_embd": (64, 32), "output": (64, 32), "output_norm": (32,)}
        block = {
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "attn_norm": (32,),
        }
        block |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "ffn_norm": (32,)}
        for name, shape in (shapes | {f"blk.0.{key}": shape for key, shape in block.items()}).items():
            if name not in left_out:
                writer.add_tensor(f"{name}.weight", torch.full(shape, values.get(name, 0.1)).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return bytes(path.read_bytes())

    return write


def test_a_gguf_file_is_looked_at_too(gguf_bytes: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"

    def given(content: bytes, sentence: str) -> None:
        file.write_bytes(content)
        refused(tmp_path, sentence, gguf_file="model.gguf")

    file.write_bytes(whole := gguf_bytes())
    assert load(tmp_path, gguf_file="model.gguf").config.num_hidden_layers == 1
    given(gguf_bytes("blk.0.ffn_up"), r"lack 1 tensors of the model \(model.layers.0.mlp.up_proj.weight\)")
    given(gguf_bytes(output_norm=float("nan")), r"NaN or infinite numbers in 1 tensors \(model.norm.weight\)")
    for content in (b"", b"GGUF", whole[:50], whole[:2000], whole[:-100], b"nothing of the kind" * 9):
        given(content, r"The model .* could not be loaded: ")

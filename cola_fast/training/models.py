"""Loading a model and its tokenizer, and asking it for just the logits that are needed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..config import ModelConfig
from ..data import heads
from ..data.heads import AUTO_CLASSES
from ..errors import UserError, shown, told
from ..layers import weights
from ..layers.weights.weight import Weight
from ..versions import require_tested
from . import checkpoint_files

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(config: ModelConfig, fresh: list[str] | None = None) -> nn.Module:
    """`from_pretrained` of the task's auto class, on the device, in the dtype, in eval mode, never running remote code
    unless `trust_remote_code` says so, and never reading pickled weights.

    fresh: gets the names of a classifying head's parameters that the checkpoint has not, or of another size: they are
    drawn from torch's generator. Whatever else is missing is refused.

    Raises UserError for what transformers cannot load, and for a checkpoint that lacks tensors, has them of other
    shapes or holds numbers that are none.
    """
    require_tested("transformers", "cola_fast")
    device = resolve_device(config.device)
    options: dict[str, Any] = {"dtype": resolve_dtype(config.dtype, device)}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if config.gguf_file is None:
        options["use_safetensors"] = True
        checkpoint_files.refuse_other_files(config.name, _load_settings(config), partial(_find, config))
    stored, kind = stored_as(config), quantised_as(config)
    if kind is not None:
        options |= {"device_map": {"": device}}
        options |= {} if stored else {"quantization_config": _quantised_to(kind, options["dtype"], config)}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused here, by name
    model, report = _from_pretrained(_auto_class(config), config, **options, **_classes(config))
    report, drawn = _without_head(model, report) if config.task != "causal-lm" else (report, [])
    checkpoint_files.refuse_incomplete(config.name, report)
    if kind is not None:
        checkpoint_files.refuse_others_than(config.name, kind, model)
    if fresh is not None:
        fresh += drawn
    if config.gguf_file is not None:
        forget_gguf(model)
    weights.hold(model)
    model = model if "device_map" in options else model.to(device)
    if stored:  # transformers leaves some in the dtype that they were quantised from, whatever it is asked
        for _, weight in weights.in_model(model):
            weight.use_in(options["dtype"])
    checkpoint_files.refuse_not_finite(config.name, model)
    return cast(nn.Module, model.eval())


def load_empty_model(config: ModelConfig) -> nn.Module:
    """The same architecture on the meta device: shapes without weights, for estimates."""
    settings = _load_settings(config)
    for key, value in _classes(config).items():
        setattr(settings, key, value)
    options = {} if config.attention is None else {"attn_implementation": config.attention}
    with _told(config), torch.device("meta"):
        model = _auto_class(config).from_config(settings, trust_remote_code=config.trust_remote_code, **options)
    return cast(nn.Module, model)


def _auto_class(config: ModelConfig) -> Any:
    import transformers

    return getattr(transformers, AUTO_CLASSES[config.task])


def _classes(config: ModelConfig) -> dict[str, Any]:
    """What a classifying task adds to config.json."""
    if config.task == "causal-lm":
        return {}
    labels = [str(label) for label in config.labels]
    padding = load_tokenizer(config).pad_token_id if _load_settings(config).pad_token_id is None else None
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        **({} if padding is None else {"pad_token_id": padding}),  # by which some find where a sequence ends
    }


def _without_head(model: nn.Module, report: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The loading report without what belongs to the head, and the names of that."""
    missing = {key for key in report["missing_keys"] if heads.is_part(model, key)}
    resized = {entry for entry in report["mismatched_keys"] if heads.is_part(model, entry[0])}
    kept = {
        **report,
        "missing_keys": set(report["missing_keys"]) - missing,
        "mismatched_keys": set(report["mismatched_keys"]) - resized,
    }
    return kept, sorted({*missing, *(entry[0] for entry in resized)})


def stored_as(config: ModelConfig) -> type[Weight] | None:
    """The kind that the checkpoint's weights are quantised to already, whatever the options say. Reads config.json
    only. Raises UserError for a kind that is not known, and for one whose library is not installed."""
    given = None if config.gguf_file is not None else getattr(_load_settings(config), "quantization_config", None)
    if given is None:
        return None
    kind = weights.stored_as(checkpoint_files.keys_of(given))
    assert kind is not None  # `_load_settings` has looked
    _require_bitsandbytes(f"{config.name} is stored in {kind.size}, which")
    return kind


def quantised_as(config: ModelConfig) -> type[Weight] | None:
    """The kind that the linears' weights will be, as stored or as the options quantise them while loading.

    Raises UserError for options that ask for two kinds, or for another than the checkpoint's.
    """
    stored, asked = stored_as(config), weights.loaded_as(config)
    if len(asked) > 1:
        raise UserError(f"model.{asked[0].option} and model.{asked[1].option} are both set: leave out one.")
    if stored is not None and asked not in ([], [stored]):
        raise UserError(
            f"model.{asked[0].option} is set, but {config.name} is stored in {stored.size}: leave it out, or give the "
            "original model."
        )
    return stored or next(iter(asked), None)


def unquantised(config: ModelConfig) -> ModelConfig:
    """The same model, not quantised while loading."""
    changes: dict[str, Any] = {str(kind.option): False for kind in weights.loaded_as(config)}
    return replace(config, **changes)


def _quantised_to(kind: type[Weight], dtype: torch.dtype, config: ModelConfig) -> Any:
    if config.gguf_file is not None:
        raise UserError(
            f"{config.gguf_file} is a GGUF file and cannot be loaded in {kind.size}: give a safetensors model."
        )
    _require_bitsandbytes(f"model.{kind.option}")
    return kind.settings(dtype)


def _require_bitsandbytes(what: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs bitsandbytes: pip install 'cola_fast[bitsandbytes]'.")


def load_tokenizer(config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, config)
    with _told(config, "tokenizer of"):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, any known token will do
        tokenizer("a", add_special_tokens=True)  # some files are read without complaint, and fail at the first word
    return tokenizer


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device is {name!r}, but must be auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device is {name}, but PyTorch finds no CUDA GPU: use device: auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"model.device is {name}, but there are only {torch.cuda.device_count()} GPUs.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 where the device multiplies it natively, else fp32."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if native_bf16(device) else torch.float32


def native_bf16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bf16. A CPU without them emulates a product in bf16 about 50 times slower
    than in fp32. ATEN_CPU_CAPABILITY=avx2, PyTorch's own variable, makes a newer CPU answer no."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    uses_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return uses_avx512 and bool(torch.cpu._is_avx512_bf16_supported())


def context_length(model: nn.Module) -> int:
    """Longest sequence the model was made for, in tokens."""
    length: Any = getattr(model.config, "max_position_embeddings", None) or 2**31
    if not isinstance(length, int) or length < 1:
        raise UserError(
            f"The model's config.json has max_position_embeddings {shown(length)}, but a context is a number of tokens."
        )
    return length


def checkpoint_activations(model: Any) -> None:
    """Recompute each block's activations in backward. transformers 5.23 renamed the method."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def forget_gguf(model: Any) -> None:
    """transformers keeps thinking a model read from GGUF is quantised, and then refuses to save it."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _load_settings(config: ModelConfig) -> Any:
    """The model's config.json."""
    from transformers import AutoConfig

    settings = _from_pretrained(AutoConfig, config)
    checkpoint_files.check_settings(config.name, settings)
    return settings


def _from_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.gguf_file is not None:
        options["gguf_file"] = config.gguf_file
    folder = os.path.expanduser(config.name)
    looks_local = os.path.isabs(folder) or config.name.startswith((".", "~")) or config.name.count("/") > 1
    if looks_local and not os.path.isdir(folder):
        raise UserError(f"model.name is {config.name}, but there is no such folder.")
    with _told(config, "tokenizer of" if "Tokenizer" in kind.__name__ else "model"):
        return kind.from_pretrained(folder if os.path.isdir(folder) else config.name, **options)


def _find(config: ModelConfig, file: str) -> str | None:
    """Where the model's file of that name is, in its folder or from the hub; None if it has none."""
    folder = os.path.expanduser(config.name)
    if os.path.isdir(folder):
        return path if os.path.isfile(path := os.path.join(folder, file)) else None
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")}
    with _told(config):
        return cast("str | None", cached_file(config.name, file, revision=config.revision, **quiet))


@contextmanager
def _told(config: ModelConfig, what: str = "model") -> Iterator[None]:
    """What transformers raises where it cannot make a model, as a UserError. It raises whatever its libraries do."""
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    local = os.path.isdir(os.path.expanduser(config.name))
    with told(f"The {what} {config.name} could not be loaded{'' if local else offline}"):
        yield

"""What has been written, compared with the live model before anyone calls it exact.

Everything is read from the files, draws no global random numbers and leaves the model in its mode. A comparison that
fails is a UserError; one that cannot be made is a sentence that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from .. import store
from ..errors import UserError, reason
from ..layers import weights
from ..layers.factors import Factors
from ..layers.grouping import Grouping
from ..layers.layer import LoRALinear
from ..layers.torch_modes import evaluating, plainly
from ..seeds import derive_seed
from . import peft_format
from .peft_format import CONFIG_FILE, TENSOR_FILE

ROWS, LENGTH = 8, 16  # of random inputs; tokens of a row
SMALL = 1 << 30  # bytes of weights, up to which a checkpoint is loaded again to compare logits
# Largest relative difference. Of 16-bit logits: the same weights, rounded once more in every layer.
EXACT, LAYERS, LOGITS = 1e-6, {4: 1e-4, 2: 0.02}, {4: 1e-3, 2: 0.1}


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter(
    folder: Path,
    links: Mapping[str, list[Factors]],
    written: Mapping[str, Factors],
    beside: Mapping[str, Tensor],
    *,
    whole: bool,
) -> str:
    """Compare the adapter in `folder` with what was to be written and, where it is all of the chain (`whole`), with the
    links themselves: the updates of random rows. No N x K matrix is made. beside: what is trained beside the links."""
    files = {name: store.read_file(folder / name) for name in (CONFIG_FILE, TENSOR_FILE)}
    read, also = peft_format.decode(files), peft_format.decode_also(files)
    if also.keys() != beside.keys() or not all(torch.equal(tensor, beside[name]) for name, tensor in also.items()):
        raise UserError("What is trained beside the links was not written as it is: check the disk and export again.")
    if read.keys() != written.keys():
        raise UserError("The adapter was not written as it is (modules are missing): check the disk and export again.")
    largest = 0.0
    for name, found in read.items():
        expected = links[name] if whole else [written[name]]
        x = _rows(name, found.a.shape[1])
        update = torch.stack([_update(f, x) for f in expected]).sum(0)
        size = torch.stack([_update(_absolute(f), x.abs()) for f in expected]).sum(0)  # what rounding is relative to
        what = f"the update of {name}"
        if not bool(update.isfinite().all()):
            raise UserError(f"The links hold NaN or infinite values in {name}: go back to the last good state.")
        largest = max(largest, _require_close(_update(found, x), update, EXACT, what, size=size))
        magnitude = expected[-1].magnitude
        if magnitude is not None and (found.magnitude is None or not torch.equal(found.magnitude, magnitude)):
            raise UserError(f"The magnitudes of {name} were not written as they are: check the disk and export again.")
    what = "the chain's links" if whole else "the cut factors"
    return (
        f"compared: the updates of {len(read)} modules, read from the files, with {what} on {ROWS} random rows "
        f"(largest difference {largest:.0e})" + (f", and {len(also)} tensors trained beside them" if also else "")
    )


@plainly
@torch.no_grad()
def on_live_base(live_layers: Mapping[str, LoRALinear], written: Mapping[str, Factors]) -> str:
    """Compare live layers with their own weights and the written updates. For chains that leave the weights alone."""
    largest = 0.0
    for name, f in written.items():
        layer = live_layers[name]
        x = _rows(name, layer.in_features).to(layer.weight.device, layer.compute_dtype)
        live, base = _outputs(layer, x).cpu().double(), weights.of(layer).product(x, layer.bias).cpu().double()
        update = _update(f, x.cpu().double())
        limit = LAYERS[min(4, layer.compute_dtype.itemsize)]
        what = f"the layer {name} with the written update"
        size = base.abs() + update.abs()
        largest = max(largest, _require_close(base + update, live, limit, what, size=size))
    return f"compared: the live layers, with their base and these updates on {ROWS} random rows (largest {largest:.0e})"


def _update(f: Factors, x: Tensor) -> Tensor:
    """`[ROWS, N]` in fp64."""
    return f.scale * (x @ f.a.to(x).t()) @ f.b.to(x).t()


def _absolute(f: Factors) -> Factors:
    return Factors(f.a.abs(), f.b.abs(), abs(f.alpha))


# --- merged models ----------------------------------------------------------------------------------------------------


@plainly
@torch.no_grad()
def layers(live_layers: Mapping[str, LoRALinear], state: Mapping[str, Tensor]) -> str:
    """Compare merged weights with the layers that they are of, by outputs for random rows."""
    count, broken, largest = 0, 0, 0.0
    for name, layer in live_layers.items():
        weight = state.get(f"{name}.weight")
        if weight is None or weight.data_ptr() == layer.weight.data_ptr():  # the live weight itself
            continue
        x = _rows(name, layer.in_features).to(layer.weight.device, layer.compute_dtype)
        with weights.exactly(layer):
            live = _outputs(layer, x)
        if not bool(live.isfinite().all()):
            broken += 1
            continue
        live, x, wide = live.to(weight.device, torch.float32), x.to(weight.device, torch.float32), weight.float()
        merged = F.linear(x, wide, None if layer.bias is None else layer.bias.to(x))
        size = live.abs() + wide.norm(dim=-1)  # of outputs for such rows, also where terms cancel
        if not layer.kind.quantised:
            size += layer.weight.to(x).norm(dim=-1)
        limit = LAYERS[min(4, layer.compute_dtype.itemsize)]
        largest = max(largest, _require_close(merged, live, limit, f"the merged weight of {name}", size=size))
        count += 1
    left = f"; not compared: {broken} layers whose outputs are not finite" if broken else ""
    if not count:
        return f"compared: nothing had to be merged, the weights are the live ones{left}"
    return f"compared: {count} merged weights with the live layers on {ROWS} random rows (largest {largest:.0e}){left}"


def _outputs(layer: LoRALinear, x: Tensor) -> Tensor:
    grouping, layer.grouping = layer.grouping, Grouping()  # what has been learned of calls is not to change
    try:
        with evaluating(layer):
            y: Tensor = layer(x)
            return y
    finally:
        layer.grouping = grouping


def files(folder: Path, state: Mapping[str, Tensor]) -> str:
    """Compare every tensor of the safetensors files in `folder` with the state, one at a time, bit for bit."""
    equal = others = 0
    for key, value in _tensors(folder):
        if key not in state:
            others += 1
        elif not _same(value, state[key]):
            raise UserError(f"{key} was not written as it is: check the disk and export again.")
        else:
            equal += 1
    left = f"; not compared: {others} tensors that transformers writes under other names" if others else ""
    return f"compared: {equal} tensors, read from the files, bit for bit{left}"


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                yield key, file.get_tensor(key)


def _same(one: Tensor, other: Tensor) -> bool:
    other = other.detach().cpu()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]  # NaN is not equal to itself
    return bool(torch.equal(*bits))


def reloaded(model: Any, folder: Path) -> str:
    """Compare logits of the model with those of one that transformers loads from `folder`, if it is small."""
    size = sum(p.nbytes for p in model.parameters())
    if size > SMALL:
        return f"not compared: logits, as the model is larger than {SMALL >> 30} GiB"
    live = logits(model)
    if isinstance(live, str):
        return f"not compared: logits ({live})"
    try:
        with torch.random.fork_rng(devices=[]):
            other = type(model).from_pretrained(folder, dtype="auto")
    except Exception as error:  # transformers' are of many kinds
        raise UserError(f"What was written cannot be loaded ({reason(error)}). Nothing has been kept.") from error
    place = next(model.parameters()).device
    found = logits(other.to(place).eval())
    if isinstance(found, str):
        raise UserError(f"What was written loads, but does not run ({found}), where the live model does.")
    limit = LOGITS[min(4, live.dtype.itemsize, found.dtype.itemsize)]
    largest = _require_close(found, live, limit, "the logits of what was written", typical=True)
    return f"compared: logits of {ROWS} random rows with those of what transformers loads from it ({largest:.0e})"


@plainly
@torch.no_grad()
def logits(model: Any) -> Tensor | str:
    """`[ROWS, LENGTH, ...]` for random tokens, in eval mode; or why there are none."""
    config: Any = getattr(model, "config", None)
    size = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if getattr(model, "main_input_name", None) != "input_ids" or not isinstance(size, int):
        return f"the model takes {getattr(model, 'main_input_name', 'its own inputs')}"
    ids = torch.randint(0, size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})
    try:
        with evaluating(model), weights.exactly(model):
            found = model(**inputs)
    except Exception as error:  # a model that needs more than tokens says so in its own way
        return f"the model does not run on tokens alone: {reason(error)}"
    first = found if isinstance(found, Tensor) else found[0]
    if not isinstance(first, Tensor) or not bool(first.isfinite().all()):
        return "the live model's are not finite numbers"
    return first


# --- numbers ----------------------------------------------------------------------------------------------------------


def _rows(name: str, width: int) -> Tensor:
    """`[ROWS, width]` in fp64, the same for a name each time."""
    generator = torch.Generator().manual_seed(derive_seed(0, "compare", name))
    return torch.randn(ROWS, width, generator=generator, dtype=torch.float64)


def _require_close(
    found: Tensor, expected: Tensor, limit: float, what: str, *, size: Tensor | None = None, typical: bool = False
) -> float:
    """The largest difference of a row, relative to `size` (the expected row itself). typical: the median row's instead,
    as a router may choose another expert where two are nearly equal.

    Raises UserError if it is above the limit, or no number.
    """
    difference = float("nan")
    if found.shape == expected.shape:
        found, expected = found.double(), expected.double()
        size = (expected if size is None else size).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        rows = (found - expected).norm(dim=-1) / size
        difference = float(rows.median() if typical else rows.max())
    if not difference <= limit:
        raise UserError(
            f"The copy is not the live model: {what} differs by {difference:.1e} of it, more than "
            f"{limit:.0e}. Nothing has been kept: please report it, with the kind of model."
        )
    return difference

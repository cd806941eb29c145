"""PEFT adapters that others made, and adapters cut to a rank: what goes in and out of a chain beside its own links."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from .. import store
from ..errors import WORD, UserError, cut, near, shown, told
from ..layers import name_patterns
from ..layers.factors import Factors
from ..layers.layer import factor_dtype
from .knot import refuse_overflow
from .open_link import moves
from .peft_format import CONFIG_FILE, PREFIX, TENSOR_FILE
from .sealed_link import SealedLink
from .writing import peft_fields

if TYPE_CHECKING:
    from .chain import Chain

# Values of init_lora_weights that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA, ...) change
# the base weights too, so that such an adapter fits only the changed base.
INITS_ON_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
# Keys of adapter_config.json that make an adapter more than `scale · B A` on linears, when they are set.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "trainable_token_indices",
    "layer_replication", "megatron_config", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip


def import_adapter(chain: Chain, folder: Path) -> SealedLink:
    """Seal the PEFT LoRA adapter in `folder` as the chain's next link, fold it, and open a fresh link.

    The adapter may cover fewer modules than the chain: the others get a link of rank 1 that is zero. Ranks, alphas and
    rsLoRA scaling are kept. If the chain has a folder, the link is on disk before the weights change.

    Raises UserError if the open link has been trained, if the adapter covers modules the chain does not, if a shape
    does not fit, for numbers that are not finite or would not be in the base, and for what is more than `scale · B A`
    (DoRA, modules_to_save, biases, ...). The model is then as it was.
    """
    if any(map(moves, chain.live_factors().values())) or any(layer.rescales() for layer in chain.layers.values()):
        raise UserError(
            "The open link changes the model (it has been trained, or starts away from zero), and an import would "
            "replace it: call tie() and extend() first."
        )
    given = read_adapter(folder)
    outside = [name for name in given if name not in chain.layers]
    if outside:
        raise UserError(
            f"The adapter in {folder} changes {cut(outside[0], WORD)}"
            + (f" and {len(outside) - 1} more modules" if len(outside) > 1 else "")
            + f", which the chain does not cover: attach with targets that include it.{near(outside[0], chain.layers)}"
        )
    factors = {}
    for name, layer in chain.layers.items():
        n, k, dtype = layer.out_features, layer.in_features, factor_dtype(layer.weight)
        f = given.get(name) or Factors(torch.zeros(1, k), torch.zeros(n, 1), 1.0)
        a, b, alpha = f.a, f.b, f.alpha
        if a.shape[1] != k or b.shape[0] != n:
            raise UserError(
                f"The adapter in {folder} fits a weight of {b.shape[0]} x {a.shape[1]} at {name}, but the model's is "
                f"{n} x {k}: give the adapter of this base model."
            )
        factors[name] = Factors(a.to(dtype), b.to(dtype), alpha)
        _require_finite(factors[name], layer.compute_dtype, f"{name} in {folder}")
        refuse_overflow(chain, name, factors[name], "give an adapter of this base model")
    link = chain.append(lambda: SealedLink.seal(len(chain.links), factors, **peft_fields(chain, factors)))
    chain.extend()
    return link


def read_adapter(folder: Path) -> dict[str, Factors]:
    """Module -> factors of any PEFT LoRA adapter on linears, with the scale PEFT would use.

    Raises UserError if there is none, or if it is more than that.
    """
    with told(f"{folder / CONFIG_FILE} cannot be read"):
        config: Any = store.read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG_FILE} holds {shown(config)}, but must be a mapping, as PEFT writes it.")
    _refuse_more_than_lora(config, folder)
    ranks = _Setting(config, folder, "r", 8, "rank_pattern")
    alphas = _Setting(config, folder, "lora_alpha", None, "alpha_pattern")
    tensors = _read_tensors(folder)
    factors = {}
    for key in tensors:
        name, part = _split(key)
        pair = {f"{PREFIX}{name}.lora_{side}.weight" for side in "AB"}
        if not name or not pair <= tensors.keys():
            alone = f", without lora_{'B' if part == 'A' else 'A'}" if name else ""
            raise UserError(
                f"The adapter in {folder} holds {cut(key, WORD)}{alone}, which is no LoRA factor of a linear: "
                "not supported."
            )
        if part == "A":
            a, b = tensors[key], tensors[f"{PREFIX}{name}.lora_B.weight"]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise UserError(f"The factors of {name} in {folder} are {list(a.shape)} and {list(b.shape)}, no pair.")
            if not (a.is_floating_point() and b.is_floating_point()):
                raise UserError(
                    f"The factors of {name} in {folder} are {a.dtype} and {b.dtype}, but must be floating-point."
                )
            rank = a.shape[0]
            if ranks.of(name) != rank:
                raise UserError(
                    f"The factors of {name} in {folder} have rank {rank}, but {CONFIG_FILE} says {ranks.of(name):g}: "
                    "give the two files that belong together."
                )
            alpha = alphas.of(name) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
            factors[name] = Factors(a, b, alpha)  # such that alpha / rank is PEFT's scale
            _require_finite(factors[name], a.dtype, f"{name} in {folder}")
    if not factors:
        raise UserError(f"The adapter in {folder} has no LoRA factors.")
    return dict(sorted(factors.items()))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    if not path.exists():
        raise UserError(f"{folder} has no {TENSOR_FILE}: load it in PEFT and save it as safetensors.")
    with told(f"{path} is damaged, restore it from a copy"):
        return dict(safetensors.torch.load(path.read_bytes()))


def _require_finite(f: Factors, dtype: torch.dtype, where: str) -> None:
    """Refuses factors whose update the base's dtype cannot hold. No N x K matrix is made: each row's largest entry has
    a bound."""
    a, b = f.a.double().abs().amax(1), f.b.double().abs()
    largest = float(((b * abs(f.scale)) @ a).max())
    if not max(largest, float(a.max()), float(b.max()) * max(1.0, abs(f.scale))) <= torch.finfo(dtype).max:
        raise UserError(
            f"The adapter's update of {where} holds NaN or infinite numbers, or larger ones than the model's "
            f"{str(dtype).removeprefix('torch.')} can hold: give an adapter that trained without diverging."
        )


def cut_to_rank(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of `scale · B A` of at most that rank, and its relative error (Frobenius).

    Truncated SVD (Eckart and Young, 1936) by way of two QR factorisations and an SVD of R x R, in fp64; no N x K matrix
    is made. Scale 1; both factors carry the square root of the singular values. An update of no higher rank comes back
    as it is, with its scale in B.
    """
    a, b = factors.a, factors.scaled()
    if factors.rank <= rank:
        return Factors(a, b, float(factors.rank)), 0.0
    q_b, r_b = torch.linalg.qr(b.double())  # [N, R'], [R', R]
    q_a, r_a = torch.linalg.qr(a.double().t())  # [K, R''], [R'', R]
    u, s, vt = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    rank = min(rank, s.numel())
    total, lost = float(s.square().sum()), float(s[rank:].square().sum())
    root = s[:rank].sqrt()
    a_cut = ((root[:, None] * vt[:rank]) @ q_a.t()).to(a.dtype)
    b_cut = (q_b @ (u[:, :rank] * root)).to(b.dtype)
    return Factors(a_cut.contiguous(), b_cut.contiguous(), float(rank)), math.sqrt(lost / total) if total else 0.0


def _refuse_more_than_lora(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"The adapter in {folder} is of type {shown(kind)}, but a link can only come from LORA.")
    found = [key for key in UNSUPPORTED if config.get(key)]
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(str(name).endswith(".weight") for name in parameters):
        found.append("target_parameters")  # others than weights of linears
    if config.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise UserError(
            f"The adapter in {folder} uses {' and '.join(found)}, which a link (scale times B A on linears) cannot "
            "hold: merge it into the base with PEFT's merge_and_unload and start the chain from the result."
        )
    init = config.get("init_lora_weights", True)
    if init not in INITS_ON_THE_BASE:
        raise UserError(
            f"The adapter in {folder} was initialised with {shown(init)}, which may have changed the base weights as "
            "well: save it with PEFT's path_initial_model_for_weight_conversion first, which makes it an ordinary LoRA."
        )


class _Setting:
    """A number of adapter_config.json that a pattern may change for some modules, as PEFT looks it up: by the first key
    that is a regular expression for the end of the module's name."""

    def __init__(self, config: Mapping[str, Any], folder: Path, key: str, default: Any, pattern: str) -> None:
        self.where = f"The {CONFIG_FILE} in {folder}"
        self.common = self._number(key, config.get(key, default))
        given = config.get(pattern) or {}
        if not isinstance(given, dict):
            raise UserError(f"{self.where} has {pattern} {shown(given)}, but must map patterns of modules to numbers.")
        self.special = []
        for key, value in given.items():
            with told(f"{self.where} has {shown(key)} in {pattern}, which is no pattern"):
                self.special.append((name_patterns.compile_end(key), self._number(f"{pattern} {shown(key)}", value)))

    def of(self, name: str) -> float:
        with told(f"{self.where} has a pattern that cannot be looked for"):
            return next((value for matches, value in self.special if matches(name)), self.common)

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise UserError(f"{self.where} has {key} {shown(value)}, but must have a finite number.")
        return float(value)


def _split(key: str) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A.weight` -> module, "A"; a key of any other form -> "", ""."""
    found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
    return (found[1], found[2]) if found else ("", "")


def error_table(errors: Mapping[str, float]) -> list[str]:
    """One line for each kind of module (the last part of the name): how many, mean and largest relative error."""
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(error)
    return [
        f"  {kind:<12} {len(values):>4} modules   mean {sum(values) / len(values):.2e}   largest {max(values):.2e}"
        for kind, values in kinds.items()
    ]

"""The chain: an untouched base, sealed links in order, and the open link.

The chain is the data; the model's weights are a cache, which can be rebuilt at any time by folding the sealed links, in
order, into the base checkpoint. So a tie seals first (write, fsync, rename, record in chain.json) and folds after, and
a process killed anywhere neither loses a link nor folds one twice.

    attach -> [extend -> train -> tie]*        a folder made by `save` holds everything `load_chain` needs
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from . import store
from .bases import Base, choose_base
from .errors import UserError
from .identity import base_identity, fingerprint
from .layer import LoRALinear, factor_dtype
from .link import SealedLink, derive_seed, folder_name, initial_factors, summarise
from .peft_format import Factors
from .targets import assign_ranks, select_modules, short_targets

if TYPE_CHECKING:
    from .export import ExportedAdapter

FORMAT = 1
CHAIN_FILE = "chain.json"
STATES_KEPT = 2


@dataclass(frozen=True)
class Settings:
    """What every link of a chain shares, as recorded in chain.json."""

    r: int
    alpha: float
    dropout: float
    seed: int
    rank_pattern: dict[str, int] | None


@dataclass(frozen=True)
class OpenLink:
    index: int
    ranks: dict[str, int]


def attach(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16.0,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
    base: str = "auto",
    rounding: str = "auto",
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    first_rank: int | None = None,
) -> Chain:
    """Freeze `model` and open link 0 on the targeted linears. The model's function does not change.

    Args:
        r, alpha: rank and alpha of a link; its scale is alpha / R, R being the module's own rank.
        targets: names (`q_proj`), `"all-linear"`, or a regular expression over full module names.
        dropout: on the low-rank branch, in training mode.
        base, rounding: how tied links are kept, see `cola_fast.bases`.
        seed: of the links' initial values and of stochastic rounding.
        rank_pattern: module name or pattern -> rank, over `r`.
        first_rank: rank of link 0 if it is not `r`, as in a step-down.

    Raises:
        UserError (a ValueError): see `cola_fast.targets` and `cola_fast.layer`. The model is then as it was.
    """
    modules = select_modules(model, targets)
    settings = Settings(r, float(alpha), dropout, seed, dict(rank_pattern) if rank_pattern else None)
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}, but it must be at least 0 and less than 1.")
    if not alpha > 0:
        raise UserError(f"alpha is {alpha}, but it must be positive.")
    kind = choose_base(base, rounding)
    assign_ranks({n: (m.out_features, m.in_features) for n, m in modules.items()}, first_rank or r, rank_pattern)
    chain = Chain(model, modules, kind, settings, base_identity(model))
    chain.extend(first_rank)
    return chain


class Chain:
    """Made by `attach` or `load_chain`. `links` are the sealed ones; `open_link` is None between `tie` and `extend`."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Linear],
        base: Base,
        settings: Settings,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.base, self.settings, self.identity = model, base, settings, dict(identity)
        self.links: list[SealedLink] = []
        self.open_link: OpenLink | None = None
        self.folder: Path | None = None
        self._recorded: dict[str, Any] | None = None  # chain.json as last written
        self.waiting: list[SealedLink] = []  # sealed links of a loaded chain that have not been folded yet
        self._targets = short_targets(model, modules)
        self.layers = _wrap_all(modules)
        self._were_trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)

    # --- the open link ------------------------------------------------------------------------------------------------

    def extend(self, r: int | None = None) -> OpenLink:
        """Open the next link, of rank `r` (the chain's own when None; `rank_pattern` entries keep theirs)."""
        if self.open_link is not None:
            raise UserError("The last link is still open: call tie() before extend().")
        self._require_layers()
        ranks = self.ranks(r)
        index = len(self.links)
        factors = {}
        for name, layer in self.layers.items():
            seed = derive_seed(self.settings.seed, "init", index, name)
            a, b = initial_factors(
                (layer.out_features, layer.in_features), ranks[name], factor_dtype(layer.weight), seed
            )
            factors[name] = Factors(a, b, self.settings.alpha)
        return self.open_with(factors)

    def ranks(self, r: int | None = None) -> dict[str, int]:
        """Module -> the rank `extend(r)` would give it. Raises UserError for a rank that a module cannot have."""
        return assign_ranks(self._shapes(), self.settings.r if r is None else r, self.settings.rank_pattern)

    def open_with(self, factors: Mapping[str, Factors]) -> OpenLink:
        """Open the next link with the given values instead of fresh ones."""
        for name, layer in self.layers.items():
            f = factors[name]
            layer.open(f.a, f.b, scale=f.scale, dropout=self.settings.dropout)
        self.open_link = OpenLink(len(self.links), {name: f.rank for name, f in factors.items()})
        return self.open_link

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The open link's `<module>.lora_A` and `<module>.lora_B`."""
        for name, layer in self.layers.items():
            if layer.lora_A is not None and layer.lora_B is not None:
                yield f"{name}.lora_A", layer.lora_A
                yield f"{name}.lora_B", layer.lora_B

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer should hold: the open link's factors. A new link has new ones."""
        return [parameter for _, parameter in self.named_parameters()]

    def open_factors(self) -> dict[str, Factors]:
        """A copy of the open link's factors on the CPU, by module."""
        return {
            name: Factors(layer.lora_A.detach().cpu().clone(), layer.lora_B.detach().cpu().clone(), self.settings.alpha)
            for name, layer in self.layers.items()
            if layer.lora_A is not None and layer.lora_B is not None
        }

    def tie(self) -> SealedLink:
        """Seal the open link, then fold it into the base. Logits stay as they were, up to the base dtype's rounding.

        If the chain has a folder, the link is on disk before the weights change. If sealing fails (NaN, disk full),
        nothing has happened: the link is still open.
        """
        if self.open_link is None:
            raise UserError("There is no open link to tie: call extend() first.")
        self._require_complete()
        return self.append(SealedLink.seal(self.open_link.index, self.open_factors(), **self.peft_fields()))

    def append(self, link: SealedLink) -> SealedLink:
        """Make `link` the last sealed one, in place of the open link."""
        if self.folder is not None:
            link.write(self.folder / folder_name(link.index))
            self._write_record([*self.links, link])
        self.links.append(link)
        self.open_link = None
        for layer in self.layers.values():
            layer.close()
        self._fold(link)
        if self.folder is not None:
            self._write_record(self.links)  # now with what the fold kept
        return link

    def detach(self, *, discard: bool = False) -> nn.Module:
        """Give the model its plain linears back. Tied links stay in the weights; the chain is done.

        Raises UserError if that would lose a trained open link; `discard=True` says it may go.
        """
        trained = any(bool(layer.lora_B.any()) for layer in self.layers.values() if layer.lora_B is not None)
        if trained and not discard:
            raise UserError(
                "The open link has been trained and would be lost: call tie() first, or detach(discard=True)."
            )
        for layer in self.layers.values():
            layer.to_linear()
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        self.layers, self.open_link = {}, None
        return self.model

    def replay(self, count: int) -> None:
        """Fold the next `count` sealed links that `load_chain(..., links=n)` left out."""
        for _ in range(count):
            link = self.waiting.pop(0)
            self.links.append(link)
            self._fold(link)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the chain to `folder` and keep it there: later ties go to the same place.

        extra: anything else that must be restored together with the open link (tensors and plain values), such as an
        optimizer's state. `load_state` returns it.
        """
        self._require_complete()
        folder = Path(folder)
        if self.folder != folder:
            if (folder / CHAIN_FILE).exists():
                raise UserError(f"{folder} already holds a chain: choose another folder, or load that one.")
            folder.mkdir(parents=True, exist_ok=True)
            for link in self.links:
                link.write(folder / folder_name(link.index))
        self.folder = folder
        self._write_record(self.links)
        states = _state_files(folder)
        number = int(states[-1].stem) + 1 if states else 0
        (folder / "state").mkdir(exist_ok=True)
        factors = {name: tuple(f) for name, f in self.open_factors().items()}
        index = None if self.open_link is None else self.open_link.index
        state = {"links": len(self.links), "open": index, "factors": factors, "extra": dict(extra or {})}
        store.save_tensors(folder / "state" / f"{number:08d}.pt", state)
        for old in states[: -(STATES_KEPT - 1)]:
            old.unlink(missing_ok=True)

    def import_adapter(self, folder: str | Path) -> SealedLink:
        """Fold the PEFT LoRA adapter in `folder` as the next sealed link, see `cola_fast.adapters.import_adapter`."""
        from .adapters import import_adapter

        return import_adapter(self, Path(folder))

    def export_adapter(self, folder: str | Path, rank: int | None = None) -> ExportedAdapter:
        """The whole chain as one PEFT adapter on the untouched base: exact, of the summed rank, or cut to `rank`."""
        from .export import export_adapter

        return export_adapter(self, Path(folder), rank)

    def export_merged(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """The model with every link in its weights, as a plain transformers checkpoint (safetensors)."""
        from .export import export_merged

        return export_merged(self, Path(folder), tokenizer)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _fold(self, link: SealedLink) -> None:
        """From the sealed bytes, as a replay does, so that both give the same weights. Idempotent by link index.
        What it kept is measured once, at the tie."""
        reports = {}
        for name, factors in link.factors().items():
            layer = self.layers[name]
            if layer.folded == link.index:
                seed = derive_seed(self.settings.seed, "fold", link.index, name)
                report = self.base.fold(layer, factors, seed, report=not link.fold)
                layer.folded += 1
                if report is not None:
                    reports[name] = report
        if reports:
            link.fold = summarise(reports)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    def _require_layers(self) -> None:
        if not self.layers:
            raise UserError("This chain has been detached: attach a new one, or load it again with load_chain.")

    def _require_complete(self) -> None:
        if self.waiting:
            raise UserError(
                f"This chain was loaded at an earlier point ({len(self.waiting)} links are left out) and can only be "
                "looked at: load it whole to go on with it."
            )

    def peft_fields(self) -> dict[str, Any]:
        """What `peft_format.encode` says of this chain's base and targets."""
        return {
            "targets": self._targets,
            "base_name": self.identity["name"],
            "base_revision": self.identity["revision"],
            "dropout": self.settings.dropout,
        }

    def record(self, links: Sequence[SealedLink]) -> dict[str, Any]:
        """What chain.json says of the chain with these links."""
        settings = self.settings
        return {
            "format": FORMAT,
            "base": self.identity,
            "base_kind": self.base.kind,
            "rounding": self.base.rounding,
            "r": settings.r,
            "alpha": settings.alpha,
            "dropout": settings.dropout,
            "seed": settings.seed,
            "rank_pattern": settings.rank_pattern,
            "modules": {name: list(shape) for name, shape in self._shapes().items()},
            "links": [link.record() for link in links],
        }

    def _write_record(self, links: Sequence[SealedLink]) -> None:
        assert self.folder is not None
        record = self.record(links)
        if record != self._recorded:
            store.write_file(self.folder / CHAIN_FILE, store.to_json(record))
            self._recorded = record


def load_chain(model: nn.Module, folder: str | Path, *, links: int | None = None) -> Chain:
    """Rebuild a saved chain on a fresh copy of its base model: fold the sealed links, then reopen the open one.

    links: fold only the first ones and open none, to look at an earlier point of the chain.

    Raises UserError if the folder holds no chain, the model is not its base, or a file is damaged. Files are checked
    before the model is touched.
    """
    folder = Path(folder)
    record = read_record(folder)
    actual = fingerprint(model)
    if actual != record["base"]["fingerprint"]:
        raise UserError(
            f"{folder} belongs to base model {record['base']['name']}, but this model's weights differ from it (or a "
            "chain has been tied into them already): load the untouched base first."
        )
    sealed = [SealedLink.from_record(entry, folder) for entry in record["links"]]
    if links is not None and not 0 <= links <= len(sealed):
        raise UserError(f"{folder} has {len(sealed)} sealed links, so links={links} cannot be loaded.")
    for link in sealed:
        link.factors()
    state = load_state(folder) if links is None else None
    pattern = "|".join(re.escape(name) for name in record["modules"])
    settings = Settings(record["r"], record["alpha"], record["dropout"], record["seed"], record["rank_pattern"])
    base = choose_base(record["base_kind"], record["rounding"])
    chain = Chain(model, select_modules(model, pattern), base, settings, record["base"])
    chain.folder = folder
    chain.waiting, chain._recorded = sealed, record
    chain.replay(len(sealed) if links is None else links)
    if state is not None and state["open"] == len(chain.links):
        chain.open_with({name: Factors(*f) for name, f in state["factors"].items()})
    return chain


def read_record(folder: str | Path) -> dict[str, Any]:
    """chain.json, checked to be one we can read."""
    folder = Path(folder)
    if not (folder / CHAIN_FILE).exists():
        raise UserError(f"{folder} holds no chain ({CHAIN_FILE} is missing): give the folder of a run.")
    record: dict[str, Any] = store.read_json(folder / CHAIN_FILE)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UserError(
            f"{folder / CHAIN_FILE} has format {found}, but this version reads format {FORMAT}: update cola_fast."
        )
    return record


def load_state(folder: str | Path) -> dict[str, Any] | None:
    """The newest state saved with the chain: `links` sealed by then, `open` index, `factors`, `extra`. None if there is
    none. A damaged file is passed over for the one before it."""
    for path in reversed(_state_files(Path(folder))):
        try:
            state: dict[str, Any] = store.load_tensors(path)
        except Exception:  # whatever a damaged zip or pickle raises
            continue
        return state
    return None


def _state_files(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("[0-9]*.pt"))


def _wrap_all(modules: Mapping[str, nn.Linear]) -> dict[str, LoRALinear]:
    """All or none."""
    done: dict[str, LoRALinear] = {}
    try:
        for name, module in modules.items():
            done[name] = LoRALinear.from_linear(module, name)
    except UserError:
        for layer in done.values():
            layer.to_linear()
        raise
    return done

"""The chain: an untouched base, sealed links in order, and the open link.

The chain is the data; the model's weights are a cache, which can be rebuilt at any time by folding the sealed links, in
order, into the base checkpoint. So a tie seals first (write, fsync, rename, record in chain.json) and folds after, and
a process killed anywhere neither loses a link nor folds one twice.

    attach -> [extend -> train -> tie]*        a folder made by `save` holds everything `load_chain` needs

`chain.attach` has the two ways to a chain, `attach` and `load_chain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import store, world
from ..errors import UserError, note, shown
from ..layers import weights
from ..layers.factors import Factors
from ..layers.grouping import Grouping
from ..layers.layer import PARTS, wrap_all
from ..layers.torch_modes import plainly
from ..methods import Pair
from ..seeds import derive_seed
from . import folding, knot, peers, writing
from .bases import Base
from .beside import Beside
from .calibration import Batches, as_batches, look
from .chain_json import folder_name
from .coverage import describe
from .open_link import OpenLink, Settings, covered, first_factors, originals_of, starts_of
from .save_pretrained import Saves
from .sealed_link import SealedLink
from .untouched import Untouched

if TYPE_CHECKING:
    from .export import ExportedAdapter, ExportedModel


class Chain:
    """Made by `attach` or `load_chain`. `links` are the sealed ones; `open_link` is None between `tie` and `extend`."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Linear],
        base: Base,
        settings: Settings,
        identity: Mapping[str, Any],
        beside: Beside,
    ) -> None:
        self.model, self.base, self.settings, self.identity = model, base, settings, dict(identity)
        self.links: list[SealedLink] = []
        self.open_link: OpenLink | None = None
        self.folder: Path | None = None
        self.recorded: tuple[Path, dict[str, Any]] | None = None  # chain.json as last written or read, and its folder
        self.state: str | None = None  # the name of the newest state on disk
        self.about: dict[str, Any] = {}  # what its maker wants kept in chain.json
        self.batches: list[Any] = []  # what an init that starts from data looks at
        self.waiting: list[SealedLink] = []  # sealed links of a loaded chain that have not been folded yet
        self.grouping = Grouping()
        self._held = weights.hold(model)
        self._were_trainable = [p for p in model.parameters() if p.requires_grad]
        self.beside, self.layers = beside, {}
        try:
            self.layers = wrap_all(modules, self.grouping)
            model.requires_grad_(False)
            beside.open()
        except BaseException:
            self._unwrap()
            raise
        self.saves = Saves(model, base.merging)
        self._untouched = Untouched(model, [*(layer.weight for layer in self.layers.values()), *beside.tensors()])

    def __repr__(self) -> str:
        return describe(self)

    # --- the open link ------------------------------------------------------------------------------------------------

    @plainly
    def extend(
        self,
        r: int | None = None,
        *,
        rank_pattern: Mapping[str, int] | None = None,
        batches: Batches | None = None,
        original: nn.Module | None = None,
    ) -> OpenLink:
        """Open the next link, of rank `r` (the chain's own when None; `rank_pattern` entries keep theirs).

        rank_pattern, batches: replace the chain's, from this link on; original: see `attach`.
        """
        if self.open_link is not None:
            raise UserError("The last link is still open: call tie() before extend().")
        self._require_layers()
        self._require_folded()
        pattern = self.settings.rank_pattern if rank_pattern is None else rank_pattern
        ranks = self.settings.with_pattern(pattern).ranks(self.shapes(), r)
        settings = self.settings.with_pattern(None if pattern is None else dict(pattern))
        looked_at = self.batches if batches is None else as_batches(batches)
        index, init = len(self.links), settings.init

        @cache
        def before() -> dict[str, Factors]:
            return {name: trained for name, (_, trained) in self.links[-1].steps().items()} if self.links else {}

        layers = {name: self.layers[name] for name in covered(list(ranks), settings, index)}
        originals = originals_of(init, index, layers, original)
        seen = look(init, self.model, layers, ranks, looked_at, derive_seed(settings.seed, "look", index))
        first = first_factors(settings, index, layers, ranks, before, seen, originals)
        factors = world.lead(lambda: first)
        opened = self.open_with(factors, starts_of(settings, factors))
        self.settings, self.batches = settings, looked_at
        if index > 0 and peers.count() > 1:
            note(
                "What shares gradients (DistributedDataParallel, accelerator.prepare) does not know the new link: wrap "
                "chain.model again after every extend()."
            )
        return opened

    def ranks(self, r: int | None = None) -> dict[str, int]:
        """Module -> the rank `extend(r)` would give it. Raises UserError for a rank that a module cannot have."""
        return self.settings.ranks(self.shapes(), r)

    def open_with(self, factors: Mapping[str, Factors], starts: Mapping[str, Factors] | None = None) -> OpenLink:
        """Open the next link with the given values instead of fresh ones.

        starts: what the link started from, to be taken out of the weights (`chain.open_link`).
        """
        index = len(self.links)
        if self.base.kind != "dense" and any(f.magnitude is not None for f in factors.values()):
            raise UserError(
                f"The link scales whole rows of the weight (DoRA), which only a dense weight can take, but base is "
                f"{self.base.kind}: load the model in 16 bits with base dense, or choose another method."
            )
        # copies: the factors themselves become the parameters that are trained
        starts = {name: Factors(f.a.clone(), f.b.clone(), f.alpha) for name, f in (starts or {}).items()}
        taken: list[str] = []
        try:
            for name, start in starts.items():
                folding.take_out(self, index, name, start.negated())
                taken.append(name)
            for name, f in factors.items():
                layer = self.layers[name]
                layer.open(f.a, f.b, scale=f.scale, dropout=self.settings.dropout, e=f.e, magnitude=f.magnitude)
                for letter, factor in (("a", layer.lora_A), ("b", layer.lora_B)):
                    assert factor is not None
                    factor.requires_grad_(letter != self.settings.frozen)
        except BaseException:  # out of memory, Ctrl-C: no link is open, and what had left the weights is back
            for layer in self.layers.values():
                layer.close()
            for name in taken:
                folding.take_out(self, index, name, starts[name])
            raise
        ranks, alphas = ({name: getattr(f, key) for name, f in factors.items()} for key in ("rank", "alpha"))
        self.open_link = OpenLink(index, ranks, alphas, starts)
        return self.open_link

    def reopen(self, state: Mapping[str, Any]) -> None:
        """As `save` found it: the next link, if one was open, and what is trained beside it."""
        if self.beside:
            self.beside.set(state.get("beside", {}), "The state")
        if state["open"] is None:
            return
        factors, starts = (
            {name: Factors(*f) for name, f in state.get(key, {}).items()} for key in ("factors", "starts")
        )
        self.open_with(factors, starts)
        self.grouping.restore(state.get("groups", ()), self.layers)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the open link, then those trained beside it."""
        yield from self.link_parameters()
        yield from self.beside.named_parameters()

    def link_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The open link's `<module>.lora_A`, `<module>.lora_B` and gates, without the frozen ones."""
        for name, layer in self.layers.items():
            for part in PARTS:
                parameter = getattr(layer, part)
                if parameter is not None and parameter.requires_grad:
                    yield f"{name}.{part}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer should hold: the open link's trained factors, of which a new link has new ones, and what
        `train_also` and `train_tokens` name."""
        return [parameter for _, parameter in self.named_parameters()]

    def pairs(self) -> list[Pair]:
        """Both factors of each module of the open link, with its scale and its gate e."""
        return [
            Pair(layer.lora_A, layer.lora_B, layer.scale, layer.lora_e)
            for layer in self.layers.values()
            if layer.lora_A is not None and layer.lora_B is not None
        ]

    def live_factors(self) -> dict[str, Factors]:
        """A copy of the open link's A, B and gates on the CPU, by module."""
        found: dict[str, Factors] = {}
        for name, alpha in (self.open_link.alphas if self.open_link is not None else {}).items():
            parts = (getattr(self.layers[name], part) for part in PARTS)
            a, b, *gates = (None if part is None else part.detach().cpu().clone() for part in parts)
            assert a is not None
            assert b is not None
            found[name] = Factors(a, b, alpha, *gates)
        return found

    def open_factors(self) -> dict[str, Factors]:
        """What the open link adds to the sealed ones, by module: its A and B, less what it started from. A gate e is in
        B; directions it has closed are left out, unless a start takes as many."""
        starts = self.open_link.starts if self.open_link is not None else {}
        return {
            name: f.folded().minus(starts[name]) if name in starts else f.folded(drop=True)
            for name, f in self.live_factors().items()
        }

    def tie(self) -> SealedLink:
        """Seal the open link, then fold it into the base. Logits stay as they were, up to the base dtype's rounding.

        If the chain has a folder, the link is on disk before the weights change. If sealing fails (NaN, disk full),
        nothing has happened: the link is still open.

        In several processes of one's own loop all have to call it; a link that is not the same everywhere is refused.
        """
        if self.open_link is None:
            raise UserError("There is no open link to tie: call extend() first.")
        self._require_complete()
        self._require_folded()
        self.require_all_kept()
        index, difference = self.open_link.index, bool(self.open_link.starts)
        knot.require_same_everywhere(self)
        with world.together():
            knot.require_room(self)

        def seal() -> SealedLink:
            factors = self.open_factors()
            link = SealedLink.seal(index, factors, difference=difference, **writing.peft_fields(self, factors))
            knot.warn_of_idle(self)
            return link

        return self.append(seal)

    @plainly
    def append(self, seal: Callable[[], SealedLink]) -> SealedLink:
        """Make a link the last sealed one, in place of the open link, whose start has left the weights."""

        def keep() -> SealedLink:
            link = seal()
            if self.folder is not None and peers.rank() == 0:
                link.write(self.folder / folder_name(link.index))
                writing.write_record(self, self.folder, [*self.links, link])
            return link

        with peers.together("tie()"):
            link = world.lead(keep)
        self.links.append(link)
        self.open_link = None
        for layer in self.layers.values():
            layer.close()
        folding.fold(self, link, live=True)
        if (folder := self.folder) is not None and peers.rank() == 0:
            with suppress(UserError):  # the link is tied; what its fold kept is written with the next save
                world.lead(lambda: writing.write_record(self, folder, self.links))
        return link

    def detach(self, *, discard: bool = False) -> nn.Module:
        """Give the model its plain linears back. Tied links stay in the weights; the chain is done.

        A start that left 16-bit weights (PiSSA, OLoRA, LoRA-GA, carry) is added again, rounded: load the base anew for
        its very bits.

        Raises UserError if that would lose a trained open link, or a ledger; `discard=True` says it may go.
        """
        starts = self.open_link.starts if self.open_link is not None else {}
        trained = any(knot.has_moved(self, name, f) for name, f in self.live_factors().items())
        trained |= any(layer.rescales() for layer in self.layers.values())
        if trained and not discard:
            raise UserError(
                "The open link changes the model, which would be lost: call tie() first, or detach(discard=True)."
            )
        if any(layer.ledger_A is not None for layer in self.layers.values()) and not discard:
            raise UserError(
                "This chain keeps its links beside the weights (base: ledger), so detaching would lose them: use "
                "export_merged or export_adapter, or detach(discard=True)."
            )
        for name, start in starts.items():
            folding.take_out(self, len(self.links), name, start)  # put back
        self.saves.remove()
        self._unwrap()
        self.open_link = None
        return self.model

    def _unwrap(self) -> None:
        for layer in self.layers.values():
            layer.to_linear()
        self.beside.close()
        for parameter in self._were_trainable:
            parameter.requires_grad_(True)
        weights.release(self._held)
        self.layers = {}

    def replay(self, count: int) -> None:
        """Fold the next `count` sealed links that `load_chain(..., links=n)` left out."""
        for _ in range(count):
            link = self.waiting.pop(0)
            self.links.append(link)
            folding.fold(self, link)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the chain to `folder` and keep it there: later ties go to the same place.

        extra: anything else that must be restored together with the open link (tensors and plain values), such as an
        optimizer's state. `load_state` returns it.
        """
        self._require_layers()
        self._require_complete()
        self.require_all_kept()
        if extra is not None and not isinstance(extra, Mapping):
            raise UserError(f"extra is {shown(extra)}, but must be a mapping of names to tensors and plain values.")
        peers.require_writer(folder)
        folder = store.given_path(folder).absolute()  # later ties go there, wherever the process has moved to
        world.lead(lambda: writing.write(self, folder, extra))
        self.folder = folder  # on every rank

    def import_adapter(self, folder: str | Path) -> SealedLink:
        """Fold the PEFT LoRA adapter in `folder` as the next sealed link, see `chain.adapters.import_adapter`."""
        from .adapters import import_adapter

        return import_adapter(self, store.given_path(folder))

    def export_adapter(self, folder: str | Path, rank: int | None = None) -> ExportedAdapter:
        """The whole chain as one PEFT adapter on the untouched base: exact, of the summed rank, or cut to `rank`."""
        from .export import export_adapter

        self.require_all_kept()
        return export_adapter(self, store.given_path(folder).absolute(), rank)

    def export_merged(
        self, folder: str | Path, tokenizer: Any = None, *, onto: nn.Module | None = None
    ) -> ExportedModel:
        """The model with every link in its weights, as a plain transformers checkpoint (safetensors), never quantised.

        onto: the 16-bit model that a 4-bit base was quantised from, to fold the links into that, as trained; it is
            changed. Better weights than the dequantised base, but not those the links were trained on.
        """
        from .export import export_merged

        self._require_folded()
        return export_merged(self, store.given_path(folder).absolute(), tokenizer, onto)

    # --- inside -------------------------------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    def _require_layers(self) -> None:
        if not self.layers:
            raise UserError("This chain has been detached: attach a new one, or load it again with load_chain.")

    def _require_folded(self) -> None:
        if any(layer.folded != len(self.links) for layer in self.layers.values()):
            place = "it" if self.folder is None else str(self.folder)
            raise UserError(
                f"Folding link {len(self.links) - 1} was interrupted, so some of the weights lack it: the chain itself "
                f"is whole; {'save it, then ' if self.folder is None else ''}load the base anew and {place} with "
                "load_chain."
            )

    def require_all_kept(self) -> None:
        """Raises UserError if anything but the chain's own is trained or has changed: nobody would keep it."""
        if not self.layers:  # detached
            return
        factors = (getattr(layer, part) for layer in self.layers.values() for part in PARTS)
        self._untouched.require(
            self.model, [*self.beside.parameters(), *(factor for factor in factors if factor is not None)]
        )

    def _require_complete(self) -> None:
        if self.waiting:
            raise UserError(
                f"This chain was loaded at an earlier point ({len(self.waiting)} links are left out) and can only be "
                "looked at: load it whole to go on with it."
            )

    def record(self, links: Sequence[SealedLink]) -> dict[str, Any]:
        """What chain.json says of the chain with these links."""
        return writing.record(self, links)

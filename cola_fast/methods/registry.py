"""Methods, and the slots that their functions fill. A slot is a configuration key whose value names a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ..errors import UserError, near, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..config import ChainConfig, TrainConfig
    from ..data.encode import Example
    from ..layers.factors import Factors
    from ..layers.layer import LoRALinear

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    name: str
    paper: str
    summary: str
    defaults: Mapping[str, Any]  # of the configuration's shape; whatever the user writes wins


@dataclass(frozen=True)
class Site:
    """One module, for which a new link needs its first values. Weight and previous values are not to be changed."""

    shape: tuple[int, int]  # (N, K)
    read: Callable[[], Tensor]  # the weight [N, K], all sealed links folded in
    rank: int
    scale: float
    frozen: str | None  # "a" or "b": the factor that will not be trained
    carry: float
    dtype: torch.dtype  # of the factors
    generator: torch.Generator  # on the CPU, its own for each link and module
    previous: Callable[[], Factors | None]  # what the link before ended with here; read from disk when asked for
    index: int = 0  # of the link in its chain
    seen: Any = None  # what the init's `see` made of the training batches
    original: Tensor | None = None  # [N, K], for an init that `corrects`: the weight before it was quantised

    @property
    def weight(self) -> Tensor:
        """Only for a start that depends on it: it may have to be dequantised, or gathered from other processes."""
        return self.read()


@dataclass(frozen=True)
class Wants:
    """What an init wants beyond the weight, and whether it changes the model's function on purpose."""

    # (what it made of the batches before or None, R, x [M, K], dy [M, N] or None) -> the same with this batch, at one
    # module. Linear algebra in at least fp32; random draws are seeded.
    see: Callable[[Any, int, Tensor, Tensor | None], Any] | None = None
    gradients: bool = False  # dy, the gradient of the module's output, too
    trained: tuple[str, ...] = ()  # "a", "b": the factors that cannot stay as it leaves them
    directions: int = 1  # of the weight's min(N, K), for each of the rank's
    corrects: bool = False  # it starts as a correction of what quantising lost, which stays in the function


class Gates(NamedTuple):
    """What a link trains at one module beside A and B."""

    e: Tensor | None = None  # [R], on the inner product
    magnitude: Tensor | None = None  # [N], what the weight's rows are scaled to


class Pair(NamedTuple):
    """The trained factors of one module: the update is `scale · b diag(e) a`, a [R, K], b [N, R], e [R]."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    e: nn.Parameter | None = None

    def require_e(self, key: str) -> nn.Parameter:
        """Raises UserError if the link has none. key: the configuration key that asks for it."""
        if self.e is None:
            raise UserError(f"{key} needs gates on the rank: set chain.gate to one that has them, such as sora.")
        return self.e


class Step(NamedTuple):
    """A step that the optimizer has just taken. Gradients are still there."""

    lr: float
    done: float  # share of the link's steps, this one included
    config: TrainConfig
    state: dict[Any, dict[str, Any]]  # the optimizer's, by parameter: what is added is saved, and reset, with the rest


class Slot(dict[str, F], Generic[F]):
    """Name -> function. `key` is the configuration key that holds the name."""

    def __init__(self, key: str) -> None:
        self.key = key

    def fill(self, name: str) -> Callable[[F], F]:
        def register(function: F) -> F:
            self[name] = function
            return function

        return register

    def choose(self, name: str, argument: str | None = None) -> F:
        """Raises UserError for a name that nothing has registered. argument: what it is called in Python."""
        if not isinstance(name, str) or name not in self:
            key, hint = argument or self.key, near(str(name), self) if isinstance(name, str) else ""
            raise UserError(f"{key} is {shown(name)}, but must be one of {', '.join(self)}.{hint}")
        return self[name]


# A link's first A [R, K] and B [N, R], in `site.dtype` on any device. Where B A is not zero, the chain takes
# scale · B A out of the weight, so that the model's function stays as it was (unless the init corrects it).
INIT: Slot[Callable[[Site], tuple[Tensor, Tensor]]] = Slot("chain.init")
WANTS: dict[str, Wants] = {}  # by name of the init; most want nothing
# The first gates of a link, in `site.dtype`: with e, `scale · B diag(e) A` is what leaves the weight.
GATE: Slot[Callable[[Site], Gates]] = Slot("chain.gate")
# (alpha, R, r) -> the alpha a module of rank R gets where the chain's are alpha and r: its scale is that alpha over R.
SCALING: Slot[Callable[[float, int, int], float]] = Slot("chain.scaling")
# (model without an open link, training examples, configuration, index of the link about to be opened)
# -> module or pattern -> rank, or None to leave the ranks as they are.
RANKS: Slot[Callable[[nn.Module, Sequence[Example], ChainConfig, int], dict[str, int] | None]] = Slot("chain.ranks")
# (parameter groups, configuration, which parameters are factors of one module) -> optimizer.
OPTIMIZER: Slot[Callable[[list[dict[str, Any]], TrainConfig, Sequence[Pair]], torch.optim.Optimizer]] = Slot(
    "train.optimizer"
)
# Changes the gradients in place, after the backward pass and before clipping.
GRADIENT: Slot[Callable[[Sequence[Pair], TrainConfig], None]] = Slot("train.gradient")
# (layers by name, share of the run that is done, seed of the step, configuration) -> what a step's forward and backward
# passes run inside. It leaves the weights, and afterwards the layers, as they were.
PERTURB: Slot[Callable[[Mapping[str, LoRALinear], float, int, TrainConfig], AbstractContextManager[None]]] = Slot(
    "train.perturb"
)
# Changes the parameters in place, after the optimizer's step.
AFTER_STEP: Slot[Callable[[Sequence[Pair], Step], None]] = Slot("train.after_step")
# (the optimizer's state by parameter index, `schedule.prune`, seed) -> what the next link's optimizer starts from.
STATE: Slot[Callable[[dict[int, dict[str, Any]], float, int], dict[int, dict[str, Any]]]] = Slot(
    "schedule.optimizer_state"
)
SLOTS: tuple[Slot[Any], ...] = (INIT, GATE, SCALING, RANKS, OPTIMIZER, GRADIENT, PERTURB, AFTER_STEP, STATE)

METHODS: dict[str, Method] = {}


def wanted_by(init: str) -> Wants:
    return WANTS.get(init, Wants())


def register(*methods: Method) -> None:
    METHODS.update({method.name: method for method in methods})


def preset(names: Sequence[str], written: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of several methods together, as a tree. Raises UserError for an unknown name, and where two methods
    disagree about a key that `written` (the user's own tree) leaves open."""
    tree: dict[str, Any] = {}
    setters: dict[tuple[str, str], tuple[str, Any]] = {}
    for name in names:
        if name not in METHODS:
            raise UserError(f"chain.method is {name!r}, but must be one of {', '.join(METHODS)}.{near(name, METHODS)}")
        for section, key, value in _leaves(METHODS[name]):
            first, other = setters.setdefault((section, key), (name, value))
            mine = written.get(section)
            if other != value and not (isinstance(mine, Mapping) and key in mine):
                raise UserError(
                    f"The methods {first} and {name} set {section}.{key} to {other} and {value}: write the key "
                    "yourself, or leave one of them out."
                )
            tree.setdefault(section, {})[key] = other
    return tree


def table() -> str:
    """The registry as a Markdown table."""
    lines = ["| method | source | what it does | what it sets |", "|---|---|---|---|"]
    for method in METHODS.values():
        sets = ", ".join(f"`{section}.{key}: {_yaml(value)}`" for section, key, value in _leaves(method))
        lines.append(f"| `{method.name}` | {method.paper} | {method.summary} | {sets} |")
    return "\n".join(lines)


def _leaves(method: Method) -> Iterator[tuple[str, str, Any]]:
    return ((section, key, value) for section, keys in method.defaults.items() for key, value in keys.items())


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)

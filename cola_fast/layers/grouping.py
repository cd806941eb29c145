"""Layers that read the same x run as one op: q, k and v; gate and up.

The layers of a chain share one `Grouping`. It watches which of them a model calls one after another with the very same
tensor. From the next forward on, the first of them computes every member's output in one autograd node (one pass over x
for S and for dA, one accumulated dX), and the others hand out theirs when they are called. The model's code is not
touched, and nothing is assumed of it: an output is handed out only if computing it at that moment would give the same.
Whatever differs (another x, or x changed in place; other factors; autocast, grad mode, dropout, stream, checkpointed
region) makes a layer run alone, and a group that wastes an output dissolves. While torch.compile traces, each runs
alone.

Members share one dropout mask, from one number drawn from torch's generator; alone, each layer draws its own. What a
forward has drawn, its recomputation under activation checkpointing must draw again. So a group forms or dissolves only
when no earlier forward waits for its backward pass; as reentrant checkpointing hides that, no group forms under it.
What a chain has learned of its groups is saved with the open link, so that a resumed run goes on alike.

Limits: the members' backward is one node, so going backward through them one after the other needs `retain_graph=True`
even where x is a leaf. A write into x that autograd's version counter does not see (`x.data`) is not seen here either.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cola_kernels import lora_linear, lora_linear_group
from cola_kernels.autograd import autocast_dtype

from .output_gate import output_gate

OUTSIDE = -1  # no backward pass is running


class Operands(NamedTuple):
    """What a layer is, x apart: `lora_linear`'s arguments, and frozen factors that stand beside the link."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    bias: Tensor | None
    dropout: float = 0.0  # 0 outside training
    ledger_a: Tensor | None = None  # [P, K]
    ledger_b: Tensor | None = None  # [N, P], scales included
    e: Tensor | None = None  # [R]
    magnitude: Tensor | None = None  # with row_squares: what the gate c is computed from, see `layers.output_gate`
    row_squares: Tensor | None = None

    @property
    def is_gated(self) -> bool:
        return self.e is not None or self.magnitude is not None

    def c(self) -> Tensor | None:
        if self.magnitude is None or self.row_squares is None:
            return None
        return output_gate(self.magnitude, self.row_squares, self.weight, self.lora_a, self.lora_b, self.scale, self.e)

    def joined(self) -> Operands:
        """With the frozen factors as part of the link's; not with dropout, which does not drop those."""
        if self.ledger_a is None or self.ledger_b is None or self.dropout > 0:
            return self
        b = self.lora_b if self.e is None else self.lora_b * self.e
        a, b = torch.cat((self.lora_a, self.ledger_a)), torch.cat((b * self.scale, self.ledger_b), dim=1)
        return Operands(self.weight, a, b, 1.0, self.bias)

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y, which is `x Wᵀ + bias` as another library computes it, with the link added, by PyTorch's own autograd. The
        link is exact; the sum is rounded to y's dtype once more than in the fused op."""
        joined = self.joined()
        b = joined.lora_b if joined.e is None else joined.lora_b * joined.e
        s = F.linear(F.dropout(x, self.dropout), joined.lora_a.to(x.dtype))
        return self.complete(y + F.linear(s, (b * joined.scale).to(x.dtype)).to(y.dtype), x)

    def complete(self, y: Tensor, x: Tensor) -> Tensor:
        """y with what the op has left out."""
        if self.ledger_a is None or self.ledger_b is None or self.dropout == 0:
            return y
        return y + F.linear(F.linear(x, self.ledger_a.to(x.dtype)), self.ledger_b.to(x.dtype))


class Grouping:
    """Shared by layers that may run together: modules with `operands()`, which are None where there is nothing to add.

    Copied or unpickled (with the layers, by deepcopy) it is a fresh one, which learns again.
    """

    def __init__(self) -> None:
        self._groups: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()
        self._thread = _Thread()
        self.held = False  # while it is, no group forms or dissolves

    def __reduce__(self) -> tuple[type[Grouping], tuple[()]]:
        return Grouping, ()

    def __call__(self, layer: nn.Module, own: Operands, x: Tensor) -> Tensor:
        """The layer's output for x: handed out, computed together with its group's, or computed alone."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _alone(own, x)  # inference tensors have no version to tell a change by
        now = _Moment.of(x)
        last, self._thread.last = self._thread.last, None
        y = self._hand_out(layer, own, x, now)
        if y is not None:
            return y
        group = self._groups.get(layer)
        if group is not None and group.leader is layer and group.is_together(now, own.dropout, held=self.held):
            members = group.operands(own)
            if members is not None:
                return self._together(group, members, x, now)
        y = _alone(own, x)
        if now.grad and y.grad_fn is not None:
            if group is None:
                self._thread.last = self._learn(layer, x, now, y.grad_fn, last)
            elif group.leader is layer:
                group.runs(y.grad_fn)
        return y

    def forget(self, layer: nn.Module) -> None:
        """The layer's link has changed: what is known of its group, and outputs not handed out, are dropped."""
        self._groups.pop(layer, None)
        self._thread.waiting = self._thread.last = None

    def state(self, layers: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
        """What has been learned, by the layers' names; for `restore`."""
        names = {layer: name for name, layer in layers.items()}
        return [
            {"members": [names[m] for m in group.members()], "wanted": group.wanted, "together": group.together}
            for group in dict.fromkeys(self._groups[layer] for layer in names if layer in self._groups)
        ]

    def restore(self, state: Sequence[Mapping[str, Any]], layers: Mapping[str, nn.Module]) -> None:
        for entry in state:
            members = [layers[name] for name in entry["members"]]
            group = _Group([ref(m) for m in members], entry["wanted"], entry["together"])
            self._groups.update((m, group) for m in members)

    def _hand_out(self, layer: nn.Module, own: Operands, x: Tensor, now: _Moment) -> Tensor | None:
        """The layer's waiting output, if it is for this call. If it is not, none of them waits any longer."""
        waiting, self._thread.waiting = self._thread.waiting, None
        if waiting is None:
            return None
        output = waiting.outputs.pop(ref(layer), None)
        if output is None or x is not waiting.x or now != waiting.moment or _state(own) != output.state:
            waiting.group.wasted(waiting.moment)
            return None
        if waiting.outputs:
            self._thread.waiting = waiting
        return output.y

    def _together(self, group: _Group, members: Sequence[Operands], x: Tensor, now: _Moment) -> Tensor:
        joined = [member.joined() for member in members]
        gated = any(member.is_gated for member in joined)
        gates: dict[str, Any] = {"es": [m.e for m in joined], "cs": [m.c() for m in joined]} if gated else {}
        operands = zip(*(member[:5] for member in joined), strict=True)
        y, *rest = lora_linear_group(x, *operands, dropout=members[0].dropout, **gates)
        if y.grad_fn is not None:
            group.runs(y.grad_fn)
        others = zip(group.refs[1:], members[1:], rest, strict=True)
        outputs = {layer: _Output(value, operands, _state(operands)) for layer, operands, value in others}
        self._thread.waiting = _Waiting(group, x, now, outputs)
        return y

    def _learn(self, layer: nn.Module, x: Tensor, now: _Moment, node: Any, last: _Last | None) -> _Last:
        """The layer's first call with autograd: it joins the group of the call before it, or begins one."""
        if last is not None and last.x() is x and last.moment == now:
            last.group.add(layer)
        else:
            last = _Last(ref(x), now, _Group([ref(layer)]))
        last.group.runs(node)
        self._groups[layer] = last.group
        return last


class _Moment(NamedTuple):
    """Whatever else than x and the layer decides what a call computes and what autograd records of it."""

    version: int  # of x
    requires_grad: bool  # of x
    grad: bool
    autocast: torch.dtype | None
    stream: Any
    backward: int  # the backward pass which is recomputing this call, or OUTSIDE
    hooks: Any  # on saved tensors: each checkpointed region has its own

    @classmethod
    def of(cls, x: Tensor) -> _Moment:
        return cls(
            _version(x),
            x.requires_grad,
            torch.is_grad_enabled(),
            autocast_dtype(x.device),
            torch.cuda.current_stream(x.device) if x.is_cuda else None,
            torch._C._current_graph_task_id(),
            _saved_tensors_hooks(True),
        )


@dataclass(eq=False)
class _Group:
    """Layers that were first called one after another with the same x; the first of them leads."""

    refs: list[ref[nn.Module]]
    wanted: bool = False  # that they run together
    together: bool = False  # that they do: follows `wanted` as soon as that is safe
    nodes: set[ref[Any]] = field(default_factory=set)  # of the leader's calls

    @property
    def leader(self) -> nn.Module | None:
        return self.refs[0]()

    def members(self) -> Iterator[nn.Module]:
        return (member for member in (r() for r in self.refs) if member is not None)

    def add(self, layer: nn.Module) -> None:
        self.refs.append(ref(layer))
        self.wanted = True

    def runs(self, node: Any) -> None:
        """Remember a call that a backward pass may yet recompute."""
        if not hasattr(node, "_raw_saved_tensors"):  # PyTorch's own: no weak references, no look inside
            call = _Call()
            node.register_prehook(call)
            node = call
        self.nodes.add(ref(node, self.nodes.discard))

    def wasted(self, then: _Moment) -> None:
        """An output was not asked for. In a recomputation that may be, since it ends when it has what it needs."""
        if then.backward == OUTSIDE:
            self.wanted = False

    def is_together(self, now: _Moment, dropout: float, *, held: bool = False) -> bool:
        """Without grad no group forms, and only one that draws nothing dissolves: it may be reentrant checkpointing."""
        change = self.wanted != self.together and now.backward == OUTSIDE and not held
        change = change and (now.grad or (self.together and dropout == 0))
        if change and not any(_unfinished(node()) for node in list(self.nodes)):
            self.together = self.wanted
        return self.together

    def operands(self, own: Operands) -> list[Operands] | None:
        """Each member's; None if they do not fit together now."""
        members: list[Operands] = []
        for member in (r() for r in self.refs):
            if member is None or member._forward_pre_hooks:  # a hook may be about to fetch or replace its weight
                return None
            operands = member.operands()  # type: ignore[operator]
            if operands is None or _kind(operands) != _kind(own):
                return None
            members.append(operands)
        return members


@dataclass
class _Waiting:
    """Outputs that have been computed and not yet been handed out. They wait for the next call, no longer."""

    group: _Group
    x: Tensor
    moment: _Moment
    outputs: dict[ref[nn.Module], _Output]  # weakly: a thread's memory must not keep a model alive


class _Output(NamedTuple):
    y: Tensor
    operands: Operands  # kept, so that no other tensor can have the same id
    state: tuple[Any, ...]


class _Last(NamedTuple):
    """The call before this one, if that was its layer's first."""

    x: ref[Tensor]
    moment: _Moment
    group: _Group


class _Thread(threading.local):
    waiting: _Waiting | None = None
    last: _Last | None = None


def _alone(own: Operands, x: Tensor) -> Tensor:
    joined = own.joined()
    gates: dict[str, Any] = {"e": joined.e, "c": joined.c()} if joined.is_gated else {}
    return lora_linear(x, *joined[:5], dropout=own.dropout, **gates)


def _kind(operands: Operands) -> tuple[Any, ...]:
    """What members must have in common."""
    weight, a, b = operands[:3]
    return operands.dropout, weight.dtype, a.dtype, weight.device, a.device, b.device


def _state(operands: Operands) -> tuple[Any, ...]:
    """Changes with everything that the result and its gradients depend on."""
    return tuple(
        (id(part), _version(part), part.requires_grad) if isinstance(part, Tensor) else part for part in operands
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class _Call:
    """Lives as long as the autograd node that it is a hook of, and knows whether a backward pass has come."""

    done = False

    def __call__(self, gradients: Any) -> None:
        self.done = True


def _unfinished(node: Any) -> bool:
    """Whether a backward pass may still come through this autograd node."""
    if isinstance(node, _Call):
        return not node.done
    try:
        return node is not None and bool(node._raw_saved_tensors)  # a look that unpacks nothing
    except RuntimeError:  # freed by the backward pass
        return False


# In torch from 2.8 on. Before that, regions that part a group's members are not told apart: checkpoint whole blocks.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None)

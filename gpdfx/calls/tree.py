"""Arguments and results of any structure, as flat lists.

What PyTorch's pytree knows (containers, named tuples, every class registered with it) is its; an
object that it does not know and that holds tensors in its attributes (a dataclass, torchvision's
``ImageList``) is opened here, and made again by a shallow copy that runs no code of its class.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch_private

KeyPath = tuple[Any, ...]
"""Pytree's keys on the way to a leaf."""


@dataclass(frozen=True)
class _Opened:
    """The object that is leaf number ``place``: its attributes, and an empty copy of it."""

    place: int
    kind: type
    names: tuple[str, ...]
    spec: Spec
    shell: Any = field(compare=False)


@dataclass(frozen=True)
class Spec:
    """A structure without its leaves."""

    outer: torch_private.TreeSpec
    opened: tuple[_Opened, ...]


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """``([leaves], spec)``; ``unflatten`` is its inverse."""
    flat, outer = torch_private.tree_flatten(tree)
    leaves: list[Any] = []
    opened = []
    for place, leaf in enumerate(flat):
        if not _holds_tensors(leaf):
            leaves.append(leaf)
            continue
        shell = copy.copy(leaf)
        shell.__dict__.clear()
        inside, spec = flatten(list(vars(leaf).values()))
        opened.append(_Opened(place, type(leaf), tuple(vars(leaf)), spec, shell))
        leaves += inside
    return leaves, Spec(outer, tuple(opened))


def paths(tree: Any) -> list[KeyPath]:
    """The way to every leaf of ``flatten``."""
    found: list[KeyPath] = []
    for path, leaf in torch_private.tree_paths(tree):
        if _holds_tensors(leaf):
            for name, value in vars(leaf).items():
                found += [
                    (*path, torch_private.attribute_key(name), *rest) for rest in paths(value)
                ]
        else:
            found.append(path)
    return found


def names(tree: Any) -> list[str]:
    """What every leaf of ``flatten`` would be called: ``[1]['boxes']``, ``[0].image_sizes[1]``."""
    return [torch_private.key_text(path) for path in paths(tree)]


def unflatten(leaves: Iterable[Any], spec: Spec) -> Any:
    """Put leaves back into their structure."""
    rest = iter(leaves)
    opened = {o.place: o for o in spec.opened}
    values = []
    for place in range(spec.outer.num_leaves):
        if one := opened.get(place):
            made = copy.copy(one.shell)
            made.__dict__.update(zip(one.names, unflatten(rest, one.spec), strict=True))
            values.append(made)
        else:
            values.append(next(rest))
    return torch_private.tree_unflatten(values, spec.outer)


SLOTS = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


class Slot:
    """Stands in a pattern for what differs from call to call."""


@dataclass(frozen=True)
class Pattern:
    """A structure with its constant leaves, and ``Slot`` for each of the others."""

    spec: Spec
    held: tuple[Any, ...]

    @property
    def slots(self) -> list[bool]:
        return [x is Slot for x in self.held]

    def fill(self, values: Iterable[Any]) -> Any:
        """The structure with values in its slots."""
        rest = iter(values)
        return unflatten([next(rest) if x is Slot else x for x in self.held], self.spec)

    def same(self, other: Pattern) -> bool:
        """True if structure and constants are equal."""
        return self.spec == other.spec and all(map(_same, self.held, other.held))

    def match(self, tree: Any) -> list[Any] | None:
        """The tensors in the slots; ``None`` if the structure or a constant is another."""
        other, tensors = pattern(tree, (Tensor,))
        return tensors if self.same(other) else None


def pattern(tree: Any, kinds: tuple[type, ...] = SLOTS) -> tuple[Pattern, list[Any]]:
    """A pattern with slots for all tensors and symbolic numbers, and what stands in them."""
    flat, spec = flatten(tree)
    held = tuple(Slot if isinstance(x, kinds) else x for x in flat)
    return Pattern(spec, held), [x for x in flat if isinstance(x, kinds)]


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a is b or a == b)
    except Exception:  # objects that cannot be compared, arrays of several values
        return False


def leaves(tree: Any) -> list[Any]:
    """All leaves, in order."""
    return flatten(tree)[0]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure with ``function`` of every leaf."""
    flat, spec = flatten(tree)
    return unflatten(map(function, flat), spec)


def fresh(tree: Any) -> Any:
    """``copied``, and copies of what else has a state: what a call may change."""
    return map_leaves(own, copied(tree))


def copied(tree: Any) -> Any:
    """The same structure and values in tensors of its own, leaves of autograd; one that stands in
    several places still does."""
    flat, spec = flatten(tree)
    made = {
        id(x): x.detach().clone().requires_grad_(x.requires_grad)
        for x in flat
        if isinstance(x, Tensor)
    }
    return unflatten([made.get(id(x), x) for x in flat], spec)


def own(constant: Any) -> Any:
    """A copy of a leaf that is no tensor, if it has a state and can be copied."""
    kept = (getattr(constant, name, None) for name in ("__dict__", "__slots__"))
    stateful = isinstance(constant, torch.Generator) or any(kept)
    if stateful and not isinstance(constant, _CLOSED):
        with contextlib.suppress(Exception):  # a lock, a process group: there is only one
            return copy.deepcopy(constant)
    return constant


_CLOSED = (Tensor, nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)


def _holds_tensors(leaf: Any, depth: int = 4) -> bool:
    """True for an object that pytree leaves whole and that has tensors in its attributes."""
    if isinstance(leaf, _CLOSED) or not hasattr(leaf, "__dict__") or depth == 0:
        return False
    inside = torch_private.tree_leaves(list(vars(leaf).values()))
    return any(isinstance(x, Tensor) or _holds_tensors(x, depth - 1) for x in inside)

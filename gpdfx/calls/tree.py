"""Arguments and results of any structure, as flat lists.

What PyTorch's pytree knows (containers, named tuples, every class registered with it) is its; an
object that it does not know and that holds tensors in its attributes (a dataclass, torchvision's
``ImageList``) is opened here, and made again by a shallow copy that runs no code of its class.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class _Opened:
    """The object that is leaf number ``place``: an empty copy of it, and its attributes' names."""

    place: int
    shell: Any
    names: tuple[str, ...]
    spec: Spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opened) and self._key() == other._key()

    def _key(self) -> Any:
        return self.place, type(self.shell), self.names, self.spec


@dataclass(frozen=True)
class Spec:
    """A structure without its leaves."""

    outer: pytree.TreeSpec
    opened: tuple[_Opened, ...]


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """``([leaves], spec)``; ``unflatten`` is its inverse."""
    flat, outer = pytree.tree_flatten(tree)
    leaves: list[Any] = []
    opened = []
    for place, leaf in enumerate(flat):
        if not _holds_tensors(leaf):
            leaves.append(leaf)
            continue
        shell = copy.copy(leaf)
        shell.__dict__.clear()
        inside, spec = flatten(list(vars(leaf).values()))
        opened.append(_Opened(place, shell, tuple(vars(leaf)), spec))
        leaves += inside
    return leaves, Spec(outer, tuple(opened))


def names(tree: Any) -> list[str]:
    """What every leaf of ``flatten`` would be called: ``[1]['boxes']``, ``[0].image_sizes[1]``."""
    found: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        name = pytree.keystr(path)
        if not _holds_tensors(leaf):
            found.append(name)
            continue
        for attribute, value in vars(leaf).items():
            found += [f"{name}.{attribute}{n}" for n in names(value)]
    return found


def unflatten(leaves: Iterable[Any], spec: Spec) -> Any:
    """Put leaves back into their structure."""
    rest = iter(leaves)
    opened = {o.place: o for o in spec.opened}
    values = []
    for place in range(spec.outer.num_leaves):
        if place in opened:
            made = copy.copy(opened[place].shell)
            inside = opened[place].spec
            count = _count(inside)
            values_inside = unflatten((next(rest) for _ in range(count)), inside)
            made.__dict__.update(zip(opened[place].names, values_inside, strict=True))
            values.append(made)
        else:
            values.append(next(rest))
    return pytree.tree_unflatten(values, spec.outer)


def _count(spec: Spec) -> int:
    return spec.outer.num_leaves + sum(_count(o.spec) - 1 for o in spec.opened)


@dataclass(frozen=True)
class Pattern:
    """A structure with its constant leaves, and a slot for each of the others."""

    spec: Spec
    slots: tuple[bool, ...]
    constants: tuple[Any, ...]

    def fill(self, values: Iterable[Any]) -> Any:
        """The structure with values in its slots."""
        rest = iter(values)
        both = zip(self.slots, self.constants, strict=True)
        return unflatten([next(rest) if slot else c for slot, c in both], self.spec)

    def same(self, other: Pattern) -> bool:
        """True if structure and constants are equal."""
        constants = zip(self.constants, other.constants, strict=False)
        alike = self.spec == other.spec and self.slots == other.slots
        return alike and all(_same(a, b) for a, b in constants)

    def match(self, tree: Any) -> list[Any] | None:
        """What stands in the slots; ``None`` if the structure or a constant is another."""
        flat, spec = flatten(tree)
        if spec != self.spec:
            return None
        for x, slot, constant in zip(flat, self.slots, self.constants, strict=True):
            if isinstance(x, Tensor) != slot or not (slot or _same(x, constant)):
                return None
        return [x for x, slot in zip(flat, self.slots, strict=True) if slot]


SLOTS = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


def pattern(tree: Any) -> tuple[Pattern, list[Any]]:
    """A pattern with slots for all tensors and symbolic numbers, and what stands in them."""
    flat, spec = flatten(tree)
    slots = tuple(isinstance(x, SLOTS) for x in flat)
    constants = tuple(None if slot else x for x, slot in zip(flat, slots, strict=True))
    return Pattern(spec, slots, constants), [x for x, s in zip(flat, slots, strict=True) if s]


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


_CLOSED = (Tensor, nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)


def _holds_tensors(leaf: Any, depth: int = 4) -> bool:
    """True for an object that pytree leaves whole and that has tensors in its attributes."""
    if isinstance(leaf, _CLOSED) or not hasattr(leaf, "__dict__") or depth == 0:
        return False
    inside = pytree.tree_leaves(list(vars(leaf).values()))
    return any(isinstance(x, Tensor) or _holds_tensors(x, depth - 1) for x in inside)

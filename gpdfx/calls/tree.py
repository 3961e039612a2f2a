"""Arguments and results of any structure, as flat lists.

What PyTorch's pytree knows (containers, named tuples, every class registered with it) is its; an
object that it does not know and that holds tensors in its attributes (a dataclass, torchvision's
``ImageList``) or its items (a class of the user's that is a dict) is opened here, and made again.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch_private
from . import sparse

KeyPath = tuple[Any, ...]
"""Pytree's keys on the way to a leaf."""


@dataclass(frozen=True)
class _Opened:
    """The object that is leaf number ``place``: its class, the keys of its items, the names of its
    attributes, and whether these two are the same."""

    place: int
    kind: type
    items: tuple[Any, ...]
    names: tuple[str, ...]
    same: bool
    spec: Spec

    def filled(self, inside: list[Any]) -> Any:
        """Another one of such values; no code of its class runs."""
        count = len(self.items)
        fixed = (inside[:count],) if issubclass(self.kind, tuple) else ()
        made = _native(self.kind).__new__(self.kind, *fixed)
        if issubclass(self.kind, list):
            list.extend(made, inside[:count])
        elif issubclass(self.kind, dict):
            dict.update(made, zip(self.items, inside, strict=False))
        if self.same:
            object.__setattr__(made, "__dict__", made)
        for name, value in zip(self.names, inside[count:], strict=True):
            object.__setattr__(made, name, value)
        return made


@dataclass(frozen=True)
class _Apart:
    """The sparse tensor that is leaf number ``place``, and what its parts are."""

    place: int
    kind: torch.layout
    spec: Spec

    def filled(self, inside: list[Any]) -> Any:
        """One of such parts."""
        return sparse.made(self.kind, inside)


@dataclass(frozen=True)
class Spec:
    """A structure without its leaves."""

    outer: torch_private.TreeSpec
    opened: tuple[_Opened | _Apart, ...]


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """``([leaves], spec)``; ``unflatten`` is its inverse."""
    flat, outer = torch_private.tree_flatten(tree)
    leaves: list[Any] = []
    opened: list[_Opened | _Apart] = []
    for place, leaf in enumerate(flat):
        if sparse.is_sparse(leaf):
            inside, spec = flatten(list(sparse.parts(leaf)))
            opened.append(_Apart(place, leaf.layout, spec))
            leaves += inside
            continue
        if not _opens(leaf):
            leaves.append(leaf)
            continue
        items, attributes = _entries(leaf)
        inside, spec = flatten([*items.values(), *attributes.values()])
        same = getattr(leaf, "__dict__", None) is leaf
        opened.append(_Opened(place, type(leaf), tuple(items), tuple(attributes), same, spec))
        leaves += inside
    return leaves, Spec(outer, tuple(opened))


def paths(tree: Any) -> list[KeyPath]:
    """The way to every leaf of ``flatten``."""
    found: list[KeyPath] = []
    for path, leaf in torch_private.tree_paths(tree):
        if sparse.is_sparse(leaf):
            found += [(*path, _KEYS[1](name)) for name in sparse.NAMES]
            continue
        if not _opens(leaf):
            found.append(path)
            continue
        for entries, key in zip(_entries(leaf), _KEYS, strict=True):
            for name, value in entries.items():
                found += [(*path, key(name), *rest) for rest in paths(value)]
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
            values.append(one.filled(unflatten(rest, one.spec)))
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
        return self.spec == other.spec and all(map(same, self.held, other.held))

    def match(self, tree: Any) -> list[Any] | None:
        """The tensors in the slots; ``None`` if the structure or a constant is another."""
        other, tensors = pattern(tree, (Tensor,))
        return tensors if self.same(other) else None


def pattern(tree: Any, kinds: tuple[type, ...] = SLOTS) -> tuple[Pattern, list[Any]]:
    """A pattern with slots for all tensors and symbolic numbers, and what stands in them."""
    flat, spec = flatten(tree)
    held = tuple(Slot if isinstance(x, kinds) else x for x in flat)
    return Pattern(spec, held), [x for x in flat if isinstance(x, kinds)]


def same(a: Any, b: Any) -> bool:
    """Whether two constants are equal."""
    try:
        return bool(a is b or a == b)
    except Exception:  # objects that cannot be compared, arrays of several values
        return False


def leaves(tree: Any) -> list[Any]:
    """All leaves, in order."""
    return flatten(tree)[0]


def is_container(x: Any) -> bool:
    """True for a dict or list, also of a class of the user's that is no more than that."""
    if type(x) in CONTAINERS:
        return True
    return isinstance(x, _ITEMS) and _opens(x) and not _entries(x)[1]


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


_CLOSED = (*SLOTS, nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)


def _native(kind: type) -> Any:
    """The class of Python's own that makes the objects of one."""
    made = (one for one in kind.__mro__ if isinstance(vars(one).get("__new__"), _BUILTIN))
    return next(made)


def _opens(leaf: Any) -> bool:
    """True for a size, and for an object that pytree leaves whole and that holds tensors."""
    return isinstance(leaf, torch.Size) or _holds_tensors(leaf)


def _holds_tensors(leaf: Any, depth: int = 4) -> bool:
    if isinstance(leaf, _CLOSED) or depth == 0:
        return False
    if not (hasattr(leaf, "__dict__") or hasattr(leaf, "__slots__") or isinstance(leaf, _OPEN)):
        return False
    native = _native(type(leaf))
    if native is not object and not issubclass(native, _OPEN):
        return False
    inside = torch_private.tree_leaves([list(entries.values()) for entries in _entries(leaf)])
    return any(isinstance(x, Tensor) or _holds_tensors(x, depth - 1) for x in inside)


def _entries(leaf: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The items and the attributes of an object; neither twice."""
    items: dict[Any, Any] = {}
    if isinstance(leaf, dict):
        items = dict(dict.items(leaf))
    elif isinstance(leaf, list | tuple):
        items = dict(enumerate(leaf))
    attributes = getattr(leaf, "__dict__", {})
    attributes = {} if attributes is leaf else dict(attributes)
    slots = (getattr(kind, "__slots__", ()) for kind in type(leaf).__mro__)
    for name in itertools.chain.from_iterable((s,) if isinstance(s, str) else s for s in slots):
        with contextlib.suppress(AttributeError):  # not set, or of a mangled name
            if name not in ("__dict__", "__weakref__"):
                attributes[name] = object.__getattribute__(leaf, name)
    return items, attributes


_ITEMS = dict, list  # torch.compile knows no other way to write it
CONTAINERS = (*_ITEMS, OrderedDict, defaultdict)
_OPEN = (dict, list, tuple, types.SimpleNamespace)
_BUILTIN = types.BuiltinMethodType
_KEYS = torch_private.item_key, torch_private.attribute_key

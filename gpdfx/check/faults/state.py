"""What modules keep in Python: their plain attributes, the variables of their hooks, and the states
of Python's and NumPy's generators, as copies that can be compared."""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...calls.held import entries
from ...teacher.compiled import REGISTRIES
from ..facts import identical
from ..observe import states

HOOKS = {"_forward_hooks": "a hook's state", "_forward_pre_hooks": "a pre-hook's state"}
"""Registries that hold Python of the user's -> what one says of it."""
Attribute = tuple[str, str]
"""The path of a module, and a name."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor)


def attributes(
    module: nn.Module, only: Collection[Attribute] | None = None
) -> dict[Attribute, Any]:
    """What modules keep in plain attributes and in their hooks: numbers, strings, tensors,
    containers, objects, the variables of functions; parameters if they are named."""
    return {
        (path, name): frozen(value)
        for path, part in module.named_modules()
        for name, value in (vars(part) if only is None else vars(part) | part._parameters).items()
        if (name not in REGISTRIES or name in HOOKS) and (only is None or (path, name) in only)
    }


def frozen(value: Any, seen: dict[int, Any] | None = None, depth: int = 4) -> Any:
    """A copy that later changes do not reach. ``depth``: through how many objects and functions to
    look; ``seen``: what was looked into."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray):
        return [type(value), value.shape, value.tobytes()]
    if isinstance(value, _CLOSED) or id(value) in seen or not depth:
        return type(value)
    seen[id(value)] = value
    if isinstance(value, list | tuple | set | deque):
        inside, depth = list(value), depth + 1
    elif isinstance(value, Mapping):
        inside, depth = [*value, *value.values()], depth + 1
    else:
        inside = [x for entry in entries(value) for x in entry] + _reduced(value)
        depth += isinstance(value, types.CellType)
    return [type(value), *(frozen(x, seen, depth - 1) for x in inside)]


def _reduced(value: Any) -> list[Any]:
    """What an object that is not Python's own is made of when it is copied: a generator of random
    numbers, an iterator."""
    names = ("__reduce__", "__reduce_ex__")
    if all(getattr(type(value), name) is getattr(object, name) for name in names):
        return []
    with contextlib.suppress(Exception):  # it cannot be copied, either
        return [x for x in value.__reduce_ex__(2)[1:] if x is not value]
    return []


def changed(before: dict[Attribute, Any], after: dict[Attribute, Any]) -> set[Attribute]:
    """The attributes that differ."""
    return {k for k in before.keys() | after.keys() if not _same(before.get(k), after.get(k))}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and identical(a, b)
    try:
        return type(a) is type(b) and bool(a == b or a != a)
    except Exception:  # what cannot be compared
        return True


def generators() -> dict[Any, Any]:
    """The states of Python's and NumPy's generators."""
    return {(None, name): x for name, x in states().items() if name[0] != "t"}


class Watch:
    """Looks at what is kept whenever a module of ``run`` is entered or left."""

    def __init__(self, run: nn.Module, kept: set[Attribute]) -> None:
        self.run, self.kept, self.running = run, kept, [""]
        self.found, self.before = list[Any](), dict[Any, Any]()

    def look(self, enter: str | None, *_: Any) -> None:
        """``enter``: the module that is entered; ``None``: one is left."""
        now = generators()
        now |= attributes(self.run, self.kept) if self.kept else {}
        known = changed(self.before, now) if self.before else set()
        self.found.extend((self.running[-1], what) for what in known)
        self.before.clear()
        self.before.update(now)
        self.running.pop() if enter is None else self.running.append(enter)


_CLOSED = (nn.Module, type, types.ModuleType, Watch)
"""What is not looked into."""

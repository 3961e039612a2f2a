"""What a call does to the dicts and lists that it is given: some networks put their results into
one of these, and return it.

In a graph, which knows tensors only, what is written to them are further results; whoever runs it
puts them where they belong (``settle``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import torch_private
from . import tree


@dataclass(frozen=True)
class Given:
    """Stands for number ``place`` of the dicts and lists that a call is given."""

    place: int


@dataclass(frozen=True)
class Kept:
    """Stands for what was there before the call: the item of the same dict or list by this key."""

    key: Any


Outcome = tuple[Any, list[Any]]
"""The result of a call, and pairs of a ``Given`` and all of its items after it, for those that
have changed."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def containers(call: Any) -> list[Any]:
    """The dicts and lists in a structure, in order; not those in the attributes of objects, which
    may change with them."""
    found: list[Any] = []

    def visit(x: Any) -> bool:
        if tree.is_container(x):
            found.append(x)
        return False

    for leaf in torch_private.tree_leaves(call, visit):
        if tree.is_container(leaf):  # of the user's own class
            for held in _items(leaf).values():
                found += containers(held)
    return found


def of_call(call: Call) -> list[Any]:
    """The dicts and lists that a call is given, but for those of the call itself."""
    args, kwargs = call
    return containers([*args, *kwargs.values()])[1:]


def apart(call: Call) -> Call:
    """The same arguments in other dicts and lists: what is called with them writes to these."""

    def other(x: Any) -> Any:
        return tree.map_leaves(lambda y: y, x) if tree.is_container(x) else x

    made: Call = torch_private.tree_map(other, call, lambda x: type(x) not in _PLAIN)
    return made


_PLAIN = (tuple, *tree.CONTAINERS)


class Watch:
    """Notes what the dicts and lists in ``(args, kwargs)`` hold before a call."""

    def __init__(self, call: Call) -> None:
        self.given = of_call(call)
        self.before = [_items(x) for x in self.given]

    def outcome(self, result: Any) -> Outcome:
        """What came of the call."""
        written: list[Any] = []
        for place, (container, old) in enumerate(zip(self.given, self.before, strict=True)):
            new = _items(container)
            if [*new] != [*old] or any(new[key] is not old[key] for key in new):
                known = {id(x): Kept(key) for key, x in old.items()}
                known |= {id(x): Kept(key) for key, x in new.items() if x is old.get(key, known)}
                items = {k: known.get(id(x)) or self._named(x) for k, x in new.items()}
                written.append([Given(place), items])
        return self._named(result), written

    def undo(self) -> None:
        """Let them hold what they held."""
        for container, old in zip(self.given, self.before, strict=True):
            _assign(container, old)

    def _named(self, value: Any) -> Any:
        """A value with a ``Given`` for each of them in it."""
        places = {id(x): Given(k) for k, x in reversed([*enumerate(self.given)])}

        def one(x: Any) -> bool:
            return id(x) in places

        if not any(map(one, torch_private.tree_leaves(value, one))):
            return value
        return torch_private.tree_map(lambda x: places.get(id(x), x), value, one)


def map_result(function: Callable[[Any], Any], call: Call, result: Any) -> Any:
    """``function`` of every leaf of a call's result; a dict or list that the call was given stays
    the same object."""
    mine = {id(x) for x in of_call(call)}

    def one(x: Any) -> bool:
        return id(x) in mine

    def replaced(x: Any) -> Any:
        if one(x):
            _assign(x, {key: tree.map_leaves(function, y) for key, y in _items(x).items()})
            return x
        return tree.map_leaves(function, x)

    return (
        torch_private.tree_map(replaced, result, one) if mine else tree.map_leaves(function, result)
    )


def settle(outcome: Outcome, given: list[Any]) -> Any:
    """Write to the dicts and lists of a call what came of it; its result, with these in it."""
    result, written = outcome
    before = list(map(_items, given))

    def found(old: dict[Any, Any], x: Any) -> Any:
        return given[x.place] if isinstance(x, Given) else old[x.key] if isinstance(x, Kept) else x

    for one, items in written:
        made = torch_private.tree_map(partial(found, before[one.place]), items)
        _assign(given[one.place], made)
    return torch_private.tree_map(partial(found, {}), result)


def _items(container: Any) -> dict[Any, Any]:
    pairs = dict.items(container) if isinstance(container, dict) else enumerate(container)
    return dict(pairs)


def _assign(container: Any, items: dict[Any, Any]) -> None:
    if not isinstance(container, dict):
        container[:] = items.values()
        return
    container.clear()
    container.update(items)

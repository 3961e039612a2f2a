"""Widths: which leaves widen, and to how many indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .axes import Axis, Leaf, Product, Sum, leaves, paths
from .solver import Reason, Solver


@dataclass(frozen=True)
class Widths:
    """The global choice. ``held``: leaves that stay because another factor of a product widens.
    ``grown``: axes that grow by more than the ratio because a leaf recurs in a product.
    ``stays``: leaves that the user wants to stay. ``disputed``: leaf -> parameter -> the ratio
    that the user asked for, where they differ; the first was taken."""

    size: dict[Leaf, int]
    held: dict[Leaf, Leaf]
    grown: tuple[str, ...] = ()
    stays: Mapping[Leaf, Reason] = field(default_factory=dict)
    disputed: Mapping[Leaf, dict[str, float]] = field(default_factory=dict)

    def __call__(self, leaf: Leaf) -> int:
        return self.size.get(leaf, leaf.size)


def choose_widths(
    solver: Solver,
    weights: Iterable[Axis],
    others: Iterable[Axis],
    ratio: float | Callable[[Leaf], float],
    stays: Mapping[Leaf, Reason] | None = None,
    round_to: int = 1,
) -> Widths:
    """Give each candidate leaf (free, part of a weight) ``round(size * ratio)`` indices.

    In every product exactly one candidate widens: groups and heads first, else the inner factor,
    positions taken along an axis last, ties by first use. A product with one candidate left takes
    it at once; where products of weights contradict each other one of them keeps its width (the
    inner factor of a grouped weight, whose groups widen).
    ``others``: axes of activations, in which at most one leaf may widen; ``stays``: leaves that
    are no candidates; ``round_to``: the widths of whole weight axes become multiples of it.
    """
    ratio_of = ratio if callable(ratio) else lambda leaf: ratio
    stays = stays or {}
    weights, others = list(weights), list(others)
    clauses = _clauses(solver, weights, stays)
    candidates = {leaf for clause in clauses for leaf in clause}
    limits = clauses | {c & candidates for c in _clauses(solver, others, stays)} - {frozenset()}
    near: dict[Leaf, list[frozenset[Leaf]]] = {}
    for clause in sorted(limits, key=_clause_order):
        for leaf in clause:
            near.setdefault(leaf, []).append(clause)
    size: dict[Leaf, int] = {}
    held: dict[Leaf, Leaf] = {}

    def widen(leaf: Leaf) -> None:
        size[leaf] = max(leaf.size, round(leaf.size * ratio_of(leaf)))
        lonely: list[frozenset[Leaf]] = []
        for clause in near[leaf]:
            for other in sorted(clause - {leaf}, key=lambda x: x.order):
                if other not in held:
                    held[other] = leaf
                    lonely += [c for c in near[other] if c in clauses]
        for clause in lonely:
            settle(clause)

    def settle(clause: frozenset[Leaf]) -> None:
        open_ = [leaf for leaf in clause if leaf not in held]
        if len(open_) == 1 and open_[0] not in size:
            widen(open_[0])

    rank = _preference(solver, weights)
    ordered = sorted(candidates, key=lambda x: rank[x])
    groups = [x for x in ordered if x in solver.outer and x not in solver.inner]
    for leaf in groups:
        if leaf not in held:
            widen(leaf)
    for clause in sorted(clauses, key=_clause_order):
        settle(clause)
    for leaf in ordered:
        if leaf not in size and leaf not in held:
            widen(leaf)
    if round_to > 1:
        whole = dict.fromkeys(solver.resolve(a) for a in weights)
        _round_up(size, set(held.values()), whole, round_to)
    grown = {
        str(axis)
        for axis in (solver.resolve(a) for a in itertools.chain(weights, others))
        for path in paths(axis)
        if any(path.count(leaf) > 1 for leaf in path if leaf in size)
    }
    return Widths(size, held, tuple(sorted(grown)), stays)


def _clauses(
    solver: Solver, axes: Iterable[Axis], stays: Mapping[Leaf, Reason]
) -> set[frozenset[Leaf]]:
    found = set()
    for axis in {solver.resolve(a) for a in axes}:
        for path in paths(axis):
            free = (leaf for leaf in path if leaf not in solver.reason and leaf not in stays)
            if clause := frozenset(free):
                found.add(clause)
    return found


def _round_up(size: dict[Leaf, int], holders: set[Leaf], axes: Iterable[Axis], unit: int) -> None:
    """Let leaves grow on, by as little as may be, until whole axes are multiples of ``unit``.

    Axes with one wide leaf come first: 25->38 becomes 40; heads 3->6 of 3 x 5 become 8, the axis
    40. Where several are wide (a concatenation) one of them takes what is missing, and what was
    a multiple stays one. Heads and groups count as factors only: a table with one entry per head
    needs no 8 of them. An axis for which there is no such width stays as it is (24 + 1).
    """
    wide = {
        axis: [leaf for leaf in dict.fromkeys(leaves(axis)) if leaf in size]
        for axis in axes
        if not (isinstance(axis, Leaf) and axis in holders)
    }

    def order(axis: Axis) -> tuple[int, bool, list[int]]:
        return len(wide[axis]), isinstance(axis, Sum), [leaf.order for leaf in leaves(axis)]

    done: list[Axis] = []
    for axis in sorted((a for a in wide if wide[a]), key=order):
        options = []
        for leaf in wide[axis] if width_of(axis, size) % unit else ():
            bound = [axis, *(a for a in done if leaf in wide[a])]
            for width in range(size[leaf] + 1, size[leaf] + unit):
                trial = {**size, leaf: width}
                if not any(width_of(a, trial) % unit for a in bound):
                    options.append((width_of(axis, trial), leaf.order, leaf, width))
                    break
        if options:
            *_, leaf, size[leaf] = min(options)
        if not width_of(axis, size) % unit:
            done.append(axis)


def width_of(axis: Axis, size: Mapping[Leaf, int]) -> int:
    """The width of a resolved axis, given those of its leaves that widen."""
    if isinstance(axis, Leaf):
        return size.get(axis, axis.size)
    if isinstance(axis, Product):
        return math.prod(width_of(f, size) for f in axis.factors)
    return sum(width_of(t, size) for t in axis.terms)


def _clause_order(clause: frozenset[Leaf]) -> list[int]:
    return sorted(leaf.order for leaf in clause)


def _preference(solver: Solver, axes: Iterable[Axis]) -> dict[Leaf, tuple[bool, bool, int, int]]:
    """Sort keys: marked inner last; groups and heads first; then the innermost; then first use."""
    depth: dict[Leaf, int] = {}
    for axis in axes:
        for path in paths(solver.resolve(axis)):
            for k, leaf in enumerate(path):
                depth[leaf] = max(depth.get(leaf, 0), k)
    return {
        leaf: (leaf in solver.inner, leaf not in solver.outer, -k, leaf.order)
        for leaf, k in depth.items()
    }

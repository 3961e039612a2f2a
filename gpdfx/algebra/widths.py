"""Widths: which leaves widen, and to how many indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .axes import Axis, Leaf, evaluate, leaves, paths
from .solver import Reason, Solver

Sizes = dict[Leaf, int]
Path = tuple[Leaf, ...]
Clause = frozenset[Leaf]


@dataclass(frozen=True)
class Widths:
    """The global choice. ``held``: leaves that stay because another factor of a product widens.
    ``grown``: axes that grow by more than the ratio because a leaf recurs in a product.
    ``stays``: leaves that the user wants to stay. ``disputed``: leaf -> parameter -> the ratio
    that the user asked for, where they differ; the first was taken."""

    size: Sizes
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

    At ratio 2, for example:

        weights                         twice as wide    why
        heads x dim                     heads            they go first, and hold dim
        a x b                           b                else the inner factor goes first
        a x b, b x c, c                 c, a             c has no choice; it holds b, which leaves a
        groups x each, each             groups           they hold each: the second weight stays
    """
    ratio_of = ratio if callable(ratio) else lambda leaf: ratio
    stays = stays or {}
    weights = list(dict.fromkeys(map(solver.resolve, weights)))
    others = list(dict.fromkeys(map(solver.resolve, others)))
    widened, held = _choose(solver, _products(weights), _products(others), stays)
    size = {leaf: max(leaf.size, round(leaf.size * ratio_of(leaf))) for leaf in widened}
    if round_to > 1:
        size = _round_up(size, set(held.values()), weights, round_to)
    recurring = {axis for axis in (*weights, *others) if _recurs(axis, size)}
    return Widths(size, held, tuple(sorted(map(str, recurring))), stays)


def _choose(
    solver: Solver, weights: list[Path], others: list[Path], stays: Mapping[Leaf, Reason]
) -> tuple[list[Leaf], dict[Leaf, Leaf]]:
    """The leaves that widen, and for every other candidate the one that holds it.

    A clause is what may widen in one product: of a weight's exactly one leaf is to, of an
    activation's at most one. Clauses are settled one after the other. One with a single leaf left
    widens it; that holds all that share a clause with it, which may leave other clauses of weights
    with a single leaf: these are next. So groups and heads are taken first, each a clause of its
    own, then what clauses leave no choice about, then whatever is left, in order of preference.
    """
    clauses = {frozenset(path).difference(solver.reason, stays) for path in weights}
    candidates = frozenset().union(*clauses)
    clauses_of: dict[Leaf, list[Clause]] = {leaf: [] for leaf in candidates}
    for clause in sorted(clauses | {candidates & set(path) for path in others}, key=sorted):
        for leaf in clause:
            clauses_of[leaf].append(clause)
    alone = [frozenset([leaf]) for leaf in _by_preference(solver, weights) if leaf in candidates]
    groups = [c for c in alone if c <= solver.outer.keys() and not c & solver.inner.keys()]
    todo = [*groups, *sorted(clauses, key=sorted), *alone][::-1]  # a stack: the last one is next
    widened: dict[Leaf, None] = {}
    held: dict[Leaf, Leaf] = {}
    while todo:
        left = todo.pop().difference(held, widened)
        if len(left) == 1:
            (leaf,) = left
            widened[leaf] = None
            rivals = [x for c in clauses_of[leaf] for x in sorted(c - {leaf}) if x not in held]
            held |= dict.fromkeys(rivals, leaf)
            todo += [c for x in dict.fromkeys(rivals) for c in clauses_of[x] if c in clauses][::-1]
    return list(widened), held


def _by_preference(solver: Solver, products: list[Path]) -> list[Leaf]:
    """Marked inner last; groups and heads first; then the innermost; then first use."""
    places = sorted(place for path in products for place in enumerate(path))
    depth = {leaf: k for k, leaf in places}  # the innermost place of a leaf counts

    def rank(leaf: Leaf) -> tuple[bool, bool, int, Leaf]:
        return leaf in solver.inner, leaf not in solver.outer, -depth[leaf], leaf

    return sorted(depth, key=rank)


def _products(axes: list[Axis]) -> list[Path]:
    return [path for axis in axes for path in paths(axis)]


def _recurs(axis: Axis, size: Sizes) -> bool:
    """True if a leaf that widens meets itself in a product."""
    return any(path.count(leaf) > 1 for path in paths(axis) for leaf in path if leaf in size)


# --------------------------------------------------------------------------- round numbers
def _round_up(size: Sizes, holders: set[Leaf], axes: list[Axis], unit: int) -> Sizes:
    """Let leaves grow on, by as little as may be, until whole axes are multiples of ``unit``.

    Axes with one wide leaf come first, those without a concatenation before the others: 25->38
    becomes 40; heads 3->6 of 3 x 5 become 8, the axis 40. Where several are wide (a concatenation)
    one of them takes what is missing, and what was a multiple stays one. Heads and groups count as
    factors only: a table with one entry per head needs no 8 of them. An axis for which there is no
    such width stays as it is (24 + 1).
    """
    wide = {a: sorted(size.keys() & leaves(a)) for a in axes if a not in holders}

    def rank(axis: Axis) -> tuple[int, bool, list[Leaf]]:
        return len(wide[axis]), len(paths(axis)) > 1, leaves(axis)

    done: list[Axis] = []
    for axis in sorted((a for a in wide if wide[a]), key=rank):
        fits = []
        for leaf in wide[axis]:
            bound = [axis, *(a for a in done if leaf in wide[a])]
            trials = ({**size, leaf: size[leaf] + more} for more in range(unit))
            fit = next((t for t in trials if not any(width_of(a, t) % unit for a in bound)), None)
            fits += [fit] if fit else []
        if fits:
            size = min(fits, key=lambda fit: width_of(axis, fit))
            done.append(axis)
    return size


def width_of(axis: Axis, size: Mapping[Leaf, int]) -> int:
    """The width of a resolved axis, given those of its leaves that widen."""
    return evaluate(axis, lambda x: size.get(x, x.size), lambda x: math.prod(x), lambda x: sum(x))

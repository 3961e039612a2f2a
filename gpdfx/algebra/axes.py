"""The axis algebra: what a tensor dimension is made of, and how wide it gets. Knows no fx.

An axis is a leaf (a size), a product of axes (row-major, outer first) or a sum (concatenation):

    qkv.weight rows, viewed as (3, heads, 64)     576 = 3 x 3 x 64
    cat([a(64), b(32)], dim=1)                     96 = 64 + 32
    channel shuffle, view(B, 2, 58, H, W)         116 = 2 x 58

``Solver.unify`` makes two axes equal by refining both to a common form, or raises and leaves no
trace. ``choose_widths`` then widens leaves (leaf index i of the teacher is index i % size of the
student); ``gpdfx.frozen`` has what later passes see of an axis then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import AxisConflict


# --------------------------------------------------------------------------- the three forms
@dataclass(frozen=True, eq=False)
class Leaf:
    """One indivisible axis (until a unification refines it). Equal only to itself."""

    size: int
    order: int

    def __repr__(self) -> str:
        return f"{self.size}'{self.order}"


@dataclass(frozen=True)
class Product:
    """Row-major product, outer first. The first factor is a leaf: an outer sum distributes."""

    factors: tuple[Axis, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", int(np.prod([f.size for f in self.factors], dtype=int)))

    def __repr__(self) -> str:
        inner = [f"({f})" if isinstance(f, Sum) else str(f) for f in self.factors]
        return " x ".join(inner) or "1"


@dataclass(frozen=True)
class Sum:
    """Concatenation of two or more axes."""

    terms: tuple[Axis, ...]
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(t.size for t in self.terms))

    def __repr__(self) -> str:
        return " + ".join(map(str, self.terms))


Axis = Leaf | Product | Sum
ONE = Product(())


def product(*axes: Axis) -> Axis:
    """The product in normal form: flat, without ones, ``(a + b) x c = a x c + b x c``; only the
    last factor may be a sum."""
    flat: list[Axis] = []
    for a in axes:
        flat += a.factors if isinstance(a, Product) else [a]
    flat = [a for a in flat if not (isinstance(a, Leaf) and a.size == 1)]
    k = next((k for k, a in enumerate(flat[:-1]) if isinstance(a, Sum)), None)
    if k is not None:  # what follows a sum goes into it: only the last factor may be a sum
        terms = flat[k].terms  # type: ignore[union-attr]
        return product(*flat[:k], sum_(*(product(t, *flat[k + 1 :]) for t in terms)))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def _only_ones(axis: Axis) -> bool:
    return isinstance(axis, Sum) and all(t == ONE for t in axis.terms)


def sum_(*axes: Axis) -> Axis:
    """The sum in normal form: flat, without empty terms."""
    flat: list[Axis] = []
    for a in axes:
        flat += a.terms if isinstance(a, Sum) else [a]
    flat = [ONE if isinstance(a, Leaf) and a.size == 1 else a for a in flat if a.size != 0]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def leaves(axis: Axis) -> Iterator[Leaf]:
    """Every leaf of an axis, left to right, with repetition."""
    if isinstance(axis, Leaf):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Product) else axis.terms:
            yield from leaves(part)


def paths(axis: Axis) -> list[tuple[Leaf, ...]]:
    """The products inside an axis, sums multiplied out: ``h x (k + v)`` -> ``(h, k), (h, v)``."""
    if isinstance(axis, Leaf):
        return [(axis,)]
    if isinstance(axis, Sum):
        return [path for term in axis.terms for path in paths(term)]
    return [
        tuple(itertools.chain(*combo)) for combo in itertools.product(*map(paths, axis.factors))
    ]


# --------------------------------------------------------------------------- unification
@dataclass(frozen=True)
class Reason:
    """Why a leaf may not widen: a kind (``input``, ``spatial``, ``lookup`` ...) and where."""

    kind: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.where})" if self.where else self.kind


class Solver:
    """Leaves, what they were refined to, and why some of them are fixed.

    ``at`` labels what happens now (an op and its source line); it is kept on every edge of the
    constraint graph (``edges``: leaf, leaf, label), from which ``explain`` finds its chains to a
    ``cause``: a leaf that was fixed on its own account, not by one that it was unified with.
    """

    def __init__(self) -> None:
        self.bound: dict[Leaf, Axis] = {}
        self.reason: dict[Leaf, Reason] = {}
        self.outer: dict[Leaf, bool] = {}  # groups and heads: widen these first in a product
        self.inner: dict[Leaf, Reason] = {}  # positions were taken along these: widen them last
        self.contracted: dict[Leaf, bool] = {}  # some weight contracts these
        self.symbolic: dict[Leaf, bool] = {}  # is the size known only at run time (the batch)?
        self.cause: dict[Leaf, bool] = {}
        self.edges: list[tuple[Leaf, Leaf, str]] = []
        self.at = ""
        self._orders = itertools.count()
        self._journal: list[tuple[dict[Leaf, Any], Leaf, Any]] = []

    # ---- making and reading
    def leaf(self, size: int, fixed: Reason | None = None) -> Axis:
        """A new leaf; a size of one is no leaf but the empty product."""
        if size == 1:
            return ONE
        new = Leaf(int(size), next(self._orders))
        if fixed:
            self.fix(new, fixed)
        return new

    def resolve(self, axis: Axis) -> Axis:
        """The axis over unbound leaves, in normal form."""
        if isinstance(axis, Leaf):
            if axis not in self.bound:
                return axis
            return self.resolve(self.bound[axis])
        parts = axis.factors if isinstance(axis, Product) else axis.terms
        new = [self.resolve(p) for p in parts]
        if all(a is b for a, b in zip(new, parts, strict=True)):
            return axis
        return product(*new) if isinstance(axis, Product) else sum_(*new)

    def is_fixed(self, axis: Axis) -> bool:
        """True if no leaf of the axis may widen."""
        return all(leaf in self.reason for leaf in leaves(self.resolve(axis)))

    def mark(self, marks: dict[Leaf, Any], axis: Axis, mark: Any = True) -> None:
        """Set one of the solver's marks (``outer``, ``inner`` ...) on every leaf."""
        for leaf in leaves(self.resolve(axis)):
            self._set(marks, leaf, mark)

    def is_symbolic(self, axis: Axis) -> bool:
        """True if some leaf's size is known only at run time."""
        return any(self.symbolic.get(leaf) for leaf in leaves(self.resolve(axis)))

    def fix(self, axis: Axis, reason: Reason) -> None:
        """Forbid every leaf of the axis to widen; the first reason stays."""
        for leaf in leaves(self.resolve(axis)):
            if leaf not in self.reason:
                self._set(self.reason, leaf, reason)
                self._set(self.cause, leaf, True)

    # ---- transactions
    def _set(self, table: dict[Leaf, Any], key: Leaf, value: Any) -> None:
        self._journal.append((table, key, table.get(key)))
        table[key] = value

    def checkpoint(self) -> tuple[int, int]:
        return len(self._journal), len(self.edges)

    def rollback(self, point: tuple[int, int]) -> None:
        """Undo everything since the checkpoint."""
        while len(self._journal) > point[0]:
            table, key, old = self._journal.pop()
            if old is None:
                del table[key]
            else:
                table[key] = old
        del self.edges[point[1] :]

    # ---- the two operations
    def unify(self, a: Axis, b: Axis) -> Axis:
        """Make two axes one. Raises ``AxisConflict`` and leaves no trace if they cannot be."""
        point = self.checkpoint()
        whole = self.resolve(a), self.resolve(b)
        try:
            self._unify(a, b)
            result = self.resolve(a)
            if _repeats(result) > sum(map(_repeats, whole)):
                raise self._conflict(a, b)  # 64 x 2 = 2 x 64 would make every factor the same
            if _only_ones(result) and not any(map(_only_ones, whole)):
                one, other = whole  # a shift by one
                raise AxisConflict(f"{one} = {other}, shifted, would leave nothing to widen")
            return result
        except AxisConflict:
            self.rollback(point)
            raise

    def cut(self, axis: Axis, at: int) -> tuple[Axis, Axis]:
        """Split an axis into its first ``at`` indices and the rest. A product can be cut at
        multiples of its inner size: 3 x 64 at 64 gives 64 and 2 x 64."""
        axis = self.resolve(axis)
        if not 0 <= at <= axis.size:
            raise AxisConflict(f"{axis} has no index {at}")
        if at in (0, axis.size):
            empty = Sum(())
            return (axis, empty) if at else (empty, axis)
        if isinstance(axis, Leaf):
            left, right = self.leaf(at), self.leaf(axis.size - at)
            self._bind(axis, sum_(left, right))
            return left, right
        if isinstance(axis, Sum):
            for k, term in enumerate(axis.terms):
                if at < term.size:
                    left, right = self.cut(term, at)
                    return sum_(*axis.terms[:k], left), sum_(right, *axis.terms[k + 1 :])
                at -= term.size
                if at == 0:
                    return sum_(*axis.terms[: k + 1]), sum_(*axis.terms[k + 1 :])
        assert isinstance(axis, Product)
        rest = product(*axis.factors[1:])
        if at % rest.size:
            raise AxisConflict(f"{axis} cannot be cut at {at}, which is no multiple of {rest.size}")
        left, right = self.cut(axis.factors[0], at // rest.size)
        return product(left, rest), product(right, rest)

    def _unify(self, a: Axis, b: Axis) -> None:
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        if a.size != b.size:
            raise self._conflict(a, b)
        fixed = next((x for x in (a, b) if self.is_fixed(x) and not _only_ones(x)), None)
        if fixed is not None:  # maps are identities on both sides: structure does not matter
            self._fix_like(a if fixed is b else b, fixed)
        elif isinstance(a, Leaf) or isinstance(b, Leaf):
            if not isinstance(a, Leaf) or (isinstance(b, Leaf) and b.order > a.order):
                a, b = b, a
            assert isinstance(a, Leaf)
            self._bind(a, b)
        elif isinstance(a, Sum) or isinstance(b, Sum):
            terms, other = (a, b) if isinstance(a, Sum) else (b, a)
            assert isinstance(terms, Sum)
            at = min(x.terms[0].size for x in (a, b) if isinstance(x, Sum))
            for head in (x.terms[0] if isinstance(x, Sum) else x for x in (a, b)):
                if isinstance(head, Product) and head.factors:  # k x n: cut at a multiple of n
                    inner = head.size // head.factors[0].size
                    at = at - at % inner or inner
            (left, right), (first, rest) = self.cut(other, at), self.cut(terms, at)
            self._unify(first, left)
            self._unify(rest, right)
        else:
            f, g = a.factors[0], b.factors[0]
            if f.size == g.size:
                self._unify(f, g)
                self._unify(product(*a.factors[1:]), product(*b.factors[1:]))
            else:
                big, small = (f, g) if f.size > g.size else (g, f)
                if big.size % small.size or not isinstance(big, Leaf):
                    raise self._conflict(a, b)
                self._bind(big, product(self.leaf(small.size), self.leaf(big.size // small.size)))
                self._unify(a, b)

    def _fix_like(self, axis: Axis, fixed: Axis) -> None:
        source = next(leaves(fixed), None)
        reason = self.reason[source] if source else Reason("size one")
        for leaf in leaves(axis):
            if leaf not in self.reason:
                self._set(self.reason, leaf, reason)
                if source:
                    self.edges.append((source, leaf, self.at))

    def _bind(self, leaf: Leaf, axis: Axis) -> None:
        """Refine an unbound leaf; its reason and its marks go to what it becomes."""
        self._set(self.bound, leaf, axis)
        for target in leaves(axis):
            self.edges.append((leaf, target, self.at))
        every: tuple[dict[Leaf, Any], ...] = (
            self.outer,
            self.inner,
            self.contracted,
        )
        for marks in every:
            if leaf in marks:
                self.mark(marks, axis, marks[leaf])
        known = {x: self.symbolic.get(x) for x in leaves(axis)}
        if self.symbolic.get(leaf) and not any(known.values()):
            for target in (x for x, mark in known.items() if mark is None):
                self._set(self.symbolic, target, True)
        for target in leaves(axis) if leaf in self.reason else ():
            if target not in self.reason:
                self._set(self.reason, target, self.reason[leaf])

    def _conflict(self, a: Axis, b: Axis) -> AxisConflict:
        return AxisConflict(f"{self.resolve(a)} cannot be the same axis as {self.resolve(b)}")


def _repeats(axis: Axis) -> int:
    """How often a product inside the axis holds a leaf that it already holds."""
    return sum(len(path) - len(set(path)) for path in paths(axis))


# --------------------------------------------------------------------------- widths
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

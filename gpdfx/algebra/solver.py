"""Unification: two axes become one, by refining both to a common form, or stay as they were."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..errors import AxisConflict
from .axes import ONE, Axis, Leaf, Product, Sum, leaves, paths, product, sum_


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
    constraint graph (``edges``: pair of leaves -> label), from which ``explain`` finds its chains
    to a ``cause``: a leaf that was fixed on its own account, not by one that it was unified with.
    """

    def __init__(self) -> None:
        self.bound: dict[Leaf, Axis] = {}
        self.reason: dict[Leaf, Reason] = {}
        self.outer: dict[Leaf, bool] = {}  # groups and heads: widen these first in a product
        self.inner: dict[Leaf, Reason] = {}  # positions were taken along these: widen them last
        self.contracted: dict[Leaf, bool] = {}  # some weight contracts these
        self.symbolic: dict[Leaf, bool] = {}  # is the size known only at run time (the batch)?
        self.cause: dict[Leaf, bool] = {}
        self.edges: dict[tuple[Leaf, Leaf], str] = {}
        self.at = ""
        self._orders = itertools.count()
        self._journal: list[tuple[dict[Any, Any], Any, Any]] = []

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
            return self.resolve(self.bound[axis]) if axis in self.bound else axis
        parts = axis.factors if isinstance(axis, Product) else axis.terms
        new = [self.resolve(p) for p in parts]
        if all(a is b for a, b in zip(new, parts, strict=True)):
            return axis
        return product(*new) if isinstance(axis, Product) else sum_(*new)

    def is_fixed(self, axis: Axis) -> bool:
        """True if no leaf of the axis may widen."""
        return all(leaf in self.reason for leaf in leaves(self.resolve(axis)))

    def is_symbolic(self, axis: Axis) -> bool:
        """True if some leaf's size is known only at run time."""
        return any(self.symbolic.get(leaf) for leaf in leaves(self.resolve(axis)))

    def mark(self, marks: dict[Leaf, Any], axis: Axis, mark: Any = True) -> None:
        """Set one of the solver's marks (``outer``, ``inner`` ...) on every leaf."""
        for leaf in leaves(self.resolve(axis)):
            self._set(marks, leaf, mark)

    def fix(self, axis: Axis, reason: Reason) -> None:
        """Forbid every leaf of the axis to widen; the first reason stays."""
        for leaf in self._set_missing(self.reason, self.resolve(axis), reason):
            self._set(self.cause, leaf, True)

    # ---- transactions
    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        self._journal.append((table, key, table.get(key)))
        table[key] = value

    def _set_missing(self, table: dict[Leaf, Any], axis: Axis, value: Any) -> list[Leaf]:
        """Set on the leaves that have no value yet; these."""
        missing = [leaf for leaf in dict.fromkeys(leaves(axis)) if leaf not in table]
        for leaf in missing:
            self._set(table, leaf, value)
        return missing

    def checkpoint(self) -> int:
        return len(self._journal)

    def rollback(self, point: int) -> None:
        """Undo everything since the checkpoint."""
        while len(self._journal) > point:
            table, key, old = self._journal.pop()
            table[key] = old
            if old is None:
                del table[key]

    # ---- the two operations
    def unify(self, a: Axis, b: Axis) -> Axis:
        """Make two axes one. Raises ``AxisConflict`` and leaves no trace if they cannot be."""
        point = self.checkpoint()
        one, other = self.resolve(a), self.resolve(b)
        try:
            self._unify(one, other)
            result = self.resolve(a)
            if _repeats(result) > _repeats(one) + _repeats(other):
                raise self._conflict(a, b)  # 64 x 2 = 2 x 64 would make every factor the same
            if _only_ones(result) and not (_only_ones(one) or _only_ones(other)):  # a shift by one
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
            k = 0
            while at >= axis.terms[k].size:
                at, k = at - axis.terms[k].size, k + 1
            left, right = self.cut(axis.terms[k], at)
            return sum_(*axis.terms[:k], left), sum_(right, *axis.terms[k + 1 :])
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
            newer = max(x for x in (a, b) if isinstance(x, Leaf))
            self._bind(newer, b if newer is a else a)
        elif isinstance(a, Sum) or isinstance(b, Sum):
            heads = [x.terms[0] if isinstance(x, Sum) else x for x in (a, b)]
            at = min(head.size for head in heads)
            for head in heads:
                if isinstance(head, Product) and head.factors:  # k x n: cut at a multiple of n
                    inner = head.size // head.factors[0].size
                    at = at - at % inner or inner
            terms, other = (a, b) if isinstance(a, Sum) else (b, a)
            (left, right), (first, rest) = self.cut(other, at), self.cut(terms, at)
            self._unify(first, left)
            self._unify(rest, right)
        else:
            small, big = sorted((a.factors[0], b.factors[0]), key=lambda x: x.size)
            if big.size % small.size or not isinstance(big, Leaf):
                raise self._conflict(a, b)
            if big.size > small.size:
                self._bind(big, product(self.leaf(small.size), self.leaf(big.size // small.size)))
                self._unify(a, b)
            else:
                self._unify(a.factors[0], b.factors[0])
                self._unify(product(*a.factors[1:]), product(*b.factors[1:]))

    def _fix_like(self, axis: Axis, fixed: Axis) -> None:
        source = next(iter(leaves(fixed)), None)
        reason = self.reason[source] if source else Reason("size one")
        for leaf in self._set_missing(self.reason, axis, reason):
            if source:
                self._set(self.edges, (source, leaf), self.at)

    def _bind(self, leaf: Leaf, axis: Axis) -> None:
        """Refine an unbound leaf; its reason and its marks go to what it becomes."""
        self._set(self.bound, leaf, axis)
        parts = dict.fromkeys(leaves(axis))
        for part in parts:
            self._set(self.edges, (leaf, part), self.at)
        for marks in (self.outer, self.inner, self.contracted):
            if leaf in marks:
                self.mark(marks, axis, marks[leaf])
        if self.symbolic.get(leaf) and not any(map(self.symbolic.get, parts)):
            self._set_missing(self.symbolic, axis, True)
        if leaf in self.reason:
            self._set_missing(self.reason, axis, self.reason[leaf])

    def _conflict(self, a: Axis, b: Axis) -> AxisConflict:
        return AxisConflict(f"{self.resolve(a)} cannot be the same axis as {self.resolve(b)}")


def _only_ones(axis: Axis) -> bool:
    return isinstance(axis, Sum) and all(t == ONE for t in axis.terms)


def _repeats(axis: Axis) -> int:
    """How often a product inside the axis holds a leaf that it already holds."""
    return sum(len(path) - len(set(path)) for path in paths(axis))

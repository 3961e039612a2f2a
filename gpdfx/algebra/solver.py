"""Unification: two axes become one, by refining both to a common form, or stay as they were."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..errors import AxisConflict
from .axes import ONE, Axis, Leaf, Product, Sum, _only_ones, leaves, paths, product, sum_


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

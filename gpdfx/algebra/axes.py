"""The axis algebra: what a tensor dimension is made of. Knows no fx.

An axis is a leaf (a size), a product of axes (row-major, outer first) or a sum (concatenation):

    qkv.weight rows, viewed as (3, heads, 64)     576 = 3 x 3 x 64
    cat([a(64), b(32)], dim=1)                     96 = 64 + 32
    channel shuffle, view(B, 2, 58, H, W)         116 = 2 x 58

What is said of an axis follows from what is said of its leaves (``evaluate``): ``solver`` makes
two axes equal by refining their leaves, ``widths`` widens leaves (leaf index i of the teacher is
index i % size of the student), ``frozen`` composes the maps that passes write by.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

T = TypeVar("T")
Join = Callable[[list[T]], T]


# --------------------------------------------------------------------------- the three forms
@dataclass(frozen=True, eq=False)
class Leaf:
    """One indivisible axis (until a unification refines it). Equal only to itself; sorted by
    ``order``, that of first use."""

    size: int
    order: int

    def __lt__(self, other: Leaf) -> bool:
        return self.order < other.order

    def __repr__(self) -> str:
        return f"{self.size}'{self.order}"


@dataclass(frozen=True)
class Product:
    """Row-major product, outer first. The first factor is a leaf: an outer sum distributes."""

    factors: tuple[Axis, ...]

    @cached_property
    def size(self) -> int:
        return math.prod(f.size for f in self.factors)

    def __repr__(self) -> str:
        return spell(self, repr)


@dataclass(frozen=True)
class Sum:
    """Concatenation of two or more axes."""

    terms: tuple[Axis, ...]

    @cached_property
    def size(self) -> int:
        return sum(t.size for t in self.terms)

    def __repr__(self) -> str:
        return spell(self, repr)


Axis = Leaf | Product | Sum
ONE = Product(())


def product(*axes: Axis) -> Axis:
    """The product in normal form: flat, without ones, ``(a + b) x c = a x c + b x c``; only the
    last factor may be a sum."""
    flat = [x for a in axes for x in (a.factors if isinstance(a, Product) else [a])]
    flat = [a for a in flat if not (isinstance(a, Leaf) and a.size == 1)]
    for k, a in enumerate(flat[:-1]):
        if isinstance(a, Sum):  # what follows a sum goes into it
            return product(*flat[:k], sum_(*(product(t, *flat[k + 1 :]) for t in a.terms)))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def sum_(*axes: Axis) -> Axis:
    """The sum in normal form: flat, without empty terms."""
    flat = [x for a in axes for x in (a.terms if isinstance(a, Sum) else [a])]
    flat = [ONE if isinstance(a, Leaf) and a.size == 1 else a for a in flat if a.size != 0]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


# --------------------------------------------------------------------------- reading them
def evaluate(axis: Axis, leaf: Callable[[Leaf], T], times: Join[T], plus: Join[T]) -> T:
    """The value of an axis as an expression, given those of its leaves and the two operations:
    ``evaluate(axis, lambda leaf: leaf.size, math.prod, sum)`` is its size."""
    if isinstance(axis, Leaf):
        return leaf(axis)
    if isinstance(axis, Product):
        return times([evaluate(f, leaf, times, plus) for f in axis.factors])
    return plus([evaluate(t, leaf, times, plus) for t in axis.terms])


def leaves(axis: Axis) -> list[Leaf]:
    """Every leaf of an axis, left to right, with repetition."""
    return evaluate(axis, lambda leaf: [leaf], _chained, _chained)


def paths(axis: Axis) -> list[tuple[Leaf, ...]]:
    """The products inside an axis, sums multiplied out: ``h x (k + v)`` -> ``(h, k), (h, v)``."""
    return evaluate(axis, lambda leaf: [(leaf,)], _multiplied_out, _chained)


def _multiplied_out(factors: list[list[tuple[Leaf, ...]]]) -> list[tuple[Leaf, ...]]:
    return [tuple(itertools.chain(*path)) for path in itertools.product(*factors)]


def _chained(lists: list[list[T]]) -> list[T]:
    return list(itertools.chain(*lists))


def spell(axis: Axis, leaf: Callable[[Leaf], str]) -> str:
    """The axis as a formula, given how to write a leaf: ``3 x (8 + 4)``."""
    if isinstance(axis, Leaf):
        return leaf(axis)
    if isinstance(axis, Sum):
        return " + ".join(spell(t, leaf) for t in axis.terms)
    parts = [f"({spell(f, leaf)})" if isinstance(f, Sum) else spell(f, leaf) for f in axis.factors]
    return " x ".join(parts) or "1"

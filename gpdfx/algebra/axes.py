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
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


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


# --------------------------------------------------------------------------- widths

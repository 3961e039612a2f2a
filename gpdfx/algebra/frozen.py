"""Frozen axes: what is left of the algebra once widths are known.

``freeze`` turns an axis into a small value that later passes use: a surjection "teacher index ->
student index" that follows from the leaves by the Kronecker rule for products and by concatenation
for sums. ``share_table`` draws how much each copy carries where the axis is contracted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .axes import Axis, Leaf, Product

MERGING = ("first", "rest", "owner", "copies")


@dataclass(frozen=True, eq=False)
class Frozen:
    """An axis as later passes see it, no leaves any more: ``map`` says for every teacher index
    which of the ``student`` indices it stands for. Everything else follows from the map."""

    student: int
    map: np.ndarray

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self  # never changed once made

    @property
    def teacher(self) -> int:
        return len(self.map)

    @cached_property
    def wide(self) -> bool:
        return self.teacher != self.student

    @cached_property
    def copies(self) -> np.ndarray:
        """How many teacher indices stand for each student index."""
        return np.bincount(self.map, minlength=self.student)

    @cached_property
    def even(self) -> bool:
        """True if every student index has equally many copies."""
        return bool((self.copies == self.copies[:1]).all())

    @cached_property
    def rank(self) -> np.ndarray:
        """Which copy of its student index each teacher index is: 0, 1, ..."""
        order = np.argsort(self.map, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.copies)[:-1]])
        rank = np.empty(self.teacher, dtype=np.int64)
        rank[order] = np.arange(self.teacher) - starts[self.map[order]]
        return rank

    @cached_property
    def first(self) -> np.ndarray:
        """Student index -> its first teacher index."""
        return np.flatnonzero(self.rank == 0)[np.argsort(self.map[self.rank == 0], kind="stable")]

    @cached_property
    def merging(self) -> dict[str, np.ndarray]:
        """What ``copies.narrow`` takes, by ``MERGING``: first copies, all other teacher indices,
        the student index that each of those stands for, and its number of copies."""
        rest = np.setdiff1d(np.arange(self.teacher), self.first)
        owner = self.map[rest]
        return dict(zip(MERGING, (self.first, rest, owner, self.copies[owner]), strict=True))

    @cached_property
    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Share classes: teacher index -> class, and class -> number of copies. The copies of one
        student index take all classes with their number of copies, in order."""
        counts = np.unique(self.copies)
        counts = counts[counts > 0]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        own = self.copies[self.map]
        return starts[np.searchsorted(counts, own)] + self.rank, np.repeat(counts, counts)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """The stretches in which neighbours stand for neighbours: ``(teacher index, student index,
        length)``."""
        starts = np.flatnonzero(np.diff(self.map, prepend=-2) != 1)
        lengths = np.diff(starts, append=self.teacher)
        rows = np.stack([starts, self.map[starts], lengths], 1).tolist()
        return tuple((to, at, length) for to, at, length in rows)

    @cached_property
    def run(self) -> int:
        """The longest run length such that share classes change only at its multiples."""
        return int(
            np.gcd.reduce(np.flatnonzero(np.diff(self.classes[0])) + 1, initial=self.teacher)
        )

    @cached_property
    def blocks(self) -> tuple[int, int, int]:
        """``blocks_of`` the first copies."""
        return blocks_of(self.first, self.teacher)


def blocks_of(index: np.ndarray, size: int) -> tuple[int, int, int]:
    """``(outer, wide, narrow)`` if ``index`` is the first ``narrow`` of every ``wide`` indices,
    ``outer`` times over, of ``size`` in all; zeros if it is not."""
    jumps = np.flatnonzero(np.diff(index) != 1)
    run = int(jumps[0]) + 1 if len(jumps) else len(index)
    outer = len(index) // run
    wide = size // outer
    regular = (np.arange(outer)[:, None] * wide + np.arange(run)[None, :]).reshape(-1)
    if size % outer or len(index) % run or not np.array_equal(regular, index):
        return 0, 0, 0
    return outer, wide, run


def freeze(axis: Axis, width: Callable[[Leaf], int]) -> Frozen:
    """The map of a resolved axis whose leaves have copies in turn: 0, 1, 2, 0, 1, ..."""
    return compose(axis, lambda leaf: np.arange(width(leaf)) % leaf.size)


def compose(axis: Axis, map_of: Callable[[Leaf], np.ndarray]) -> Frozen:
    """The map of a resolved axis from those of its leaves: Kronecker for products, concatenation
    for sums."""
    if isinstance(axis, Leaf):
        return Frozen(axis.size, map_of(axis))
    if isinstance(axis, Product):
        index = np.zeros(1, dtype=np.int64)
        for part in (compose(f, map_of) for f in axis.factors):
            index = (index[:, None] * part.student + part.map[None, :]).reshape(-1)
        return Frozen(axis.size, index)
    parts = [compose(t, map_of) for t in axis.terms]
    starts = np.cumsum([0, *(p.student for p in parts)])
    maps = [p.map + start for p, start in zip(parts, starts[:-1], strict=True)]
    return Frozen(axis.size, np.concatenate(maps) if maps else np.zeros(0, dtype=np.int64))


def share_table(axis: Frozen, rows: Sequence[int], draw: np.random.Generator | None) -> np.ndarray:
    """Positive shares, shape ``(*rows, classes)``: over the copies of a student index they add up
    to one.

    Drawn per row and class, as whole multiples of 1/256, so that every dtype holds them exactly
    (of 1/65536 for more than 16 copies; half types round those). Rows that differ break the
    symmetry between copies under every optimizer, which shares equal for all rows do not.
    ``draw=None``: the paper's uniform shares,
    as an integer table of the number of copies, ``(1, ..., classes)``.
    """
    copies = axis.classes[1]
    if draw is None:
        return np.asarray(copies.reshape((1,) * len(rows) + (-1,)))
    unit = 256 if copies.max(initial=1) <= 16 else 65536
    raw = draw.random((*rows, len(copies))) + 0.5
    member = copies[:, None] == np.unique(copies)[None, :]
    group = np.argmax(member, axis=1)
    parts = np.floor(raw / (raw @ member)[..., group] * unit)
    heads = np.unique(group, return_index=True)[1]  # the first class takes what is left
    parts[..., heads] += unit - parts @ member
    return np.asarray(parts / unit)

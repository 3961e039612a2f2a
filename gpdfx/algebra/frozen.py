"""Frozen axes: what passes that write the teacher see of the algebra, once widths are known.

``freeze`` turns an axis into a small value: a surjection "teacher index -> student index" that
follows from the leaves by the Kronecker rule for products and by concatenation for sums. Tensors,
shares and folds are made from that alone; only the report and ``explain`` go back to the leaves,
for what widens together, and why. ``share_table`` draws how much each copy carries where the axis
is contracted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .axes import Axis, Leaf, evaluate

MERGING = ("first", "rest", "owner", "copies")


@dataclass(frozen=True, eq=False)
class Frozen:
    """An axis without its leaves: ``map`` says for every teacher index which of the ``student``
    indices it stands for. Everything else follows from the map."""

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
        starts = np.cumsum(self.copies) - self.copies
        rank: np.ndarray = np.argsort(order) - starts[self.map]
        return rank

    @cached_property
    def first(self) -> np.ndarray:
        """Student index -> its first teacher index."""
        return np.unique(self.map, return_index=True)[1]

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
        counts, which = np.unique(self.copies[self.map], return_inverse=True)
        starts = np.cumsum(counts) - counts
        return starts[which] + self.rank, np.repeat(counts, counts)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """The stretches in which neighbours stand for neighbours: ``(teacher index, student index,
        length)``."""
        starts = np.flatnonzero(np.diff(self.map, prepend=-2) != 1)
        lengths = np.diff(starts, append=self.teacher)
        columns = (x.tolist() for x in (starts, self.map[starts], lengths))
        return tuple(zip(*columns, strict=True))

    @cached_property
    def run(self) -> int:
        """The longest run length such that share classes change only at its multiples."""
        changes = np.flatnonzero(np.diff(self.classes[0])) + 1
        return int(np.gcd.reduce(changes, initial=self.teacher))

    @cached_property
    def blocks(self) -> tuple[int, int, int]:
        """``blocks_of`` the first copies."""
        return blocks_of(self.first, self.teacher)

    @cached_property
    def in_turn(self) -> bool:
        """True if ``blocks`` tell all: in each, copies come as 0, 1, 2, 0, 1, 2."""
        outer, wide, narrow = self.blocks
        regular = outer > 0 and wide % narrow == 0
        return regular and np.array_equal(turns(self.blocks), self.map)


def blocks_of(index: np.ndarray, size: int) -> tuple[int, int, int]:
    """``(outer, wide, narrow)`` if ``index`` is the first ``narrow`` of every ``wide`` indices,
    ``outer`` times over, of ``size`` in all; zeros if it is not."""
    run = int(np.argmax(np.diff(index, append=-2) != 1)) + 1  # up to the first jump
    outer = len(index) // run
    wide = size // outer
    regular = np.add.outer(np.arange(outer) * wide, np.arange(run)).ravel()
    return (0, 0, 0) if size % outer or not np.array_equal(regular, index) else (outer, wide, run)


def turns(blocks: tuple[int, int, int]) -> np.ndarray:
    """What every teacher index stands for where copies come in turn in each of ``blocks_of``."""
    outer, wide, narrow = blocks
    return np.add.outer(np.arange(outer) * narrow, np.arange(wide) % narrow).ravel()


def freeze(axis: Axis, width: Callable[[Leaf], int]) -> Frozen:
    """The map of a resolved axis whose leaves have copies in turn: 0, 1, 2, 0, 1, ..."""
    return compose(axis, lambda leaf: np.arange(width(leaf)) % leaf.size)


def compose(axis: Axis, map_of: Callable[[Leaf], np.ndarray]) -> Frozen:
    """The map of a resolved axis from those of its leaves."""
    return evaluate(axis, lambda leaf: Frozen(leaf.size, map_of(leaf)), _kronecker, _concatenated)


def _kronecker(factors: list[Frozen]) -> Frozen:
    whole = Frozen(1, np.zeros(1, dtype=np.int64))
    for f in factors:
        index = np.add.outer(whole.map * f.student, f.map).ravel()
        whole = Frozen(whole.student * f.student, index)
    return whole


def _concatenated(terms: list[Frozen]) -> Frozen:
    sizes = [t.student for t in terms]
    maps = [t.map + sum(sizes[:k]) for k, t in enumerate(terms)]
    return Frozen(sum(sizes), np.concatenate([np.zeros(0, dtype=np.int64), *maps]))


def share_table(axis: Frozen, rows: Sequence[int], draw: np.random.Generator | None) -> np.ndarray:
    """Positive shares, shape ``(*rows, classes)``: over the copies of a student index they add up
    to one.

    Drawn per row and class, as whole multiples of 1/256, so that every dtype holds them exactly
    (of 1/65536 for more than 16 copies; half types round those). Rows that differ break the
    symmetry between copies under every optimizer, which shares equal for all rows do not.
    ``draw=None``: the paper's uniform shares, as an integer table of the number of copies,
    ``(1, ..., classes)``.
    """
    copies = axis.classes[1]
    if draw is None:
        return np.asarray(copies.reshape((1,) * len(rows) + (-1,)))
    unit = 256 if copies.max(initial=1) <= 16 else 65536
    raw = draw.random((*rows, len(copies))) + 0.5
    counts, first, group = np.unique(copies, return_index=True, return_inverse=True)
    member = np.eye(len(counts))[group]
    parts = np.floor(raw / (raw @ member)[..., group] * unit)
    parts[..., first] += unit - parts @ member  # the first class takes what is left
    return np.asarray(parts / unit)

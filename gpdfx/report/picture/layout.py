"""From rows and lanes to coordinates: where boxes stand, lines run, and frames lie.

Lines that pass rows run in the gutter to the right of a lane, one track for each node that they
come from, and turn between rows: no line crosses a box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .columns import SHORT, Column, arrange, cut, in_order

Point = tuple[float, float]
GAP, TRACK, TITLE, PAD = 26.0, 9.0, 17.0, 7.0
"""Between rows, between tracks, the title of a block, and inside its frame."""
LEVELS = 2
"""Frames in each other."""
SIDE = (2 * LEVELS + 1) * PAD
"""Between lanes, for the frames around them."""
APART = 70.0
"""Between columns."""
ASPECT = 1.7
"""Width by height of the picture that columns are to make."""


@dataclass(frozen=True)
class Box:
    """A rectangle: the middle of its upper side, and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """``boxes``: of nodes; ``ghosts``: (column, node) -> of a node that a column goes on from;
    ``lines``: with where they come from and end; ``frames``: blocks, how deep they lie in others,
    and around their nodes; outer ones first."""

    boxes: dict[str, Box]
    ghosts: dict[tuple[int, str], Box]
    lines: list[tuple[str, str, list[Point]]]
    frames: list[tuple[str, int, Box]]
    size: Point


class Frame(NamedTuple):
    """Around a block of some depth: from the first to the last of its rows and lanes."""

    block: str
    depth: int
    rows: tuple[int, int]
    lanes: tuple[int, int]

    def holds(self, row: int, lane: int) -> bool:
        """Whether a place is inside."""
        return self.rows[0] <= row <= self.rows[1] and self.lanes[0] <= lane <= self.lanes[1]

    def crosses(self, other: Frame) -> bool:
        """Whether both have a place, if an empty one, and it is not inside the other."""
        pairs = (self.rows, other.rows), (self.lanes, other.lanes)
        meet = all(max(a[0], b[0]) <= min(a[1], b[1]) for a, b in pairs)
        inside = all(b[0] <= a[0] and a[1] <= b[1] for a, b in pairs)
        return meet and not inside


def place(
    sizes: Mapping[str, Point],
    edges: Sequence[tuple[str, str]],
    blocks: Mapping[str, Sequence[str]],
    ghost: Point,
) -> Layout:
    """Lay out nodes of given sizes, in the order of the flow. ``blocks``: node -> the blocks that
    it is in, outer ones first; ``ghost``: the size of a node that a column goes on from."""
    order = in_order(list(sizes), edges)

    def attempt(count: int) -> tuple[float, Layout]:
        """How far from its shape, and the picture in so many columns."""
        layout, left, height = Layout({}, {}, [], [], (0, 0)), 0.0, 0.0
        for k, column in enumerate(cut(order, edges, blocks, count)):
            arrange(column, edges)
            width, bottom = _Geometry(column, edges, sizes, blocks, ghost).draw(layout, k, left)
            left, height = left + width + APART, max(height, bottom)
        size = left - APART, height
        return math.log(size[0] / size[1] / ASPECT), replace(layout, size=size)

    if not order:
        return Layout({}, {}, [], [], (0, 0))
    first = attempt(1)
    guess = round(math.exp(-first[0] / 2))  # twice the columns are twice as wide, half as high
    counts = range(max(2, guess - 1), min(guess + 2, len(order) // SHORT) + 1)
    return min([first, *map(attempt, counts)], key=lambda found: abs(found[0]))[1]


class _Geometry:
    """From rows and lanes to coordinates, for one column."""

    def __init__(
        self,
        column: Column,
        edges: Sequence[tuple[str, str]],
        sizes: Mapping[str, Point],
        blocks: Mapping[str, Sequence[str]],
        ghost: Point,
    ) -> None:
        self.column, self.row, self.lane = column, column.row, column.lane
        self.size = dict.fromkeys(column.heads, ghost) | {n: sizes[n] for n in column.nodes}
        own = set(column.nodes)
        self.edges = [(a, b) for a, b in edges if b in own]
        self.rows, self.lanes = 1 + max(self.row.values()), 1 + max(self.lane.values())
        self.at = {(self.row[n], self.lane[n]): n for n in self.row}
        self.tracks = self._route()
        self.frames = self._frames(blocks)

    def _straight(self, a: str, b: str) -> bool:
        """Whether the lane below ``a`` is free down to the row of ``b``."""
        return all((r, self.lane[a]) not in self.at for r in range(self.row[a] + 1, self.row[b]))

    def _route(self) -> dict[str, tuple[int, int]]:
        """Node -> the gutter and track of its long lines."""
        ends: dict[str, int] = {}
        for a, b in self.edges:
            if not self._straight(a, b):
                ends[a] = max(ends.get(a, 0), self.row[b])
        used: dict[tuple[int, int], int] = {}  # track -> the row up to which it is taken
        tracks: dict[str, tuple[int, int]] = {}
        for a in sorted(ends, key=lambda a: (self.row[a], -ends[a], self.lane[a])):
            free = ((self.lane[a], k) for k in itertools.count())
            tracks[a] = next(t for t in free if used.get(t, -1) <= self.row[a])
            used[tracks[a]] = ends[a]
        return tracks

    def _frames(self, blocks: Mapping[str, Sequence[str]]) -> list[Frame]:
        """Of blocks of two or more nodes that have a rectangle of rows and lanes to themselves."""
        members: dict[tuple[int, str], list[str]] = {}
        for n in self.column.nodes:
            for depth, block in enumerate(blocks[n]):
                members.setdefault((depth, block), []).append(n)
        frames: list[Frame] = []
        for (depth, block), inside in sorted(members.items(), key=lambda item: item[0][0]):
            rows, lanes = [self.row[n] for n in inside], [self.lane[n] for n in inside]
            frame = Frame(block, depth, (min(rows), max(rows)), (min(lanes), max(lanes)))
            own = sum(frame.holds(*place) for place in self.at) == len(inside) > 1
            if own and not any(map(frame.crosses, frames)):
                frames.append(frame)
        return frames

    def draw(self, layout: Layout, number: int, left: float) -> tuple[float, float]:
        """Add everything; the width and height."""
        width = [0.0] * self.lanes
        for n in self.row:
            width[self.lane[n]] = max(width[self.lane[n]], self.size[n][0])
        gutter = [TRACK + SIDE] * self.lanes
        for lane, track in self.tracks.values():
            gutter[lane] = max(gutter[lane], (track + 2) * TRACK + SIDE)
        edge = [left + LEVELS * PAD]  # the left side of each lane
        for w, g in zip(width, gutter, strict=True):
            edge.append(edge[-1] + w + g)
        top, bottom = self._heights()
        boxes = {}
        for n, r in self.row.items():
            w, h = self.size[n]
            x = edge[self.lane[n]] + width[self.lane[n]] / 2
            boxes[n] = Box(x, (top[r] + bottom[r]) / 2 - h / 2, w, h)
        layout.boxes.update((n, boxes[n]) for n in self.column.nodes)
        layout.ghosts.update(((number, n), boxes[n]) for n in self.column.heads)
        for a, b in self.edges:
            x, end, ra, rb = boxes[a].x, boxes[b].x, self.row[a], self.row[b]
            way = [(x, boxes[a].y + boxes[a].height), (x, bottom[ra])]
            if not self._straight(a, b):
                lane, track = self.tracks[a]
                x = edge[lane] + width[lane] + TRACK * (track + 1)
                way.append((x, top[ra + 1]))
            way += [(x, bottom[rb - 1]), (end, top[rb]), (end, boxes[b].y)]
            layout.lines.append((a, b, list(dict.fromkeys(way))))
        for block, depth, (r0, r1), (k0, k1) in self.frames:
            pad = PAD * (LEVELS - depth)
            x0, x1 = edge[k0] - pad, edge[k1] + width[k1] + gutter[k1] - SIDE + pad
            y0, y1 = top[r0] - self._above(r0, depth), bottom[r1] + self._below(r1, depth)
            layout.frames.append((block, depth, Box((x0 + x1) / 2, y0, x1 - x0, y1 - y0)))
        return edge[-1] - LEVELS * PAD - left, bottom[-1] + self._below(self.rows - 1, 0)

    def _above(self, row: int, depth: int) -> float:
        """What frames of this depth and further in take that begin in a row."""
        begin = {f.depth for f in self.frames if f.rows[0] == row and f.depth >= depth}
        return len(begin) * (TITLE + PAD / 2)

    def _below(self, row: int, depth: int) -> float:
        end = {f.depth for f in self.frames if f.rows[1] == row and f.depth >= depth}
        return len(end) * PAD

    def _heights(self) -> tuple[list[float], list[float]]:
        """The upper and lower side of each row."""
        top, bottom, y = [], [], 0.0
        for r in range(self.rows):
            top.append(y + self._above(r, 0))
            bottom.append(top[r] + max(self.size[n][1] for n in self.row if self.row[n] == r))
            y = bottom[r] + self._below(r, 0) + GAP
        return top, bottom

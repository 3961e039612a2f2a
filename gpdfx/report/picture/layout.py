"""Where nodes stand and lines run. Knows sizes and edges only.

A network is mostly a chain: its nodes go down in rows, in the order of the flow, and what runs
beside each other stands in lanes. Lines that pass rows run in the gutter to the right of a lane,
one track for each node that they come from, and turn between rows: no line crosses a box. A long
network is cut into columns, where the fewest lines are cut.

    rows, from    lane 0    gutter 0    lane 1
                  [input]
                  [conv1]   |           [downsample]
                  [conv2]   |
                  [  +  ]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

Point = tuple[float, float]
GAP, TRACK, TITLE, PAD = 26.0, 9.0, 17.0, 7.0
"""Between rows, between tracks, the title of a block, and inside its frame."""
LEVELS = 2
"""Frames in each other."""
SIDE = (2 * LEVELS + 1) * PAD
"""Between lanes, for the frames around them."""
APART = 70.0
"""Between columns."""
CUT = 3
"""Nodes at most that a column goes on from."""
SHORT = 8
"""Nodes at least of a column."""
ASPECT = 1.5
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
    ``lines``: with where they come from and end; ``frames``: blocks, how
    deep they lie in others, and around their nodes; outer ones first."""

    boxes: dict[str, Box]
    ghosts: dict[tuple[int, str], Box]
    lines: list[tuple[str, str, list[Point]]]
    frames: list[tuple[str, int, Box]]
    size: Point


@dataclass
class Column:
    """Part of the nodes, in rows and lanes. ``heads``: nodes of earlier columns that it reads."""

    nodes: list[str]
    heads: list[str]
    row: dict[str, int] = field(default_factory=dict)
    lane: dict[str, int] = field(default_factory=dict)


def place(
    sizes: Mapping[str, Point],
    edges: Sequence[tuple[str, str]],
    blocks: Mapping[str, Sequence[str]],
    ghost: Point,
) -> Layout:
    """Lay out nodes of given sizes, in the order of the flow. ``blocks``: node -> the blocks that
    it is in, outer ones first; ``ghost``: the size of a node that a column goes on from."""
    order = _late_sources(list(sizes), edges)

    def attempt(count: int) -> tuple[float, Layout]:
        """How far from its shape, and the picture in so many columns."""
        layout, left, height = Layout({}, {}, [], [], (0, 0)), 0.0, 0.0
        for k, column in enumerate(_columns(order, edges, blocks, count)):
            _arrange(column, edges)
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


# --------------------------------------------------------------------------- columns
def _late_sources(order: list[str], edges: Sequence[tuple[str, str]]) -> list[str]:
    """Inputs stand right before what reads them first."""
    place = {name: k for k, name in enumerate(order)}
    fed = {b for _, b in edges}
    first: dict[str, int] = {}
    for a, b in edges:
        first[a] = min(place[b], first.get(a, len(order)))

    def rank(name: str) -> tuple[int, bool]:
        return (place[name] if name in fed else first.get(name, place[name])), name in fed

    return sorted(order, key=rank)


def _columns(
    order: list[str],
    edges: Sequence[tuple[str, str]],
    blocks: Mapping[str, Sequence[str]],
    count: int,
) -> Iterator[Column]:
    """Cut where the fewest nodes are read further down; of such places where a block ends, an
    outer one rather; and of these where columns are equally long."""
    place = {name: k for k, name in enumerate(order)}
    last: dict[str, int] = {}
    for a, b in edges:
        last[a] = max(place[b], last.get(a, 0))
    live = [0] * (len(order) + 1)  # nodes before a place that are read from there on
    for a, end in last.items():
        live[place[a] + 1] += 1
        live[end + 1] -= 1
    live = list(itertools.accumulate(live))

    def common(k: int) -> int:
        pairs = zip(blocks[order[k - 1]], blocks[order[k]], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    begin = 0
    for left in range(count, 0, -1):
        near = begin + (len(order) - begin) / left
        low, high = int(near - 0.4 * (near - begin)), int(near + 0.4 * (near - begin))
        places = range(max(low, begin + SHORT), len(order) - SHORT if left > 1 else 0)
        costs = {
            k: (max(0, k - high), live[k], common(k), abs(k - near))
            for k in places
            if live[k] <= CUT
        }
        end = min(costs, key=lambda k: costs[k], default=len(order))
        nodes, inside = order[begin:end], {*order[begin:end]}
        heads = {a for a, b in edges if b in inside and place[a] < begin}
        if nodes:
            yield Column(nodes, sorted(heads, key=lambda a: -place[a]))
        begin = end


# --------------------------------------------------------------------------- rows and lanes
def _arrange(column: Column, edges: Sequence[tuple[str, str]]) -> None:
    """Rows by the longest way to a node; lanes: below the first of what it reads, or nearest."""
    names = dict.fromkeys([*column.heads, *column.nodes])
    before: dict[str, list[str]] = {name: [] for name in names}
    after: dict[str, list[str]] = {name: [] for name in names}
    for a, b in edges:
        if a in names and b in names and b not in column.heads:
            before[b].append(a)
            after[a].append(b)
    row, lane = column.row, column.lane
    for name in names:
        row[name] = 1 + max((row[a] for a in before[name]), default=-1)
    for name in reversed(names):  # what reads nothing stands right above what reads it
        if not before[name] and after[name] and name not in column.heads:
            row[name] = max(row[name], min(row[b] for b in after[name]) - 1)
    taken: set[tuple[int, int]] = set()
    index = {name: k for k, name in enumerate(names)}
    for name in sorted(names, key=lambda n: (row[n], index[n])):
        wish = min((lane[a] for a in before[name]), default=0)
        free = (k for k in itertools.count() for k in (wish + k, wish - k) if k >= 0)
        lane[name] = next(k for k in free if (row[name], k) not in taken)
        taken.add((row[name], lane[name]))


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
        self.frames = list(self._frames(blocks))

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

    def _frames(
        self, blocks: Mapping[str, Sequence[str]]
    ) -> Iterator[tuple[str, int, int, int, int, int]]:
        """Blocks of two or more nodes with a rectangle of rows and lanes of their own: name, depth,
        first and last row, first and last lane."""
        members: dict[tuple[int, str], list[str]] = {}
        for n in self.column.nodes:
            for depth, block in enumerate(blocks[n]):
                members.setdefault((depth, block), []).append(n)
        for (depth, block), inside in sorted(members.items(), key=lambda item: item[0][0]):
            rows, lanes = [self.row[n] for n in inside], [self.lane[n] for n in inside]
            area = (min(rows), max(rows), min(lanes), max(lanes))
            within = {
                n
                for (r, k), n in self.at.items()
                if area[0] <= r <= area[1] and area[2] <= k <= area[3]
            }
            if len(inside) > 1 and within == set(inside):
                yield block, depth, *area

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
        for block, depth, r0, r1, k0, k1 in self.frames:
            pad = PAD * (LEVELS - depth)
            x0, x1 = edge[k0] - pad, edge[k1] + width[k1] + gutter[k1] - SIDE + pad
            y0, y1 = top[r0] - self._above(r0, depth), bottom[r1] + self._below(r1, depth)
            layout.frames.append((block, depth, Box((x0 + x1) / 2, y0, x1 - x0, y1 - y0)))
        return edge[-1] - LEVELS * PAD - left, bottom[-1] + self._below(self.rows - 1, 0)

    def _above(self, row: int, depth: int) -> float:
        """What frames of this depth and further in take that begin in a row."""
        begin = {d for _, d, r0, *_ in self.frames if r0 == row and d >= depth}
        return len(begin) * (TITLE + PAD / 2)

    def _below(self, row: int, depth: int) -> float:
        end = {d for _, d, _, r1, *_ in self.frames if r1 == row and d >= depth}
        return len(end) * PAD

    def _heights(self) -> tuple[list[float], list[float]]:
        """The upper and lower side of each row."""
        top, bottom, y = [], [], 0.0
        for r in range(self.rows):
            top.append(y + self._above(r, 0))
            bottom.append(top[r] + max(self.size[n][1] for n in self.row if self.row[n] == r))
            y = bottom[r] + self._below(r, 0) + GAP
        return top, bottom

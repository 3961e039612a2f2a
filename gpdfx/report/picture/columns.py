"""Columns, rows and lanes: a network is mostly a chain. Knows names and edges only.

Nodes go down in rows, in the order of the flow, and what runs beside each other stands in lanes. A
long network is cut into columns, where the fewest lines are cut.

    row    lane 0     lane 1
    0      [input]
    1      [conv1]    [downsample]
    2      [conv2]
    3      [  +  ]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

CUT = 3
"""Nodes at most that a column goes on from."""
SHORT = 8
"""Nodes at least of a column."""


@dataclass
class Column:
    """Part of the nodes, in rows and lanes. ``heads``: nodes of earlier columns that it reads."""

    nodes: list[str]
    heads: list[str]
    row: dict[str, int] = field(default_factory=dict)
    lane: dict[str, int] = field(default_factory=dict)


def in_order(order: list[str], edges: Sequence[tuple[str, str]]) -> list[str]:
    """Inputs stand right before what reads them first."""
    place = {name: k for k, name in enumerate(order)}
    fed = {b for _, b in edges}
    first: dict[str, int] = {}
    for a, b in edges:
        first[a] = min(place[b], first.get(a, len(order)))

    def rank(name: str) -> tuple[int, bool]:
        return (place[name] if name in fed else first.get(name, place[name])), name in fed

    return sorted(order, key=rank)


def cut(
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
def arrange(column: Column, edges: Sequence[tuple[str, str]]) -> None:
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

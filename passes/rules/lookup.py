"""Ops that look things up: what is indexed never widens, what is found may."""

from __future__ import annotations

from typing import Any

import torch

from ..program import shape, value
from .base import Axes, Op, Rule, broadcast, dim_of

aten = torch.ops.aten


def _embedding(op: Op) -> Axes:
    table = op.axes("weight")
    op.fix(table[0], "lookup")
    return (*op.axes("indices"), *table[1:])


def _index(op: Op) -> Axes:
    """Indexed dimensions are replaced by the broadcast index, in place if adjacent, else first."""
    axes, indices = op.axes("self"), list(op["indices"])
    indices += [None] * (len(axes) - len(indices))
    if any(i is not None and value(i).dtype == torch.bool for i in indices):
        op.conflict("a boolean index keeps positions")
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        _look(op, op["self"], d)
    found = broadcast(op, *(op.axes(indices[d]) for d in used))
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    rest = [a for d, a in enumerate(axes) if d not in used]
    return (*rest[:at], *found, *rest[at:])


def _look(op: Op, x: Any, dim: int) -> None:
    """A table's own axis is fixed; a computed one is seen narrowed."""
    if op.is_static(x):
        op.fix(op.axes(x)[dim], "lookup")
    else:
        op.narrow(x, dim, "it is indexed")


def _index_select(op: Op) -> Axes:
    axes, dim = list(op.axes("self")), dim_of(op, op["dim"])
    _look(op, op["self"], dim)
    axes[dim] = op.axes("index")[0] if shape(op["index"]) else op.fixed(1)
    return tuple(axes)


def _gather(op: Op) -> Axes:
    """Along ``dim`` positions are taken; the other dimensions of input and index agree."""
    axes, index, dim = op.axes("self"), op.axes("index"), dim_of(op, op["dim"])
    _look(op, op["self"], dim)
    for d, (a, b) in enumerate(zip(axes, index, strict=True)):
        if d != dim:
            op.unify(a, b) if a.size == b.size else op.conflict("gather takes a part of an axis")
    return index


TABLE: dict[Any, Rule] = {
    aten.embedding.default: Rule(_embedding),
    aten.index.Tensor: Rule(_index),
    aten.index_select.default: Rule(_index_select),
    aten.gather.default: Rule(_gather),
}

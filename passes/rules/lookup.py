"""Ops that look things up: what is indexed never widens, what is found may."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from ..program import is_tensor, shape, value
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
        op.hold(op["self"], d, "it is indexed")
    return _found(op, axes, indices)


def _found(op: Op, axes: Axes, indices: list[Any]) -> Axes:
    """The axes of ``self[indices]``."""
    used = [d for d, i in enumerate(indices) if i is not None]
    found = broadcast(op, *(op.axes(indices[d]) for d in used))
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    rest = [a for d, a in enumerate(axes) if d not in used]
    return (*rest[:at], *found, *rest[at:])


def _index_select(op: Op) -> Axes:
    axes, dim = list(op.axes("self")), dim_of(op, op["dim"])
    op.hold(op["self"], dim, "it is indexed")
    axes[dim] = op.axes("index")[0] if shape(op["index"]) else op.fixed(1)
    return tuple(axes)


def _gather(op: Op) -> Axes:
    """Along ``dim`` positions are taken; the other dimensions of input and index agree."""
    axes, index, dim = op.axes("self"), op.axes("index"), dim_of(op, op["dim"])
    op.hold(op["self"], dim, "it is indexed")
    for d, (a, b) in enumerate(zip(axes, index, strict=True)):
        if d != dim:
            op.unify(a, b) if a.size == b.size else op.conflict("gather takes a part of an axis")
    return index


def _embedding_bag(op: Op) -> list[Axes]:
    """Sums, means or largest of rows; then which rows, by bag."""
    weight = op.axes("weight")
    op.fix(weight[0], "lookup")
    bags, *others = op.node.meta["val"]
    result = (op.measured(bags.shape[0]), weight[1])
    return [result] + [
        result if v.ndim == 2 else tuple(op.measured(s) for s in v.shape) for v in others
    ]


def _scatter(op: Op, operands: tuple[str, ...]) -> Axes:
    """Positions along ``dim`` are written; the other dimensions of all operands agree."""
    axes, dim = op.axes("self"), dim_of(op, op["dim"])
    for name in operands:
        if isinstance(op[name], fx.Node) and is_tensor(op[name]):
            op.take(op[name], dim, "positions along it are written", out=dim)
            for d, (a, b) in enumerate(zip(axes, op.axes(name), strict=True)):
                if d != dim:
                    op.unify(a, b) if a.size == b.size else op.conflict("scatter takes a part")
    return op.axes("self")


def _index_put(op: Op) -> Axes:
    """Indexed dimensions are written at positions; what is written broadcasts over the rest."""
    axes, indices = op.axes("self"), list(op["indices"])
    for d, index in enumerate(indices):
        if index is not None and value(index).dtype == torch.bool:
            op.conflict("a boolean index keeps positions")
        if index is not None:
            op.take(op["self"], d, "it is indexed", out=d)
    broadcast(op, _found(op, axes, indices), op.axes("values"))
    return op.axes("self")


_ELEMENTS = Rule(partial(_scatter, operands=("self", "index", "src")))
_SLICES = Rule(partial(_scatter, operands=("self", "source")))  # by an index of one dimension

TABLE: dict[Any, Rule] = {
    aten.embedding.default: Rule(_embedding),
    aten.embedding_bag.default: Rule(_embedding_bag),
    aten.embedding_bag.padding_idx: Rule(_embedding_bag),
    aten.index.Tensor: Rule(_index),
    aten.index_select.default: Rule(_index_select),
    aten.gather.default: Rule(_gather),
    aten.scatter.src: _ELEMENTS,
    aten.scatter.value: _ELEMENTS,
    aten.scatter.reduce: _ELEMENTS,
    aten.scatter.value_reduce: _ELEMENTS,
    aten.scatter_add.default: _ELEMENTS,
    aten.scatter_reduce.two: _ELEMENTS,
    aten.index_add.default: _SLICES,
    aten.index_copy.default: _SLICES,
    aten.index_reduce.default: _SLICES,
    aten.index_fill.int_Scalar: _SLICES,
    aten.index_fill.int_Tensor: _SLICES,
    aten.index_put.default: Rule(_index_put),
}

"""Random ops, drawn at the student's shape and in the student's order, then spread: equal seeds
give equal functions. Ops that only draw are bridged (nothing is lost); dropout draws a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...kernels import copies
from ..program import value
from .base import Axes, Op, Rule, Writer, memory_order, student_sizes

aten = torch.ops.aten


def _same(op: Op) -> Axes:
    return op.axes("input" if "input" in op.args else "self")


def _dropout(w: Writer) -> fx.Node:
    op = w.op
    axes = op.axes("input")
    if not op["train"] or w.target.independent or not any(w.wide(a) for a in axes):
        return w.copy()
    x, name = w["input"], op.node.target._opname.rstrip("_")  # type: ignore[union-attr]
    sizes = student_sizes(w, x, axes, value(op["input"]).shape)
    mask = w.call(copies.dropout_mask, x, sizes, name, op["p"], memory_order(op["input"]))
    return w.call(aten.mul.Tensor, x, w.spread(mask, axes))


def _draw(op: Op) -> Axes:
    """Only the shape of the input matters (or its probabilities, equal in all copies)."""
    for d in range(len(op.axes("self"))):
        op.narrow(op["self"], d, "", out=d)
    return op.axes("self")


def _widen_draw(w: Writer) -> fx.Node:
    x = w.op["self"]
    if not any(w.wide(a) for a in w.op.axes("self")):
        return w.copy()
    return w.copy(self=w.call(copies.in_order, w["self"], memory_order(x)))


TABLE: dict[Any, Rule] = {
    op: Rule(_draw, _widen_draw)
    for op in (
        aten.bernoulli.default,
        aten.bernoulli.p,
        aten.bernoulli_.float,
        aten.rand_like.default,
        aten.randn_like.default,
    )
}
TABLE |= {op: Rule(_same, _dropout) for op in (aten.dropout.default, aten.feature_dropout.default)}

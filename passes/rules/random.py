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


def _input(op: Op) -> str:
    return "input" if "input" in op.args else "self"


def _same(op: Op) -> Axes:
    return op.axes(_input(op))


def _dropout(w: Writer) -> fx.Node:
    op = w.op
    axes = op.axes("input")
    if not op["train"] or w.target.independent or not any(w.wide(a) for a in axes):
        return w.copy()
    x, name = w["input"], op.node.target._opname  # type: ignore[union-attr]
    sizes = student_sizes(w, x, axes, value(op["input"]).shape)
    mask = w.call(copies.dropout_mask, x, sizes, name, op["p"], memory_order(op["input"]))
    return w.call(aten.mul.Tensor, x, w.spread(mask, axes))


def _draw(op: Op) -> Axes:
    """A number is drawn for every element of the student's, in its memory order."""
    for d in range(len(_same(op))):
        op.narrow(op[_input(op)], d, "", out=d)
    return _same(op)


def _widen_draw(w: Writer) -> fx.Node:
    name = _input(w.op)
    if not any(w.wide(a) for a in _same(w.op)):
        return w.copy()
    return w.copy(**{name: w.call(copies.in_order, w[name], memory_order(w.op[name]))})


TABLE: dict[Any, Rule] = {
    op: Rule(_draw, _widen_draw)
    for op in (
        aten.bernoulli.default,
        aten.bernoulli.p,
        aten.bernoulli_.float,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.rrelu.default,
    )
}
TABLE |= {op: Rule(_same, _dropout) for op in (aten.dropout.default, aten.feature_dropout.default)}

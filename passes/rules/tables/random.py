"""Random ops, drawn at the student's shape and in the student's order, then spread: equal seeds
give equal functions. Ops that only draw are bridged (nothing is lost); dropout draws a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ....kernels import copies
from ....torch_private import op_name
from ...program import value
from ..op import Axes, Op, memory_orders
from ..signature import rows, sig
from ..writer import Rule, Writer, student_sizes


def _dropout(w: Writer) -> fx.Node:
    op = w.op
    axes = op.axes("input")
    if not op["train"] or w.target.independent or not any(map(w.wide, axes)):
        return w.copy()
    x, name = w["input"], op_name(op.node.target)
    sizes = student_sizes(w, x, axes, value(op["input"]).shape)
    mask = w.call(copies.dropout_mask, x, sizes, name, op["p"], memory_orders(op["input"]))
    return w.call(torch.ops.aten.mul.Tensor, x, w.spread(mask, axes))


def _draw(op: Op) -> Axes:
    """A number is drawn for every element of the student's, in its memory order."""
    x = next(iter(op.args.values()))
    for d in range(len(op.axes(x))):
        op.narrow(x, d, "", out=d)
    return op.axes(x)


def _widen_draw(w: Writer) -> fx.Node:
    name = next(iter(w.op.args))
    if not any(map(w.wide, w.op.axes(name))):
        return w.copy()
    return w.copy(**{name: w.call(copies.in_order, w[name], memory_orders(w.op[name]))})


TABLE: dict[Any, Rule] = rows(
    {
        "bernoulli bernoulli.p bernoulli_.float rand_like randn_like alpha_dropout "
        "feature_alpha_dropout rrelu": Rule(_draw, _widen_draw),
        "dropout feature_dropout": replace(sig("... -> ..."), widen=_dropout),
    }
)

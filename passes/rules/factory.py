"""Ops that make tensors from sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from ...calls.sizes import is_free
from ..program import value
from .base import Axes, Op, Rule, Writer
from .movement import sizes_of

aten = torch.ops.aten


def _made(op: Op) -> Axes:
    """Constant along every axis, so each may widen with what it meets."""
    result = []
    for size, raw in zip(op.out_shape, value(op.node).shape, strict=True):
        axis = op.free(size)
        if is_free(raw):
            op.solver.mark(op.solver.symbolic, axis)
        result.append(axis)
    return tuple(result)


def _counted(op: Op) -> Axes:
    """``arange`` and friends: positions; only a dimension of one can widen."""
    axes = _made(op)
    for axis in axes:
        op.fix(axis, "positions")
    return axes


def _widen(w: Writer, argument: str) -> fx.Node:
    return w.copy(**{argument: sizes_of(w, w.target.axes[w.op.node], w.op[argument])})


_SIZED = Rule(_made, partial(_widen, argument="size"))
TABLE: dict[Any, Rule] = dict.fromkeys(
    (
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.empty.memory_format,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    ),
    _SIZED,
)
TABLE |= {
    op: Rule(_counted)
    for op in (
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.linspace.default,
        aten.eye.default,
        aten.eye.m,
        aten.scalar_tensor.default,
        aten.tril_indices.default,
        aten.triu_indices.default,
        aten.hann_window.default,
    )
}

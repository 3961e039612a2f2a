"""Ops that treat every element alike, whatever the axes: one rule, broadcasting."""

from __future__ import annotations

from typing import Any

import torch

from ..program import is_tensor
from .base import Axes, Op, Rule, broadcast

aten = torch.ops.aten


def pointwise(op: Op) -> Any:
    """The operands broadcast; an in-place op keeps its target's axes."""
    operands = [op.axes(n) for n in dict.fromkeys(op.node.all_input_nodes) if is_tensor(n)]
    return broadcast(op, *operands)


def like_self(op: Op) -> Axes:
    """The first operand's axes (type and layout conversions, ``zeros_like``)."""
    return op.axes(op.node.all_input_nodes[0])


def _prelu(op: Op) -> Axes:
    x, weight = op.axes("self"), op.axes("weight")
    if weight[0].size != 1:
        op.unify(x[1] if len(x) > 1 else x[0], weight[0])
    return x


def _glu(op: Op) -> Axes:
    axes = list(op.axes("self"))
    dim = int(op["dim"]) % len(axes)
    left, right = op.solver.cut(axes[dim], axes[dim].size // 2)
    axes[dim] = op.unify(left, right)
    return tuple(axes)


POINTWISE = Rule(pointwise)
_LIKE = Rule(like_self)

# Pointwise ops that do not carry the tag, and conversions.
TABLE: dict[Any, Rule] = dict.fromkeys(
    (
        aten.to.dtype,
        aten.to.device,
        aten.to.other,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.detach_.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
        aten.lift_fresh.default,
        aten.type_as.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.hardswish.default,
        aten.hardswish_.default,
        aten.zero_.default,
        aten.fill_.Scalar,
        aten.fill.Scalar,
        aten._conj.default,
        aten.resolve_conj.default,
    ),
    _LIKE,
)
TABLE |= dict.fromkeys(
    (
        aten.copy_.default,
        aten.masked_fill_.Scalar,
        aten.masked_fill_.Tensor,
        aten.relu6.default,
        aten.relu6_.default,
        aten.selu.default,
        aten.hardtanh.default,
        aten.where.ScalarSelf,
        aten.where.ScalarOther,
        aten.where.Scalar,
        aten.clip.default,
        aten.true_divide.Tensor,
        aten.divide.Tensor,
        aten.multiply.Tensor,
        aten.subtract.Tensor,
        aten.square.default,
        aten.softplus.default,
        aten.log_sigmoid.default,
        aten.polar.default,
        aten.complex.default,
    ),
    POINTWISE,
)
TABLE[aten.prelu.default] = Rule(_prelu)
TABLE[aten.glu.default] = Rule(_glu)

"""Ops that treat every element alike, whatever the axes: one rule, broadcasting."""

from __future__ import annotations

from typing import Any

from ..op import Axes, Op, dim_of
from ..signature import rows, sig
from ..writer import Rule

POINTWISE = sig("...?, ...?, ...?, ...? -> ...")


def _glu(op: Op) -> Axes:
    axes, dim = list(op.axes("self")), dim_of(op, op["dim"])
    left, right = op.solver.cut(axes[dim], axes[dim].size // 2)
    axes[dim] = op.unify(left, right)
    return tuple(axes)


TABLE: dict[Any, Rule] = rows(
    {  # conversions: the first operand's axes
        "to.dtype to.device to.other to.dtype_layout _to_copy contiguous detach detach_ alias "
        "lift_fresh_copy lift_fresh lift type_as zeros_like ones_like full_like empty_like "
        "hardswish hardswish_ zero_ fill_.Scalar fill.Scalar _conj resolve_conj": "... -> ...",
        # pointwise, without the tag
        "copy_ masked_fill_.Scalar masked_fill_.Tensor relu6 relu6_ leaky_relu leaky_relu_ "
        "selu hardtanh "
        "where.ScalarSelf where.ScalarOther where.Scalar clip true_divide.Tensor divide.Tensor "
        "multiply.Tensor subtract.Tensor square softplus log_sigmoid polar complex floor_divide "
        "floor_divide.Scalar rsub.Tensor masked_fill.Tensor fill.Tensor": POINTWISE,
        "prelu": "b c ..., c -> b c ... | ..., one -> ...",
        "glu": Rule(_glu),
    }
)

"""Ops that take a dimension away or mix along it. What each needs over a widened axis is in its
row; ops for which positions along the axis matter see it at the student's width."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ....algebra.axes import ONE
from ....kernels import copies
from ...program import value
from ..op import Axes, Op, dims_of, outputs
from ..signature import rows, share_along, sig
from ..writer import Rule, Writer

aten = torch.ops.aten


def _dims(op: Op) -> list[int]:
    return dims_of(op, op.args.get("dim", op.args.get("dims")))


def reduce(op: Op, narrow: str = "") -> Any:
    """Drop (or keep as ones) the reduced dimensions. ``narrow``: why positions matter, if so."""
    axes, dims = op.axes("self"), _dims(op)
    for d in dims if narrow else ():
        op.narrow(op["self"], d, narrow)
    kept = bool(op["keepdim"])
    out = tuple(ONE if d in dims else a for d, a in enumerate(axes) if kept or d not in dims)
    return alike(op, out)


def alike(op: Op, axes: Axes) -> Any:
    """The same axes for every output of the op."""
    return [axes] * len(outputs(op.node)) if isinstance(value(op.node), tuple | list) else axes


# --------------------------------------------------------------------------- sums and means
def _widen_sum(w: Writer) -> fx.Node:
    axes, x = w.op.axes("self"), w["self"]
    for d in _wide(w):
        x = share_along(w, x, w.op["self"], axes[d], [1] * len(axes), d, d)
    return w.copy(self=x)


def _counts(w: Writer) -> tuple[list[int], fx.Node, float]:
    """The reduced dimensions, how many copies indices have there, and how many on average."""
    axes, dims = w.op.axes("self"), _dims(w.op)
    return dims, w.copies(axes, dims), w.gain(axes, dims)


def _wide(w: Writer) -> list[int]:
    axes = w.op.axes("self")
    return [d for d in _dims(w.op) if w.wide(axes[d])]


def _widen_mean(w: Writer) -> fx.Node:
    if not w.uneven(w.op.axes("self"), _dims(w.op)):
        return w.copy()
    return w.call(copies.average, w["self"], *_counts(w), bool(w.op["keepdim"]))


def _correction(op: Op) -> float:
    if "unbiased" in op.args:
        return 1.0 if op["unbiased"] else 0.0
    return 1.0 if op["correction"] is None else float(op["correction"])


def _variance(root: bool, mean: bool) -> Rule:
    """The student's variance: the biased one, rescaled by n / (n - c) with the student's n."""

    def widen(w: Writer) -> fx.Node:
        if not _wide(w):
            return w.copy()
        rest = _correction(w.op), bool(w.op["keepdim"]), root, mean
        return w.call(copies.variance, w["self"], *_counts(w), *rest)

    return Rule(reduce, widen)


def _order(op: Op) -> float:
    """Of a vector norm."""
    order = op.args.get("p", op.args.get("ord"))
    return 2.0 if order is None else float(order)


def _norm(op: Op) -> Any:
    return reduce(op, narrow="" if _order(op) else "a zero norm counts")


def _widen_norm(w: Writer) -> fx.Node:
    wide, order = _wide(w), _order(w.op)
    if not wide or order in (0, math.inf, -math.inf):
        return w.copy()
    count = w.copies(w.op.axes("self"), wide)
    return w.copy(self=w.call(copies.root_share, w["self"], count, order))


def _widen_logsumexp(w: Writer) -> fx.Node:
    if not _wide(w):
        return w.copy()
    count = w.copies(w.op.axes("self"), _dims(w.op))
    return w.copy(self=w.call(copies.log_share, w["self"], count))


def _widen_softmax(w: Writer, log: bool = False) -> fx.Node:
    if not _wide(w):
        return w.copy()
    (d,), x = _dims(w.op), w["self"]
    frozen = w.frozen(w.op.axes("self")[d])
    if w.op["dtype"] is not None:
        x = w.call(aten.to.dtype, x, w.op["dtype"])
    return w.call(copies.softmax, x, d, w.constant(frozen.copies[frozen.map]), log)


# --------------------------------------------------------------------------- positions
def along(op: Op, why: str = "order along this axis is its result", keep: bool = True) -> Any:
    """An op whose result along some dimensions depends on positions; the result has the same
    axes, or, with ``keep=False``, fresh ones."""
    axes = list(op.axes("self"))
    for d in _dims(op) if axes else ():
        op.narrow(op["self"], d, why, out=d if keep else None)
        axes[d] = axes[d] if keep else op.fixed(op.out_shape[d], "positions")
    return alike(op, tuple(axes))


_POSITION = "positions along this axis are its result"
_SAME = sig("... -> ...")
TABLE: dict[Any, Rule] = rows(
    {
        "sum sum.dim_IntList": Rule(reduce, _widen_sum),
        "mean mean.dim": Rule(reduce, _widen_mean),
        "logsumexp": Rule(reduce, _widen_logsumexp),
        "softmax.int _softmax": replace(_SAME, widen=_widen_softmax),
        "log_softmax.int _log_softmax": replace(_SAME, widen=partial(_widen_softmax, log=True)),
        "amax amin max min any any.dim all all.dim": Rule(reduce),
        "linalg_vector_norm norm.ScalarOpt_dim norm.Scalar norm.ScalarOpt_dim_dtype": Rule(
            _norm, _widen_norm
        ),
        "var var.dim var.correction": _variance(root=False, mean=False),
        "std std.dim std.correction": _variance(root=True, mean=False),
        "var_mean var_mean.dim var_mean.correction": _variance(root=False, mean=True),
        "std_mean std_mean.dim std_mean.correction": _variance(root=True, mean=True),
        "prod prod.dim_int": Rule(partial(reduce, narrow="copies would multiply")),
        "argmax argmin max.dim min.dim median.dim mode kthvalue": Rule(
            partial(reduce, narrow=_POSITION)
        ),
        "cumsum cumprod logcumsumexp argsort sort sort.stable cummax cummin flip roll": Rule(along),
        "topk": Rule(partial(along, why=_POSITION, keep=False)),
        "diff": Rule(partial(along, keep=False)),
    }
)

"""Ops that take a dimension away or mix along it. What each needs over a widened axis is in its
row; ops for which positions along the axis matter see it at the student's width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from ...algebra.axes import ONE
from ...kernels import copies
from ..program import size_hint
from .base import Axes, Op, Rule, Writer, copy_op, dim_of, dims_of
from .signature import share_along

aten = torch.ops.aten


def _dims(op: Op) -> list[int]:
    return dims_of(op, op.args.get("dim", op.args.get("axis")))


def reduce(op: Op, narrow: str = "", count: int = 1) -> Any:
    """Drop (or keep as ones) the reduced dimensions. ``narrow``: why positions matter, if so."""
    axes, dims = op.axes("self"), _dims(op)
    if narrow:
        for d in dims:
            op.narrow(op["self"], d, narrow)
    kept = bool(op.args.get("keepdim", False))
    out = tuple(ONE if d in dims else a for d, a in enumerate(axes) if kept or d not in dims)
    return out if count == 1 else [out] * count


# --------------------------------------------------------------------------- sums and means
def _widen_sum(w: Writer) -> fx.Node:
    axes, x = w.op.axes("self"), w["self"]
    for d in _dims(w.op):
        if w.wide(axes[d]):
            sizes = [1] * len(axes)
            x = share_along(w, x, w.op["self"], axes[d], sizes, d, d)
    return w.copy(self=x)


def _widen_mean(w: Writer) -> fx.Node:
    axes, dims = w.op.axes("self"), _dims(w.op)
    if not w.uneven(axes, dims):
        return w.copy()
    keep = bool(w.op.args.get("keepdim", False))
    return w.call(copies.average, w["self"], dims, w.copies(axes, dims), w.gain(axes, dims), keep)


def _correction(op: Op) -> float:
    if "unbiased" in op.args:
        return 1.0 if op["unbiased"] else 0.0
    return 1.0 if op["correction"] is None else float(op["correction"])


def _widen_variance(w: Writer, root: bool, mean: bool) -> fx.Node:
    """The student's variance: the biased one, rescaled by n / (n - c) with the student's n."""
    axes, dims = w.op.axes("self"), _dims(w.op)
    if not any(w.wide(axes[d]) for d in dims):
        return w.copy()
    keep = bool(w.op.args.get("keepdim", False))
    number = w.copies(axes, dims), w.gain(axes, dims)
    correction = _correction(w.op)
    return w.call(copies.variance, w["self"], dims, *number, correction, keep, root, mean)


def _widen_norm(w: Writer) -> fx.Node:
    axes, dims = w.op.axes("self"), _dims(w.op)
    order = w.op.args.get("p", w.op.args.get("ord"))
    order = 2.0 if order is None else float(order)
    wide = [d for d in dims if w.wide(axes[d])]
    if not wide or abs(order) == float("inf"):
        return w.copy()
    x = w.call(copies.root_share, w["self"], w.copies(axes, wide), order)
    return w.copy(self=x)


def _norm(op: Op) -> Any:
    order = op.args.get("p", op.args.get("ord"))
    return reduce(op, narrow="a zero norm counts" if order == 0 else "")


def _widen_logsumexp(w: Writer) -> fx.Node:
    axes, dims = w.op.axes("self"), _dims(w.op)
    if any(w.wide(axes[d]) for d in dims):
        return w.copy(self=w.call(copies.log_share, w["self"], w.copies(axes, dims)))
    return w.copy()


# --------------------------------------------------------------------------- softmax
def _same(op: Op) -> Axes:
    return op.axes("self")


def _widen_softmax(w: Writer, log: bool) -> fx.Node:
    axes = w.op.axes("self")
    d = dim_of(w.op, w.op["dim"])
    if not w.wide(axes[d]):
        return w.copy()
    frozen = w.frozen(axes[d])
    x = w["self"]
    if w.op.args.get("dtype") is not None:
        x = w.call(aten.to.dtype, x, w.op["dtype"])
    return w.call(copies.softmax, x, d, w.constant(frozen.copies[frozen.map]), log)


# --------------------------------------------------------------------------- positions
def along(op: Op, why: str, count: int = 1, keep: bool = True, dim: str = "dim") -> Any:
    """An op whose result along ``dim`` depends on positions; the result has the same axis, or,
    with ``keep=False``, a fresh one."""
    axes = list(op.axes("self"))
    if not axes:
        return () if count == 1 else [()] * count
    dims = dims_of(op, op[dim])
    for d in dims:
        op.narrow(op["self"], d, why, out=d if keep else None)
        if not keep:
            values = op.node.meta["val"]
            size = (values[0] if isinstance(values, tuple | list) else values).shape[d]
            axes[d] = op.fixed(size_hint(size), "positions")
    return tuple(axes) if count == 1 else [tuple(axes)] * count


def _row(infer: Callable[[Op], Any], widen: Callable[[Writer], fx.Node] = copy_op) -> Rule:
    return Rule(infer, widen)


_POSITION = "positions along this axis are its result"
_ORDER = "order along this axis is its result"
_reduce: Any = reduce
TABLE: dict[Any, Rule] = {
    aten.sum.default: _row(_reduce, _widen_sum),
    aten.sum.dim_IntList: _row(_reduce, _widen_sum),
    aten.mean.default: _row(_reduce, _widen_mean),
    aten.mean.dim: _row(_reduce, _widen_mean),
    aten.logsumexp.default: _row(_reduce, _widen_logsumexp),
    aten.softmax.int: _row(_same, partial(_widen_softmax, log=False)),
    aten._softmax.default: _row(_same, partial(_widen_softmax, log=False)),
    aten.log_softmax.int: _row(_same, partial(_widen_softmax, log=True)),
    aten._log_softmax.default: _row(_same, partial(_widen_softmax, log=True)),
}
TABLE |= {
    op: _row(_reduce)
    for op in (
        aten.amax.default,
        aten.amin.default,
        aten.max.default,
        aten.min.default,
        aten.any.default,
        aten.any.dim,
        aten.all.default,
        aten.all.dim,
    )
}
TABLE |= {
    op: _row(_norm, _widen_norm)
    for op in (
        aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim,
        aten.norm.Scalar,
        aten.norm.ScalarOpt_dim_dtype,
    )
}
for _name, _root, _mean in (
    ("var", False, False),
    ("std", True, False),
    ("var_mean", False, True),
    ("std_mean", True, True),
):
    for _overload in ("default", "dim", "correction"):
        if hasattr(getattr(aten, _name), _overload):
            TABLE[getattr(getattr(aten, _name), _overload)] = _row(
                partial(reduce, count=1 + _mean), partial(_widen_variance, root=_root, mean=_mean)
            )
TABLE |= {
    op: _row(partial(reduce, narrow=_POSITION)) for op in (aten.argmax.default, aten.argmin.default)
}
TABLE |= {
    op: _row(partial(reduce, narrow="copies would multiply"))
    for op in (aten.prod.default, aten.prod.dim_int)
}
TABLE |= {
    op: _row(partial(reduce, narrow=_POSITION, count=2))
    for op in (
        aten.max.dim,
        aten.min.dim,
        aten.median.dim,
        aten.mode.default,
        aten.kthvalue.default,
    )
}
TABLE |= {
    op: _row(partial(along, why=_ORDER))
    for op in (
        aten.cumsum.default,
        aten.cumprod.default,
        aten.logcumsumexp.default,
        aten.argsort.default,
    )
}
TABLE |= {
    op: _row(partial(along, why=_ORDER, count=2))
    for op in (aten.sort.default, aten.sort.stable, aten.cummax.default, aten.cummin.default)
}
TABLE[aten.topk.default] = _row(partial(along, why=_POSITION, count=2, keep=False))
TABLE[aten.diff.default] = _row(partial(along, why=_ORDER, keep=False))
TABLE[aten.flip.default] = _row(partial(along, why=_ORDER, dim="dims"))
TABLE[aten.roll.default] = _row(partial(along, why=_ORDER, dim="dims"))

"""Ops that take a dimension away or mix along it. What each needs over a widened axis is in its
row; ops for which positions along the axis matter see it at the student's width."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ....algebra.axes import ONE
from ....calls.held import has_gradient
from ....calls.sizes import is_free
from ....kernels import copies
from ...program import value
from ..op import Axes, Op, broadcast, dim_of, dims_of, outputs
from ..signature import Signature, by, parse, rows, share_along, sig
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
def _sum(op: Op) -> Any:
    """Integers are counts: no share of one is an integer."""
    return reduce(op, "" if has_gradient(value(op["self"])) else "copies would count")


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
        x = w.call(aten.to.dtype, x, w["dtype"])
    return w.call(copies.softmax, x, d, w.constant(frozen.copies[frozen.map]), log)


# --------------------------------------------------------------------------- distances
def _distance(pattern: str, names: str) -> Rule:
    """p-norms of differences along ``d``; at the student's width for order zero, which counts, and
    infinity, which gives all copies of the largest the gradient of one."""

    def choose(op: Op) -> Signature:
        return parse(
            pattern
            if _order(op) not in (0, math.inf)
            else re.sub(r"(\bd\b|\.\.\.)(?=.*->)", r"\1!", pattern)
        )

    def widen(w: Writer) -> fx.Node:
        order = _order(w.op)
        changes: dict[str, Any] = {}
        if "compute_mode" in w.op.args:
            changes["compute_mode"] = _mode(w.op)
        for name, (x, _) in w.op.match.given.items():
            axes = w.op.axes(x) if "d" in w.op.env else w.op.match.stretch("...")
            dims = [len(axes) - 1] if "d" in w.op.env else list(range(len(axes)))
            if order not in (0, math.inf) and any(w.wide(axes[d]) for d in dims):
                changes[name] = w.call(copies.root_share, w[name], w.copies(axes, dims), order)
        return w.copy(**changes)

    return replace(by(choose, names), widen=widen)


def _cosine(op: Op) -> Signature:
    """The dimension is counted from the right, as operands broadcast."""
    rank = len(op.out_shape) + 1
    right = " ".join(f"e{k}" for k in range(rank - 1 - int(op["dim"]) % rank))
    return parse(f"... d {right}, ... d {right} -> ... {right}")


def _widen_cosine(w: Writer) -> fx.Node:
    """Products and squares of numbers that are weighed by a root are weighed by shares."""
    changes = {}
    if w.wide(w.op.env["d"]):
        for name, (x, places) in w.op.match.given.items():
            axes, d = list(w.op.axes(x)), [dim for dim, _ in places].index(("d",))
            axes[d] = w.op.env["d"]  # the other's, if its own size is one
            count = w.copies(tuple(axes), [d])
            changes[name] = w.call(copies.root_share, w[name], count, 2.0)
    return w.copy(**changes)


def _mode(op: Op) -> int | None:
    """By which formula distances are computed: torch decides by the number of points, and the
    teacher as for the student's, if that is known."""
    points = [value(op[x]).shape[-2] for x in ("x1", "x2")]
    if op["compute_mode"] is not None or any(map(is_free, points)):
        return op["compute_mode"]  # type: ignore[no-any-return]
    return 1 if max(points) > 25 else 2


# --------------------------------------------------------------------------- losses
def _loss(names: str) -> Rule:
    """Element by element, then a mean (``reduction`` 1), a sum (2) or neither (0)."""

    def every(op: Op) -> Axes:
        return broadcast(op, *(op.axes(x) for x in names.split() if op[x] is not None))

    def infer(op: Op) -> Axes:
        axes = every(op)
        return () if op["reduction"] else axes

    def widen(w: Writer) -> fx.Node:
        axes = every(w.op)
        dims = list(range(len(axes)))
        wide = [d for d in dims if w.wide(axes[d])]
        if not wide or not w.op["reduction"]:
            return w.copy()
        y = w.copy(reduction=0)
        if w.op["reduction"] == 1:
            return w.call(copies.average, y, dims, w.copies(axes, dims), w.gain(axes, dims), False)
        for d in wide:
            y = share_along(w, y, w.op.node, axes[d], [1] * len(axes), d, d)
        return w.call(aten.sum.default, y)

    return Rule(infer, widen)


# --------------------------------------------------------------------------- positions
def _renorm(op: Op) -> Signature:
    """What is along ``dim`` keeps a norm of its own; one that counts sees the student's width."""
    dim, counts = dim_of(op, op["dim"]), _order(op) in (0, math.inf)
    names = [f"d{k}" for k in range(len(op.axes("self")))]
    left = " ".join(n + "!" * (k != dim and counts) for k, n in enumerate(names))
    return parse(f"{left} -> {' '.join(names)}")


def _widen_renorm(w: Writer) -> fx.Node:
    """Shares as in a norm, and what was scaled by them is scaled back."""
    axes, dim = w.op.axes("self"), dim_of(w.op, w.op["dim"])
    wide = [d for d in range(len(axes)) if d != dim and w.wide(axes[d])]
    order = _order(w.op)
    if not wide or order in (0, math.inf):
        return w.copy()
    count = w.copies(axes, wide)
    y = w.copy(self=w.call(copies.root_share, w["self"], count, order))
    return w.call(copies.root_share, y, count, -order)


def _cross(op: Op) -> Signature:
    dim = dim_of(op, op["dim"])
    names = " ".join(f"d{k}" + "!" * (k == dim) for k in range(len(op.axes("self"))))
    return parse(f"{names}, {names} -> {names}")


def along(op: Op, why: str = "order along this axis is its result", keep: bool = True) -> Any:
    """An op whose result along some dimensions depends on positions; the result has the same
    axes, or, with ``keep=False``, fresh ones."""
    axes = list(op.axes("self"))
    for d in _dims(op) if axes else ():
        op.narrow(op["self"], d, why, out=d if keep else None)
        axes[d] = axes[d] if keep else op.fixed(op.out_shape[d], "positions")
    return alike(op, tuple(axes))


def _diff(op: Op) -> Any:
    if op["prepend"] is not None or op["append"] is not None:
        op.conflict("another tensor is joined to it")
    return along(op, keep=False)


def _quantile(op: Op) -> Axes:
    """One for every number of ``q``, first."""
    asked = op.axes("q") if isinstance(op["q"], fx.Node) else ()
    return (*asked, *reduce(op, _POSITION))


_POSITION = "positions along this axis are its result"
_SAME = sig("... -> ...")
TABLE: dict[Any, Rule] = rows(
    {
        "sum sum.dim_IntList nansum": Rule(_sum, _widen_sum),
        "mean mean.dim": Rule(_sum, _widen_mean),
        "logsumexp": Rule(_sum, _widen_logsumexp),
        "softmax.int _softmax": replace(_SAME, widen=_widen_softmax),
        "log_softmax.int _log_softmax": replace(_SAME, widen=partial(_widen_softmax, log=True)),
        "amax amin max min aminmax any any.dim any.dims all all.dim all.dims": Rule(reduce),
        "count_nonzero count_nonzero.dim_IntList": Rule(
            partial(reduce, narrow="copies would count")
        ),
        "linalg_vector_norm norm.ScalarOpt_dim norm.Scalar norm.ScalarOpt_dim_dtype": Rule(
            _norm, _widen_norm
        ),
        "var var.dim var.correction": _variance(root=False, mean=False),
        "std std.dim std.correction": _variance(root=True, mean=False),
        "var_mean var_mean.dim var_mean.correction": _variance(root=False, mean=True),
        "std_mean std_mean.dim std_mean.correction": _variance(root=True, mean=True),
        "prod prod.dim_int": Rule(partial(reduce, narrow="copies would multiply")),
        "argmax argmin max.dim min.dim median median.dim nanmedian nanmedian.dim mode "
        "kthvalue": Rule(partial(reduce, narrow=_POSITION)),
        "cumsum cumprod logcumsumexp argsort sort sort.stable cummax cummin flip roll": Rule(along),
        "quantile quantile.scalar nanquantile nanquantile.scalar": Rule(_quantile),
        "topk": Rule(partial(along, why=_POSITION, keep=False)),
        "diff": Rule(_diff),
        "renorm": replace(by(_renorm), widen=_widen_renorm),
        "linalg_cross": by(_cross),
        "cdist": _distance("... p d, ... r d -> ... p r", "x1 x2"),
        "pdist": _distance("n! d -> *s", "self"),
        "dist": _distance("..., ... ->", "self other"),
        "cosine_similarity": replace(by(_cosine), widen=_widen_cosine),
        "mse_loss huber_loss smooth_l1_loss soft_margin_loss": _loss("self target"),
        "binary_cross_entropy": _loss("self target weight"),
        "binary_cross_entropy_with_logits": _loss("self target weight pos_weight"),
    }
)

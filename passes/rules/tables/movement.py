"""Ops that move elements without changing them: a few lines of axis algebra each.

reshape   (2, 116, H, W) -> (2, 2, 58, H, W)     116 = 2 x 58
flatten   (B, C, 7, 7)   -> (B, C x 7 x 7)
cat       (B, 64), (B, 32) -> (B, 64 + 32)
slice     0:64 of 64 + 32 -> 64
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import fx

from ....algebra.axes import ONE, Axis, product, sum_
from ....calls.sizes import is_free
from ....errors import AxisConflict
from ....kernels import copies
from ...program import number, shape, size_hint, value
from ..op import Axes, Op, agree, broadcast, dim_of, memory_orders
from ..signature import rows, sig
from ..writer import Rule, Writer
from .reduction import along

aten = torch.ops.aten


# --------------------------------------------------------------------------- reshape
def _reshape(op: Op) -> Axes:
    """Block by block: the shortest runs of dimensions whose products match."""
    source, raw = [a for a in op.axes("self") if a.size != 1], value(op.node).shape
    ends = [list(accumulate(x, mul)) for x in ([a.size for a in source], op.out_shape)]
    common = {end for end in ends[0] if end in ends[1]}
    taken, made = ([sum(c <= end for c in common) for end in (1, *x[:-1])] for x in ends)
    result: list[Axis] = []
    for block in dict.fromkeys(made if raw else ()):
        axis = product(*(a for a, k in zip(source, taken, strict=False) if k == block))
        result += _split(op, axis, [s for s, k in zip(raw, made, strict=True) if k == block])
    return tuple(result)


def _split(op: Op, axis: Axis, raw: Sequence[Any]) -> list[Axis]:
    sizes = list(map(size_hint, raw))
    if sum(s != 1 for s in sizes) == 1:
        return [axis if s != 1 else ONE for s in sizes]
    if op.solver.is_fixed(axis):  # nothing to follow: do not tie 8 x 7 to 28 x 2
        return [op.fixed(s) for s in raw]
    parts = [op.free(s) for s in raw]
    op.unify(axis, product(*parts))
    return [op.solver.resolve(p) for p in parts]


def _reshape_as(op: Op) -> Axes:
    """To the shape of another tensor, whose axes the result has too."""
    return tuple(op.unify(a, b) for a, b in zip(_reshape(op), op.axes("other"), strict=True))


def _widen_reshape(w: Writer) -> fx.Node:
    axes = w.target.axes[w.op.node]
    given = w.op.args.get("size", w.op["shape"])
    return w.call(aten.reshape.default, w["self"], sizes_of(w, axes, given))


def sizes_of(w: Writer, axes: Axes, given: Sequence[Any]) -> list[Any]:
    """A list of sizes (-1 and 1 stay) at the teacher's width."""
    return [w.size(a, g) for a, g in zip(axes[len(axes) - len(given) :], given, strict=True)]


def widen_sized(w: Writer) -> fx.Node:
    """An op whose argument ``size`` is the shape of its result."""
    return w.copy(size=sizes_of(w, w.target.axes[w.op.node], w.op["size"]))


def _unflatten(w: Writer) -> fx.Node:
    dim, sizes = dim_of(w.op, w.op["dim"]), w.op["sizes"]
    axes = w.target.axes[w.op.node][dim : dim + len(sizes)]
    return w.copy(sizes=sizes_of(w, axes, sizes))


# --------------------------------------------------------------------------- permutations
def _view(op: Op) -> Axes:
    """Ops that order, drop or add dimensions: run on strides that number them."""
    axes = op.axes("self")
    probe = torch.empty_strided([a.size for a in axes], list(range(len(axes))), device="meta")
    view = op.node.target(**op.args | {"self": probe})  # type: ignore[operator]
    pairs = zip(view.shape, view.stride(), strict=True)
    return tuple(axes[stride] if size != 1 else ONE for size, stride in pairs)


def _reversed(op: Op) -> Axes:
    return op.axes("self")[::-1]


def _rot90(op: Op) -> Axes:
    axes = list(along(op, why="rotates positions"))
    i, j = (dim_of(op, d) for d in op["dims"])
    if op["k"] % 2 and axes[i].size != axes[j].size:
        axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


# --------------------------------------------------------------------------- expansion
def _expand(op: Op) -> Axes:
    raw = value(op.node).shape
    axes = (ONE,) * (len(raw) - len(op.axes("self"))) + op.axes("self")
    return tuple(op.free(s) if a.size == 1 else a for a, s in zip(axes, raw, strict=True))


def _repeat(op: Op) -> Axes:
    """``repeat(3)`` of an axis n is 3 x n; of a single element, what ``expand`` makes of it."""
    _, counts, axes = _counts(op)
    return tuple(
        op.free(size) if a.size == 1 else product(op.fixed(value(c), "repeated"), a)
        for a, c, size in zip(axes, counts, value(op.node).shape, strict=True)
    )


def _widen_repeat(w: Writer) -> fx.Node:
    name, counts, axes = _counts(w.op)
    sizes = sizes_of(w, w.target.axes[w.op.node], counts)
    chosen = zip(axes, sizes, counts, strict=True)
    return w.copy(**{name: [size if a.size == 1 else count for a, size, count in chosen]})


def _counts(op: Op) -> tuple[str, list[Any], Axes]:
    """The argument that says how often, and its counts beside the axes, one for every dimension of
    the result."""
    name = "repeats" if "repeats" in op.args else "dims"
    axes, counts = op.axes("self"), list(op[name])
    axes = (ONE,) * (len(counts) - len(axes)) + axes
    return name, [1] * (len(axes) - len(counts)) + counts, axes


def _repeat_interleave(op: Op) -> Axes:
    """``repeat_interleave(3)`` of an axis n is n x 3 (grouped-query attention)."""
    axes = op.axes("self")
    if op["dim"] is None:
        op.conflict("repeat_interleave flattens")
    dim = dim_of(op, op["dim"])
    times = op.fixed(number(op["repeats"]), "repeated")
    return _with(axes, dim, product(axes[dim], times))


def _widen_interleave(w: Writer) -> fx.Node:
    """The size that the result will have may be said beforehand, as the student's."""
    return w.copy(output_size=None)


# --------------------------------------------------------------------------- joining
def _with(axes: Axes, dim: int, *new: Axis) -> Axes:
    """The axes with another (or none) in place of one of them."""
    return (*axes[:dim], *new, *axes[dim + 1 :])


def _cat(op: Op) -> Axes:
    parts = [op.axes(p) for p in op["tensors"] if shape(p) != (0,)]
    dim = int(op["dim"]) % len(parts[0])
    joined = sum_(*(axes[dim] for axes in parts))
    return _with(broadcast(op, *(_with(axes, dim, ONE) for axes in parts)), dim, joined)


def _stack(op: Op) -> Axes:
    axes = list(broadcast(op, *(op.axes(p) for p in op["tensors"])))
    axes.insert(op["dim"] % (len(axes) + 1), op.fixed(len(op["tensors"]), "stacked"))
    return tuple(axes)


# --------------------------------------------------------------------------- cutting
def _pieces(op: Op, dim: int, sizes: Sequence[int]) -> list[Axes]:
    """Cut an axis into consecutive pieces; where it cannot be cut, see it narrowed."""
    axes = op.axes("self")
    if op.solver.is_fixed(axes[dim]):
        return [_with(axes, dim, op.fixed(s)) for s in sizes]
    parts: list[Axis] = []
    point = op.solver.checkpoint()
    try:
        rest = axes[dim]
        for size in sizes[:-1]:
            left, rest = op.solver.cut(rest, size)
            parts.append(left)
        parts.append(rest)
    except AxisConflict as conflict:
        op.solver.rollback(point)
        op.narrow(op["self"], dim, str(conflict), out=dim)
        parts = [op.free(s) for s in sizes]
    return [_with(axes, dim, p) for p in parts]


def _split_sizes(op: Op) -> list[Axes]:
    dim = dim_of(op, op["dim"])
    return _pieces(op, dim, [size_hint(v.shape[dim]) for v in value(op.node)])


def _widen_split(w: Writer) -> fx.Node:
    """Every way to cut becomes ``split_with_sizes`` at the teacher's sizes."""
    op = w.op
    dim = dim_of(op, op["dim"])
    if op.narrowed or not w.wide(op.axes("self")[dim]):
        return w.copy()
    sizes = [w.frozen(axes[dim]).teacher for axes in w.target.axes[op.node]]
    return w.call(aten.split_with_sizes.default, w["self"], sizes, dim)


def _slice(op: Op) -> Axes:
    axes, dim = op.axes("self"), dim_of(op, op["dim"])
    size, out = axes[dim].size, op.out_shape[dim]
    if out == size and op["step"] == 1:
        return axes
    if out == 0:  # nothing, whatever the width
        return _with(axes, dim, op.fixed(0))
    raw = value(op.node).shape[dim]
    if op.solver.is_fixed(axes[dim]) or op["step"] != 1 or _moving(op) or is_free(raw):
        op.hold(op["self"], dim, "a slice with a step, or to a computed size, takes positions")
        return _with(axes, dim, op.fixed(raw))
    return _piece(op, dim, out)


def _moving(op: Op) -> bool:
    return any(isinstance(op[bound], fx.Node) for bound in ("start", "end"))


def _piece(op: Op, dim: int, out: int) -> Axes:
    """``self[start : start + out]`` along an axis that may widen."""
    size = op.axes("self")[dim].size
    start = _start(op, size)
    used = [s for s in (start, out, size - start - out) if s]
    return _pieces(op, dim, used)[bool(start)]


def _start(op: Op, size: int) -> int:
    start = 0 if op["start"] is None else number(op["start"])
    return min(max(start + size if start < 0 else start, 0), size)


def _widen_slice(w: Writer, out: str = "") -> fx.Node:
    """``out``: the argument that is as long as the slice; by default it is the result."""
    op = w.op
    dim = dim_of(op, op["dim"])
    axis = op.axes("self")[dim]
    piece = (op.axes(out) if out else w.target.axes[op.node])[dim]
    if op.narrowed or not w.wide(axis):
        return w.copy()
    if axis.size == piece.size:  # -8: of eight
        return w.copy() if _moving(op) else w.copy(start=None, end=None)
    if piece.size == 0:
        return w.copy(start=0, end=0)
    start = _start(op, axis.size)
    left = w.frozen(op.solver.cut(axis, start)[0]).teacher if start else 0
    return w.copy(start=left, end=left + w.frozen(piece).teacher)


def _as_strided(op: Op) -> Axes:
    for d in range(len(op.axes("self"))):
        op.hold(op["self"], d, "positions in memory are taken")
    return tuple(op.fixed(s) for s in value(op.node).shape)


def _widen_as_strided(w: Writer) -> fx.Node:
    """Strides speak of the student's memory: the teacher's may be in another order."""
    return w.copy(self=w.call(copies.in_order, w["self"], memory_orders(w.op["self"])))


def _select(op: Op) -> Axes:
    axes, dim = op.axes("self"), dim_of(op, op["dim"])
    if axes[dim].size != 1:
        op.take(op["self"], dim, "one position of this axis is taken")
    return _with(axes, dim)


def _unbind(op: Op) -> list[Axes]:
    return [_select(op)] * len(value(op.node))


def _slice_scatter(op: Op) -> Axes:
    """``self`` with ``src`` written over a slice of it."""
    axes, source, dim = op.axes("self"), op.axes("src"), dim_of(op, op["dim"])
    piece = axes[dim] if axes[dim].size == source[dim].size else None
    if piece is None and op["step"] == 1 and not _moving(op) and not op.solver.is_fixed(axes[dim]):
        piece = _piece(op, dim, source[dim].size)[dim]
    if piece is None or op.narrowed:
        op.take(op["self"], dim, "a part of it is written over", out=dim)
        op.take(op["src"], dim, "it is written over a part of another")
    else:
        op.unify(piece, source[dim])
    return agree(op, source, dim)


def _select_scatter(op: Op) -> Axes:
    """``self`` with ``src`` written over one position of a dimension."""
    dim, source = dim_of(op, op["dim"]), op.axes("src")
    op.take(op["self"], dim, "one position of this axis is written over", out=dim)
    return agree(op, (*source[:dim], ONE, *source[dim:]), dim)


# --------------------------------------------------------------------------- diagonals
def _diagonal(op: Op) -> Axes:
    """Where both dimensions are one axis so is the diagonal: row and column of a copy are copies
    of one index."""
    axes, pair = op.axes("self"), [dim_of(op, op[d]) for d in ("dim1", "dim2")]
    rest = tuple(a for d, a in enumerate(axes) if d not in pair)
    a, b = (axes[d] for d in pair)
    if op["offset"] == 0 and a.size == b.size:
        return (*rest, op.unify(a, b))
    for d in pair:
        op.take(op["self"], d, "positions beside the diagonal are taken")
    return (*rest, op.fixed(value(op.node).shape[-1]))


def _diag_embed(op: Op) -> Axes:
    axes, rank = op.axes("self"), len(op.axes("self")) + 1
    places = {int(op[d]) % rank for d in ("dim1", "dim2")}
    op.take(op["self"], rank - 2, "what is not on the diagonal is zero")
    rest, raw = iter(axes[:-1]), value(op.node).shape
    if op["offset"]:
        return tuple(op.fixed(raw[d]) if d in places else next(rest) for d in range(rank))
    op.spread |= places if op.narrowed else set()
    return tuple(axes[-1] if d in places else next(rest) for d in range(rank))


# --------------------------------------------------------------------------- the others
def _as_complex(op: Op) -> Axes:
    """The last dimension is the real and the imaginary part."""
    op.take(op["self"], len(op.axes("self")) - 1, "real and imaginary parts")
    return op.axes("self")[:-1]


def _getitem(op: Op) -> Any:
    source, index = op.node.args
    return op.all_axes(source)[index]  # type: ignore[arg-type]


def _window(op: Op) -> Axes:
    """Tensor.unfold: sliding windows along one dimension, appended as the last."""
    axes, dim = op.axes("self"), dim_of(op, op["dimension"])
    op.narrow(op["self"], dim, "windows take positions")
    window = op.fixed(int(op["size"]), "kernel")
    return (*_with(axes, dim, op.fixed(op.out_shape[dim])), window)


def _windows(text: str) -> Rule:
    """``a`` x ``b``: the window, a list of two."""
    return sig(text, a="kernel_size.0", b="kernel_size.1")


TABLE: dict[Any, Rule] = {operator.getitem: Rule(_getitem)} | rows(
    {
        "view _unsafe_view reshape": Rule(_reshape, _widen_reshape),
        "view_as reshape_as": Rule(_reshape_as),
        "flatten.using_ints ravel": Rule(_reshape),
        "unflatten.int": Rule(_reshape, _unflatten),
        "permute transpose.int swapaxes swapdims movedim.int movedim.intlist squeeze squeeze.dim "
        "squeeze.dims unsqueeze": Rule(_view),
        "numpy_T": Rule(_reversed),
        "t matrix_H": "n -> n | m n -> n m",
        "rot90": Rule(_rot90),
        "expand broadcast_to": Rule(_expand, widen_sized),
        "expand_as": "..., ... -> ...",
        "repeat tile": Rule(_repeat, _widen_repeat),
        "repeat_interleave.self_int": Rule(_repeat_interleave, _widen_interleave),
        "cat concat": Rule(_cat),
        "stack": Rule(_stack),
        "split.Tensor split.sizes split_with_sizes chunk unsafe_split.Tensor "
        "unsafe_split_with_sizes tensor_split.sections tensor_split.indices": Rule(
            _split_sizes, _widen_split
        ),
        "slice.Tensor": Rule(_slice, _widen_slice),
        "slice_scatter": Rule(_slice_scatter, partial(_widen_slice, out="src")),
        "select.int": Rule(_select),
        "select_scatter": Rule(_select_scatter),
        "unbind.int": Rule(_unbind),
        "as_strided": Rule(_as_strided, _widen_as_strided),
        "unfold": Rule(_window),
        "diagonal": Rule(_diagonal),
        "diag_embed": Rule(_diag_embed),
        "view_as_real": "... -> ... two#stacked",
        "view_as_complex": Rule(_as_complex),
        "pixel_shuffle": sig(
            "... (c a#kernel b#kernel) *h *w -> ... c *y *x", a="upscale_factor", b="upscale_factor"
        ),
        "pixel_unshuffle": sig(
            "... c *h *w -> ... (c a#kernel b#kernel) *y *x",
            a="downscale_factor",
            b="downscale_factor",
        ),
        "channel_shuffle native_channel_shuffle": sig(
            "b (g#shuffled i) ... -> b (i g) ...", g="groups"
        ),
        "im2col": _windows("... c *h *w -> ... (c a#kernel b#kernel) *l"),
        "col2im": _windows("... (c a#kernel b#kernel) *l -> ... c *y *x"),
    }
)

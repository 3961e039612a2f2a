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
from typing import Any

import torch
from torch import fx

from ...algebra.axes import ONE, Axis, product, sum_
from ...calls.sizes import is_free
from ...errors import AxisConflict
from ...kernels import copies
from ..program import number, shape, size_hint, value
from .base import Axes, Op, Rule, Writer, broadcast, dim_of, dims_of, memory_order
from .reduction import along

aten = torch.ops.aten


# --------------------------------------------------------------------------- reshape
def reshape(op: Op, x: str = "self") -> Axes:
    """Block by block: the shortest runs of dimensions whose products match."""
    source = [a for a in op.axes(x) if a.size != 1]
    result: list[Axis] = []
    sizes = list(op.out_shape)
    raw = list(value(op.node).shape)
    k = 0
    while k < len(sizes):
        if sizes[k] == 1:
            result.append(ONE)
            k += 1
            continue
        block, start = [source.pop(0)], k
        have, want = block[0].size, sizes[k]
        k += 1
        while have != want:
            if have < want:
                block.append(source.pop(0))
                have *= block[-1].size
            else:
                want *= sizes[k]
                k += 1
        result += _split(op, product(*block), sizes[start:k], raw[start:k])
    return tuple(result)


def _split(op: Op, axis: Axis, sizes: Sequence[int], raw: Sequence[Any]) -> list[Axis]:
    if sum(s != 1 for s in sizes) == 1:
        return [axis if s != 1 else ONE for s in sizes]
    fixed = op.solver.is_fixed(axis)  # nothing to follow: do not tie 8 x 7 to 28 x 2
    parts = [op.fixed(s) if fixed else op.free(s) for s in sizes]
    for part, size in zip(parts, raw, strict=True):
        if is_free(size):
            op.solver.mark(op.solver.symbolic, part)
    if not fixed:
        op.unify(axis, product(*parts))
    return [op.solver.resolve(p) for p in parts]


def _reshape_as(op: Op) -> Axes:
    """To the shape of another tensor, whose axes the result has too."""
    result = reshape(op)
    return tuple(op.unify(a, b) for a, b in zip(result, op.axes("other"), strict=True))


def _widen_reshape(w: Writer, argument: str) -> fx.Node:
    axes = w.target.axes[w.op.node]
    given = w.op[argument]
    return w.call(aten.reshape.default, w["self"], sizes_of(w, axes, given))


def sizes_of(w: Writer, axes: Axes, given: Sequence[Any]) -> list[Any]:
    """A list of sizes (-1 and 1 stay) at the teacher's width."""
    rest = [w.size(a, g) for a, g in zip(axes[len(axes) - len(given) :], given, strict=True)]
    return rest


def _flatten(w: Writer) -> fx.Node:
    return w.copy()


def _unflatten(w: Writer) -> fx.Node:
    axes, dim = w.target.axes[w.op.node], dim_of(w.op, w.op["dim"])
    sizes = w.op["sizes"]
    new = [w.size(a, s) for a, s in zip(axes[dim : dim + len(sizes)], sizes, strict=True)]
    return w.copy(sizes=new)


# --------------------------------------------------------------------------- permutations
def _permute(op: Op) -> Axes:
    axes = op.axes("self")
    return tuple(axes[int(d)] for d in op["dims"])


def _transpose(op: Op, a: str = "dim0", b: str = "dim1") -> Axes:
    axes = list(op.axes("self"))
    i, j = dim_of(op, op[a]), dim_of(op, op[b])
    axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


def _movedim(op: Op) -> Axes:
    axes = op.axes("self")
    source, target = op["source"], op["destination"]
    source = [source] if isinstance(source, int) else source
    target = [target] if isinstance(target, int) else target
    place = {t % len(axes): s % len(axes) for s, t in zip(source, target, strict=True)}
    others = iter(d for d in range(len(axes)) if d not in place.values())
    return tuple(axes[place[d]] if d in place else axes[next(others)] for d in range(len(axes)))


def _reversed(op: Op) -> Axes:
    return op.axes("self")[::-1]


def _squeeze(op: Op) -> Axes:
    axes, dims = op.axes("self"), op.args.get("dim")
    gone = dims_of(op, dims) if "dim" in op.args else range(len(axes))
    return tuple(a for d, a in enumerate(axes) if not (d in gone and a.size == 1))


def _unsqueeze(op: Op) -> Axes:
    axes = list(op.axes("self"))
    axes.insert(op["dim"] % (len(axes) + 1), ONE)
    return tuple(axes)


# --------------------------------------------------------------------------- expansion
def _expand(op: Op) -> Axes:
    axes = op.axes("self")
    raw = value(op.node).shape
    new = len(raw) - len(axes)
    result = []
    for d, size in enumerate(op.out_shape):
        old = axes[d - new] if d >= new else ONE
        grown = op.free(size) if old.size == 1 else old
        if old.size == 1 and is_free(raw[d]):
            op.solver.mark(op.solver.symbolic, grown)
        result.append(grown)
    return tuple(result)


def _expand_as(op: Op) -> Axes:
    return broadcast(op, op.axes("self"), op.axes("other"))


def _repeat(op: Op) -> Axes:
    """``repeat(3)`` of an axis n is 3 x n."""
    axes = op.axes("self")
    counts = list(op["repeats"] if "repeats" in op.args else op["dims"])
    axes = (ONE,) * (len(counts) - len(axes)) + axes
    counts = [1] * (len(axes) - len(counts)) + counts
    raw = value(op.node).shape
    result = []
    for d, (a, c) in enumerate(zip(axes, counts, strict=True)):
        outer = op.fixed(number(c), "repeated") if number(c) != 1 else ONE
        if is_free(raw[d]) and isinstance(c, fx.Node):
            op.solver.mark(op.solver.symbolic, outer)
        result.append(product(outer, a))
    return tuple(result)


def _repeat_interleave(op: Op) -> Axes:
    """``repeat_interleave(3)`` of an axis n is n x 3 (grouped-query attention)."""
    axes = list(op.axes("self"))
    if op["dim"] is None:
        op.conflict("repeat_interleave flattens")
    dim = dim_of(op, op["dim"])
    axes[dim] = product(axes[dim], op.fixed(number(op["repeats"]), "repeated"))
    return tuple(axes)


# --------------------------------------------------------------------------- joining
def _cat(op: Op) -> Axes:
    parts = [p for p in op["tensors"] if shape(p) != (0,)]
    rows = [op.axes(p) for p in parts]
    dim = int(op["dim"]) % len(rows[0])
    joined = sum_(*(row[dim] for row in rows))
    others = broadcast(op, *(row[:dim] + (ONE,) + row[dim + 1 :] for row in rows))
    return others[:dim] + (joined,) + others[dim + 1 :]


def _stack(op: Op) -> Axes:
    axes = list(broadcast(op, *(op.axes(p) for p in op["tensors"])))
    dim = op["dim"] % (len(axes) + 1)
    axes.insert(dim, op.fixed(len(op["tensors"]), "stacked"))
    return tuple(axes)


# --------------------------------------------------------------------------- cutting
def _pieces(op: Op, dim: int, sizes: Sequence[int]) -> list[Axes]:
    """Cut an axis into consecutive pieces; where it cannot be cut, see it narrowed."""
    axes = op.axes("self")
    whole = op.solver.is_fixed(axes[dim])
    parts: list[Axis] = []
    point = op.solver.checkpoint()
    try:
        rest = axes[dim]
        for size in sizes[:-1] if not whole else []:
            left, rest = op.solver.cut(rest, size)
            parts.append(left)
        parts.append(rest)
    except AxisConflict as conflict:
        op.solver.rollback(point)
        op.narrow(op["self"], dim, str(conflict), out=dim)
        parts = [op.free(s) for s in sizes]
    if whole:
        parts = [op.fixed(s) for s in sizes]
    return [axes[:dim] + (p,) + axes[dim + 1 :] for p in parts]


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
        return (*axes[:dim], op.fixed(0), *axes[dim + 1 :])
    raw = value(op.node).shape[dim]
    moving = any(isinstance(op[bound], fx.Node) for bound in ("start", "end")) or is_free(raw)
    if op.solver.is_fixed(axes[dim]) or op["step"] != 1 or moving:
        op.hold(op["self"], dim, "a slice with a step, or to a computed size, takes positions")
        return axes[:dim] + (op.measured(raw),) + axes[dim + 1 :]
    return _piece(op, dim, out)


def _piece(op: Op, dim: int, out: int) -> Axes:
    """``self[start : start + out]`` along an axis that may widen."""
    size = op.axes("self")[dim].size
    start = _start(op, size)
    sizes = [start, out, size - start - out]
    used = [s for s in sizes if s]
    return _pieces(op, dim, used)[sum(s > 0 for s in sizes[:1])]


def _start(op: Op, size: int) -> int:
    start = 0 if op["start"] is None else number(op["start"])
    return min(max(start + size if start < 0 else start, 0), size)


def _widen_slice(w: Writer, out: str = "") -> fx.Node:
    """``out``: the argument that is as long as the slice; by default it is the result."""
    op = w.op
    dim = dim_of(op, op["dim"])
    axis = op.axes("self")[dim]
    piece = (op.axes(out) if out else w.target.axes[op.node])[dim]
    if op.narrowed or not w.wide(axis) or axis.size == piece.size:
        return w.copy()
    if piece.size == 0:
        return w.copy(start=0, end=0)
    start = _start(op, axis.size)
    left = w.frozen(op.solver.cut(axis, start)[0]).teacher if start else 0
    return w.copy(start=left, end=left + w.frozen(piece).teacher)


def _as_strided(op: Op) -> Axes:
    for d in range(len(op.axes("self"))):
        op.hold(op["self"], d, "positions in memory are taken")
    return tuple(op.measured(s) for s in value(op.node).shape)


def _widen_as_strided(w: Writer) -> fx.Node:
    """Strides speak of the student's memory: the teacher's may be in another order."""
    return w.copy(self=w.call(copies.in_order, w["self"], memory_order(w.op["self"])))


def _select(op: Op) -> Axes:
    axes, dim = op.axes("self"), dim_of(op, op["dim"])
    if axes[dim].size != 1:
        op.take(op["self"], dim, "one position of this axis is taken")
    return axes[:dim] + axes[dim + 1 :]


def _unbind(op: Op) -> list[Axes]:
    return [_select(op)] * len(value(op.node))


def _slice_scatter(op: Op) -> Axes:
    """``self`` with ``src`` written over a slice of it."""
    axes, source, dim = op.axes("self"), op.axes("src"), dim_of(op, op["dim"])
    piece = axes[dim] if axes[dim].size == source[dim].size else None
    moving = any(isinstance(op[bound], fx.Node) for bound in ("start", "end"))
    if piece is None and op["step"] == 1 and not moving and not op.solver.is_fixed(axes[dim]):
        piece = _piece(op, dim, source[dim].size)[dim]
    if piece is None or op.narrowed:
        op.take(op["self"], dim, "a part of it is written over", out=dim)
        op.take(op["src"], dim, "it is written over a part of another")
    else:
        op.unify(piece, source[dim])
    return _written(op, dim, source[:dim] + (ONE,) + source[dim + 1 :])


def _select_scatter(op: Op) -> Axes:
    """``self`` with ``src`` written over one position of a dimension."""
    dim, source = dim_of(op, op["dim"]), op.axes("src")
    op.take(op["self"], dim, "one position of this axis is written over", out=dim)
    return _written(op, dim, source[:dim] + (ONE,) + source[dim:])


def _written(op: Op, dim: int, source: Axes) -> Axes:
    for d, a in enumerate(op.axes("self")):
        if d != dim:
            op.unify(a, source[d])
    return op.axes("self")


def _as_real(op: Op) -> Axes:
    return (*op.axes("self"), op.fixed(2, "stacked"))


def _as_complex(op: Op) -> Axes:
    """The last dimension is the real and the imaginary part."""
    op.take(op["self"], len(op.axes("self")) - 1, "real and imaginary parts")
    return op.axes("self")[:-1]


def _getitem(op: Op) -> Any:
    source, index = op.node.args
    return op.all_axes(source)[index]  # type: ignore[arg-type]


# --------------------------------------------------------------------------- space and channels
def _pixel_shuffle(op: Op) -> Axes:
    """(C x r x r, H, W) -> (C, H r, W r)."""
    axes, r = op.axes("self"), int(op["upscale_factor"])
    channels = op.free(axes[-3].size // r**2)
    square = product(op.fixed(r, "kernel"), op.fixed(r, "kernel"))
    op.unify(axes[-3], product(channels, square))
    return (*axes[:-3], channels, *(op.fixed(s) for s in op.out_shape[-2:]))


def _pixel_unshuffle(op: Op) -> Axes:
    axes, r = op.axes("self"), int(op["downscale_factor"])
    channels = product(axes[-3], op.fixed(r, "kernel"), op.fixed(r, "kernel"))
    return (*axes[:-3], channels, *(op.fixed(s) for s in op.out_shape[-2:]))


def _channel_shuffle(op: Op) -> Axes:
    axes, groups = op.axes("self"), int(op["groups"])
    g, i = op.fixed(groups, "shuffled"), op.free(axes[1].size // groups)
    op.unify(axes[1], product(g, i))
    return (axes[0], product(i, g), *axes[2:])


def _unfold(op: Op) -> Axes:
    """im2col: (B, C, H, W) -> (B, C x kh x kw, L)."""
    x = op.axes("self")
    for d in (len(x) - 2, len(x) - 1):
        op.hold(op["self"], d, "windows take positions")
    window = product(*(op.fixed(int(k), "kernel") for k in op["kernel_size"]))
    return (*x[:-3], product(x[-3], window), op.fixed(op.out_shape[-1]))


def _fold(op: Op) -> Axes:
    """col2im: (B, C x kh x kw, L) -> (B, C, H, W)."""
    x = op.axes("self")
    op.hold(op["self"], len(x) - 1, "windows take positions")
    window = product(*(op.fixed(int(k), "kernel") for k in op["kernel_size"]))
    channels = op.free(x[-2].size // window.size)
    op.unify(x[-2], product(channels, window))
    return (*x[:-2], channels, *(op.fixed(s) for s in op.out_shape[-2:]))


def _window(op: Op) -> Axes:
    """Tensor.unfold: sliding windows along one dimension, appended as the last."""
    axes, dim = list(op.axes("self")), dim_of(op, op["dimension"])
    op.narrow(op["self"], dim, "windows take positions")
    axes[dim] = op.fixed(op.out_shape[dim])
    return (*axes, op.fixed(int(op["size"]), "kernel"))


_RESHAPE = Rule(reshape, partial(_widen_reshape, argument="size"))
_CHUNK = Rule(_split_sizes, _widen_split)


def _expand_widen(w: Writer) -> fx.Node:
    return w.copy(size=sizes_of(w, w.target.axes[w.op.node], w.op["size"]))


TABLE: dict[Any, Rule] = {
    aten.view.default: _RESHAPE,
    aten._unsafe_view.default: _RESHAPE,
    aten.reshape.default: Rule(reshape, partial(_widen_reshape, argument="shape")),
    aten.view_as.default: Rule(_reshape_as),
    aten.reshape_as.default: Rule(_reshape_as),
    aten.flatten.using_ints: Rule(reshape),
    aten.ravel.default: Rule(reshape),
    aten.unflatten.int: Rule(reshape, _unflatten),
    aten.permute.default: Rule(_permute),
    aten.transpose.int: Rule(_transpose),
    aten.as_strided.default: Rule(_as_strided, _widen_as_strided),
    aten.swapaxes.default: Rule(partial(_transpose, a="axis0", b="axis1")),
    aten.swapdims.default: Rule(_transpose),
    aten.movedim.int: Rule(_movedim),
    aten.movedim.intlist: Rule(_movedim),
    aten.t.default: Rule(_reversed),
    aten.matrix_H.default: Rule(_reversed),
    aten.numpy_T.default: Rule(_reversed),
    aten.squeeze.default: Rule(_squeeze),
    aten.squeeze.dim: Rule(_squeeze),
    aten.squeeze.dims: Rule(_squeeze),
    aten.unsqueeze.default: Rule(_unsqueeze),
    aten.expand.default: Rule(_expand, _expand_widen),
    aten.broadcast_to.default: Rule(_expand, _expand_widen),
    aten.expand_as.default: Rule(_expand_as),
    aten.repeat.default: Rule(_repeat),
    aten.tile.default: Rule(_repeat),
    aten.repeat_interleave.self_int: Rule(_repeat_interleave),
    aten.cat.default: Rule(_cat),
    aten.concat.default: Rule(_cat),
    aten.stack.default: Rule(_stack),
    aten.split.Tensor: _CHUNK,
    aten.split_with_sizes.default: _CHUNK,
    aten.split.sizes: _CHUNK,
    aten.chunk.default: _CHUNK,
    aten.tensor_split.sections: _CHUNK,
    aten.tensor_split.indices: _CHUNK,
    aten.slice.Tensor: Rule(_slice, _widen_slice),
    aten.slice_scatter.default: Rule(_slice_scatter, partial(_widen_slice, out="src")),
    aten.select.int: Rule(_select),
    aten.select_scatter.default: Rule(_select_scatter),
    aten.unbind.int: Rule(_unbind),
    operator.getitem: Rule(_getitem),
    aten.pixel_shuffle.default: Rule(_pixel_shuffle),
    aten.pixel_unshuffle.default: Rule(_pixel_unshuffle),
    aten.channel_shuffle.default: Rule(_channel_shuffle),
    aten.native_channel_shuffle.default: Rule(_channel_shuffle),
    aten.im2col.default: Rule(_unfold),
    aten.col2im.default: Rule(_fold),
    aten.unfold.default: Rule(_window),
    aten.view_as_real.default: Rule(_as_real),
    aten.view_as_complex.default: Rule(_as_complex),
    aten.rot90.default: Rule(partial(along, why="rotates positions", dim="dims")),
}

"""Ops that look things up: what is indexed never widens, what is found may."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ....algebra.axes import ONE
from ...program import is_tensor, shape, value
from ..op import Axes, Op, agree, broadcast, dim_of, outputs
from ..signature import rows, sig
from ..writer import Rule


def _is_mask(index: fx.Node) -> bool:
    return bool(value(index).dtype == torch.bool)


def _indices(op: Op) -> dict[int, fx.Node]:
    """Dimension -> the tensor that indexes it; a mask indexes as many as it has."""
    found: dict[int, fx.Node] = {}
    at = 0
    for index in op["indices"]:
        count = len(op.axes(index)) if index is not None and _is_mask(index) else 1
        if index is not None:
            found |= dict.fromkeys(range(at, at + count), index)
        at += count
    for index in filter(_is_mask, dict.fromkeys(found.values())):
        for d in range(len(op.axes(index))):
            op.hold(index, d, "a boolean index keeps positions")
    return found


def _index(op: Op) -> Axes:
    indices = _indices(op)
    for d in indices:
        op.hold(op["self"], d, "it is indexed")
    return _found(op, indices, outputs(op.node)[0].shape)[0]


def _found(op: Op, indices: dict[int, fx.Node], sizes: Sequence[Any] = ()) -> tuple[Axes, int, int]:
    """The axes of ``self[indices]``: indexed dimensions are replaced by the broadcast index, in
    place if adjacent, else first. Also where that begins, and how many dimensions it has. A mask
    gives one, as long as the result (``sizes``) says."""
    used = list(indices)
    adjacent = used == list(range(used[0], used[-1] + 1))
    at = used[0] if adjacent else 0
    rest = [a for d, a in enumerate(op.axes("self")) if d not in indices]
    picked = op.fixed(sizes[at + len(sizes) - len(rest) - 1]) if sizes else ONE
    each = dict.fromkeys(indices.values())
    found = broadcast(op, *((picked,) if _is_mask(x) else op.axes(x) for x in each))
    return (*rest[:at], *found, *rest[at:]), at, len(found)


def _index_select(op: Op) -> Axes:
    axes, dim = list(op.axes("self")), dim_of(op, op["dim"])
    op.hold(op["self"], dim, "it is indexed")
    axes[dim] = op.axes("index")[0] if shape(op["index"]) else op.fixed(1)
    return tuple(axes)


def _gather(op: Op) -> Axes:
    """Along ``dim`` positions are taken; the other dimensions of input and index agree."""
    dim = dim_of(op, op["dim"])
    op.hold(op["self"], dim, "it is indexed")
    agree(op, op.axes("index"), dim, "gather takes a part of an axis")
    return op.axes("index")


def _embedding_bag(op: Op) -> list[Axes]:
    """Sums, means or largest of rows; then which rows, by bag."""
    weight = op.axes("weight")
    op.fix(weight[0], "lookup")
    for name in ("indices", "offsets", "per_sample_weights"):
        for d in range(len(op.axes(name)) if op[name] is not None else 0):
            op.hold(op[name], d, "bags are stretches of it")
    bags, *others = outputs(op.node)
    result = (op.fixed(bags.shape[0]), weight[1])
    return [result] + [result if v.ndim == 2 else tuple(map(op.fixed, v.shape)) for v in others]


def _scatter(op: Op, operands: tuple[str, ...]) -> Axes:
    """Positions along ``dim`` are written; the other dimensions of all operands agree."""
    dim = dim_of(op, op["dim"])
    for name in operands:
        if is_tensor(op[name]):
            op.take(op[name], dim, "positions along it are written", out=dim)
            agree(op, op.axes(name), dim, "scatter takes a part")
    return op.axes("self")


def _index_slices(op: Op) -> Axes:
    """As ``_scatter``, by an index of one dimension."""
    for d in range(len(op.axes("index"))):
        op.hold(op["index"], d, "it says which positions are written")
    return _scatter(op, ("self", "source"))


def _index_put(op: Op) -> Axes:
    """Indexed dimensions are written at positions; what is written broadcasts over the rest. One
    number where a mask of the leading dimensions holds is a choice, element by element."""
    mask, *others = op["indices"]
    if mask is not None and _is_mask(mask) and not (others or op.axes("values")):
        rest = len(op.axes("self")) - len(op.axes(mask))
        return broadcast(op, op.axes("self"), (*op.axes(mask), *[ONE] * rest))
    indices = _indices(op)
    for d in indices:
        op.take(op["self"], d, "it is indexed", out=d)
    result, at, count = _found(op, indices)
    broadcast(op, result, op.axes("values"))
    missing = len(result) - len(op.axes("values"))
    written = {index: range(len(op.axes(index))) for index in indices.values()}
    written[op["values"]] = range(max(at - missing, 0), max(at + count - missing, 0))
    for x, dims in written.items():
        for d in dims:
            op.hold(x, d, "it is written to positions")
    return op.axes("self")


TABLE: dict[Any, Rule] = rows(
    {
        "embedding": "v! d, ... -> ... d",
        "embedding_bag embedding_bag.padding_idx": Rule(_embedding_bag),
        "index.Tensor": Rule(_index),
        "index_select": Rule(_index_select),
        "gather": Rule(_gather),
        "scatter.src scatter.value scatter.reduce scatter.value_reduce scatter_add "
        "scatter_reduce.two": Rule(partial(_scatter, operands=("self", "index", "src"))),
        "index_add index_copy index_reduce index_fill.int_Scalar index_fill.int_Tensor": Rule(
            _index_slices
        ),
        "index_put": Rule(_index_put),
        "take": "*s, ... -> ...",
        "bucketize.Tensor": "..., v! -> ...",
        "searchsorted.Tensor": sig(
            "v!, ..., v!? -> ... | ... v!, ... q, ... v!? -> ... q", "sorted_sequence self sorter"
        ),
        "isin.Tensor_Tensor": "..., *t -> ...",
        "isin.Tensor_Scalar": "... -> ...",
    }
)

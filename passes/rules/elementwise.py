"""The rule of a user's function that treats elements alike along some dimensions."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from torch import fx

from ..program import is_tensor, size_hint, value
from .op import Axes, Op, broadcast
from .writer import Rule


def elementwise(moving: Collection[int]) -> Rule:
    """Operands broadcast, results have the broadcast shape (any other one stays). Along dimensions
    other than the ``moving``, counted from the right, the function sees the student's width."""
    return Rule(partial(_infer, moving))


def _infer(moving: Collection[int], op: Op) -> list[Axes]:
    given = [x for x in op.node.args if isinstance(x, fx.Node) and is_tensor(x)]
    result = broadcast(op, *map(op.axes, given))
    rank, sizes = len(result), [axis.size for axis in result]
    for x in given:
        for d, axis in enumerate(op.axes(x)):
            right = len(op.axes(x)) - 1 - d
            if right not in moving and axis.size != 1:
                op.hold(x, d, "indices along it are not alike to it", rank - 1 - right)
    return [
        result if list(map(size_hint, y.shape)) == sizes else tuple(map(op.fixed, y.shape))
        for y in value(op.node)
    ]

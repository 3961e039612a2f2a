"""The view that a rule gets of a node to say how its output axes follow from its input axes."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx

from ...algebra.axes import ONE, Axis
from ...algebra.solver import Reason, Solver
from ...calls.sizes import is_free
from ...errors import AxisConflict
from ..program import DOUBLE, ORDER, bind, describe, memory_order, shape, size_hint, value

aten = torch.ops.aten
Axes = tuple[Axis, ...]
"""One axis per dimension of a tensor. Ops with several outputs have a list of them."""


def parts(axes: Any) -> list[Axes]:
    """The outputs of an op, one or several, as a list of axes."""
    return axes if isinstance(axes, list) else [axes]


def outputs(node: fx.Node) -> list[Any]:
    """The values of an op's outputs, one or several."""
    values = value(node)
    return list(values) if isinstance(values, tuple | list) else [values]


class Op:
    """One node as ``infer`` sees it.

    ``args``: arguments by schema name. ``env``: axes that ``widen`` will need, by name.
    ``rule``: its row of the table, if it has one.
    ``narrowed``: (input node, dimension) pairs along which the op must see the student's width.
    ``renewed``: inputs whose axes conflict: narrowed, then spread along these fresh axes instead.
    """

    def __init__(
        self,
        node: fx.Node,
        solver: Solver,
        axes: dict[fx.Node, Any],
        static: dict[fx.Node, bool],
        rule: Any = None,
    ) -> None:
        self.node, self.solver, self.rule = node, solver, rule
        self._axes, self._static = axes, static
        has_schema = hasattr(node.target, "_schema")
        self.args: dict[str, Any] = bind(node) if has_schema else {}
        self.reset({}, "")

    def reset(self, renewed: dict[fx.Node, Axes], why: str) -> None:
        """Begin to infer, some inputs seen through fresh axes."""
        self.env: dict[str, Axis] = {}
        self.match: Any = None  # of a signature
        self.renewed = renewed
        self.narrowed: set[tuple[fx.Node, int]] = set()
        self.spread: set[int] = set()  # output dimensions that come out at the student's width
        self.why = why

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def axes(self, x: str | fx.Node) -> Axes:
        """The axes of a tensor argument, refined as far as known."""
        node = self.args[x] if isinstance(x, str) else x
        axes = self.renewed[node] if node in self.renewed else self._axes[node]
        return tuple(self.solver.resolve(a) for a in axes)

    def all_axes(self, x: str | fx.Node) -> Any:
        """As ``axes``, for an input that may be a list of tensors."""
        return self._axes[self.args[x] if isinstance(x, str) else x]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the (first) output."""
        return shape(outputs(self.node)[0])

    @property
    def where(self) -> str:
        return describe(self.node)

    def is_static(self, x: fx.Node) -> bool:
        """True if a tensor depends on parameters and constants only."""
        return x in self._static

    def is_constant(self, x: fx.Node) -> bool:
        """True if a tensor depends on constants only."""
        return self._static.get(x) is False

    def free(self, raw: Any) -> Axis:
        """A fresh axis, free to widen, of a size that may be known at run time only."""
        axis = self.solver.leaf(size_hint(raw))
        if is_free(raw):
            self.solver.mark(self.solver.symbolic, axis)
        return axis

    def fixed(self, raw: Any, kind: str = "spatial") -> Axis:
        """As ``free``, but it does not widen."""
        axis = self.free(raw)
        self.fix(axis, kind)
        return axis

    def fix(self, axis: Axis, kind: str) -> None:
        self.solver.fix(axis, Reason(kind, self.where))

    def unify(self, a: Axis, b: Axis) -> Axis:
        return self.solver.unify(a, b)

    def conflict(self, message: str) -> NoReturn:
        raise AxisConflict(message)

    def hold(self, x: fx.Node, dim: int, why: str, out: int | None = None) -> bool:
        """``narrow`` if the axis might widen at all; says whether it might. An axis of a tensor
        that only parameters make (a table of positions) is fixed instead."""
        if self.is_static(x):
            self.fix(self.axes(x)[dim], "lookup")
        if self.solver.is_fixed(self.axes(x)[dim]):
            return False
        self.narrow(x, dim, why, out)
        return True

    def take(self, x: fx.Node, dim: int, why: str, out: int | None = None) -> None:
        """``hold`` for ops that weights go through too (one of several packed ones is taken): only
        an axis of constants is fixed."""
        if self.is_constant(x):
            self.fix(self.axes(x)[dim], "positions")
        elif not self.solver.is_fixed(self.axes(x)[dim]):
            self.narrow(x, dim, why, out)

    def narrow(self, x: fx.Node, dim: int, why: str, out: int | None = None) -> None:
        """See this dimension of an input at the student's width: positions matter to the op.
        ``out``: the output dimension that therefore is student-wide and is spread again."""
        self.narrowed.add((x, dim))
        self.spread |= set() if out is None else {out}
        self.solver.mark(self.solver.inner, self.axes(x)[dim], Reason("positions", self.where))
        self.why = why


def dim_of(op: Op, dim: Any, x: str = "self") -> int:
    """A dimension argument as a non-negative number."""
    rank = len(op.axes(x))
    return int(dim) % rank if rank else 0


def dims_of(op: Op, dims: Any, x: str = "self") -> list[int]:
    """A list of dimensions, all of them where none (or an empty list) is given."""
    rank = len(op.axes(x))
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(dim_of(op, d, x) for d in ([dims] if isinstance(dims, int) else dims))


def agree(op: Op, axes: Axes, dim: int, why: str = "") -> Axes:
    """The axes of ``self``, which are those of another operand but for ``dim``."""
    for d, (a, b) in enumerate(zip(op.axes("self"), axes, strict=True)):
        if d != dim:
            op.unify(a, b) if a.size == b.size else op.conflict(why)
    return op.axes("self")


def memory_orders(x: fx.Node) -> list[list[int]]:
    """The dimensions of the student's tensor from the largest stride to the smallest; a second time
    for a student in float64, if it lays out memory in another way."""
    own = x.meta.get(ORDER) or memory_order(value(x))
    double = x.meta.get(DOUBLE, own)
    return [own] if double == own else [own, double]


def broadcast(op: Op, *operands: Axes) -> Axes:
    """The axes of a broadcast result: sizes of one stretch, all others unify."""
    rank = max(map(len, operands), default=0)
    padded = [(ONE,) * (rank - len(axes)) + tuple(axes) for axes in operands]
    result: list[Axis] = []
    for column in zip(*padded, strict=True):
        axis: Axis = ONE
        for a in column:
            if a.size != 1:
                axis = op.unify(axis, a) if axis.size != 1 else a
        result.append(axis)
    return tuple(result)

"""What a rule is, and the two views it gets of a node: ``Op`` to infer, ``Writer`` to widen.

A rule says how an op's output axes follow from its input axes (``infer``), and how the teacher's
node is written once widths are known (``widen``; most ops are copied as they are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx

from ...algebra.axes import ONE, Axis, Product
from ...algebra.frozen import Frozen
from ...algebra.solver import Reason, Solver
from ...calls.sizes import is_free
from ...errors import AxisConflict
from ...kernels import copies
from ..program import bind, describe, module_path, shape, size_hint, value

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
    ``narrowed``: (input node, dimension) pairs along which the op must see the student's width.
    ``renewed``: inputs whose axes conflict: narrowed, then spread along these fresh axes instead.
    """

    def __init__(
        self, node: fx.Node, solver: Solver, axes: dict[fx.Node, Any], static: dict[fx.Node, bool]
    ) -> None:
        self.node, self.solver, self._axes, self._static = node, solver, axes, static
        has_schema = hasattr(node.target, "_schema")
        self.args: dict[str, Any] = bind(node) if has_schema else {}
        self.reset({}, "")

    def reset(self, renewed: dict[fx.Node, Axes], why: str) -> None:
        """Begin to infer, some inputs seen through fresh axes."""
        self.env: dict[str, Axis] = {}
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

    def fixed(self, size: int, kind: str = "spatial") -> Axis:
        return self.solver.leaf(size, Reason(kind, self.where))

    def measured(self, raw: Any) -> Axis:
        """A fixed axis of a size that may be known at run time only."""
        axis = self.fixed(size_hint(raw))
        if is_free(raw):
            self.solver.mark(self.solver.symbolic, axis)
        return axis

    def made(self, raw: Any) -> Axis:
        """As ``measured``, but free to widen."""
        axis = self.free(size_hint(raw))
        if is_free(raw):
            self.solver.mark(self.solver.symbolic, axis)
        return axis

    def free(self, size: int) -> Axis:
        return self.solver.leaf(size)

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


def memory_order(x: fx.Node) -> list[int]:
    """The dimensions of the student's tensor from the largest stride to the smallest."""
    strides = [size_hint(s) for s in value(x).stride()]
    return sorted(range(len(strides)), key=lambda d: (-strides[d], d))


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


class Writer:
    """Writes the teacher's node for one op. ``self[name]`` is the teacher's argument."""

    def __init__(self, op: Op, target: Target, mode: str, env: dict[fx.Node, Any]) -> None:
        self.op, self.target, self.mode, self._env = op, target, mode, env
        self.graph: fx.Graph = target.graphs[mode]

    def __getitem__(self, name: str) -> Any:
        return self.map(self.op.args.get(name))

    def map(self, x: Any) -> Any:
        return fx.node.map_arg(x, lambda n: self._env[n])

    def frozen(self, axis: Axis) -> Frozen:
        return self.target.frozen(axis)

    def wide(self, axis: Axis) -> bool:
        return self.frozen(axis).wide

    # ---- nodes
    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(function, args, kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self.op.node.meta:
                node.meta[key] = self.op.node.meta[key]
        return node

    def copy(self, /, **changes: Any) -> fx.Node:
        """The op itself on the teacher's tensors, some arguments replaced (by schema name)."""
        node = self.op.node
        if not changes:
            return self.call(node.target, *self.map(node.args), **self.map(node.kwargs))  # type: ignore[arg-type]
        return self.recall(node.target, **changes)

    def recall(self, function: Any, /, **changes: Any) -> fx.Node:
        """Call an overload with this op's arguments, some replaced; defaults are left out."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for a in function._schema.arguments:
            given = changes.get(a.name, self.map(self.op.args.get(a.name, a.default_value)))
            if a.kwarg_only:
                if given is not None and given != a.default_value:
                    keyword[a.name] = given
            else:
                positional.append(given)
        return self.call(function, *positional, **keyword)

    def size(self, axis: Axis, given: Any) -> Any:
        """An integer argument that states the size of an axis, at the teacher's width."""
        frozen = self.frozen(axis)
        if not frozen.wide or (isinstance(given, int) and given == -1):
            return self.map(given)
        if not isinstance(given, fx.Node):
            return frozen.teacher
        common = int(np.gcd(frozen.teacher, frozen.student))
        whole = self.call(_mul, self.map(given), frozen.teacher // common)
        return self.call(_floordiv, whole, frozen.student // common)

    def constant(self, array: np.ndarray) -> fx.Node:
        """A non-persistent integer buffer: an index map, numbers of copies."""
        return self.target.constant(self.mode, array)

    # ---- copies
    def spread(self, x: fx.Node, axes: Axes, dims: Sequence[int] | None = None) -> fx.Node:
        """Widen a student-wide tensor along ``dims`` (all that are wide)."""
        return self._along(x, axes, dims, self._spread)

    def narrow(self, x: fx.Node, axes: Axes, dims: Sequence[int] | None = None) -> fx.Node:
        """Merge the copies of a teacher-wide tensor along ``dims``."""
        return self._along(x, axes, dims, self._narrow)

    def _spread(self, x: fx.Node, dim: int, frozen: Frozen) -> fx.Node:
        return self.call(copies.spread, x, dim, self.constant(frozen.map))

    def _narrow(self, x: fx.Node, dim: int, frozen: Frozen) -> fx.Node:
        rest = np.setdiff1d(np.arange(frozen.teacher), frozen.first)
        arrays = frozen.first, rest, frozen.map[rest], frozen.copies[frozen.map[rest]]
        return self.call(copies.narrow, x, dim, *map(self.constant, arrays))

    def _along(
        self, x: fx.Node, axes: Axes, dims: Sequence[int] | None, step: Callable[..., fx.Node]
    ) -> fx.Node:
        for d in range(len(axes)) if dims is None else dims:
            if self.wide(axes[d]):
                split, core = self.split(axes[d], step == self._narrow)
                if len(split) > 1:
                    x = self.call(aten.unflatten.int, x, d, split)
                    x = step(x, d + 1, self.frozen(core))
                    x = self.call(aten.flatten.using_ints, x, d, d + 2)
                else:
                    x = step(x, d, self.frozen(core))
        return x

    def split(self, axis: Axis, teacher: bool) -> tuple[list[int], Axis]:
        """Sizes ``[outer, core, inner]`` and the one wide factor of a product whose size is only
        known at run time; else the axis itself."""
        solver = self.op.solver
        axis = solver.resolve(axis)
        if not solver.is_symbolic(axis):
            return [axis.size], axis
        wide = [f for f in axis.factors if self.wide(f)] if isinstance(axis, Product) else []
        if len(wide) == 1 and isinstance(axis, Product):
            k = axis.factors.index(wide[0])
            sizes = []
            for part in (axis.factors[:k], axis.factors[k + 1 :]):
                unknown = any(map(solver.is_symbolic, part))
                sizes.append(-1 if unknown else int(np.prod([f.size for f in part], dtype=int)))
            frozen = self.frozen(wide[0])
            if sizes.count(-1) == 1:
                core = frozen.teacher if teacher else frozen.student
                return [sizes[0], core, sizes[1]], wide[0]
        raise DynamicAxis(f"{axis} widens and has a size known only at run time")

    def static(self, axis: Axis) -> Frozen:
        """The frozen axis; raises ``DynamicAxis`` if its maps would depend on the batch size."""
        if self.op.solver.is_symbolic(axis):
            raise DynamicAxis(f"{axis} has a size known only at run time")
        return self.frozen(axis)

    def copies(self, axes: Axes, dims: Sequence[int]) -> fx.Node:
        """How many copies each index has, over some dimensions of a tensor; broadcasts with it."""
        count = np.ones((1,) * len(axes), dtype=np.int64)
        for d in dims:
            if self.wide(axes[d]):
                frozen = self.static(axes[d])
                count = count * frozen.copies[frozen.map].reshape(-1, *(1,) * (len(axes) - d - 1))
        return self.constant(count)

    def uneven(self, axes: Axes, dims: Sequence[int]) -> bool:
        """True if some dimension has students with different numbers of copies."""
        return any(not self.frozen(axes[d]).even for d in dims)

    def gain(self, axes: Axes, dims: Sequence[int]) -> float:
        """Teacher indices per student index, over some dimensions together."""
        frozen = [self.frozen(axes[d]) for d in dims]
        return float(np.prod([f.teacher / f.student for f in frozen if f.wide]))


class DynamicAxis(AxisConflict):
    """A map would depend on the batch size: the network is captured again with a fixed batch."""


def student_size(size: int, student: int, teacher: int) -> int:
    """The student's number of indices, from the teacher's at run time."""
    return size * student // teacher


def student_sizes(w: Writer, x: fx.Node, axes: Axes, raw: Sequence[Any]) -> list[Any]:
    """The student's sizes of a teacher's tensor, read at run time where they are free."""
    sizes: list[Any] = []
    for d, axis in enumerate(axes):
        size = w.call(aten.sym_size.int, x, d) if is_free(raw[d]) else axis.size
        if isinstance(size, fx.Node) and w.wide(axis):
            size = w.call(student_size, size, w.frozen(axis).student, w.frozen(axis).teacher)
        sizes.append(size)
    return sizes


def _mul(a: int, b: int) -> int:
    return a * b


def _floordiv(a: int, b: int) -> int:
    return a // b


@dataclass
class Target:
    """The teacher under construction: graphs, tensors, and the widths behind ``frozen``."""

    graphs: dict[str, fx.Graph]
    axes: dict[fx.Node, Any]
    frozen: Callable[[Axis], Frozen]
    draw: Callable[[str], np.random.Generator | None]
    independent: bool = False
    anchors: dict[str, fx.Node] = field(default_factory=dict)  # where each graph's constants go
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    shares: dict[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    prefix: str = "_shares"
    _names: dict[Any, str] = field(default_factory=dict)
    _uses: dict[Any, int] = field(default_factory=dict)
    _layouts: dict[str, list[Any]] = field(default_factory=dict)
    _nodes: dict[tuple[str, str], fx.Node] = field(default_factory=dict)

    def attribute(self, mode: str, name: str) -> fx.Node:
        """The one ``get_attr`` node of a tensor, at the head of its graph."""
        if (mode, name) not in self._nodes:
            with self.graphs[mode].inserting_before(self.anchors[mode]):
                self._nodes[mode, name] = self.graphs[mode].get_attr(name)
        return self._nodes[mode, name]

    def constant(self, mode: str, array: np.ndarray) -> fx.Node:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            name = self._names[key] = f"_maps_{len(self.constants)}"
            self.constants[name] = torch.from_numpy(np.array(array)).to(self.device)
        return self.attribute(mode, self._names[key])

    def share_key(self, mode: str, operand: fx.Node, op: fx.Node, layout: Any) -> str:
        """The name of a use's shares: by the weight that contracts (its uses agree), else by the
        user's module; the same in both modes."""
        if operand.op == "get_attr":
            base = f"{self.prefix}.{operand.target}"
            known = self._layouts.setdefault(base, [])
            known += [] if layout in known else [layout]
            k = known.index(layout)
        else:
            path = module_path(op).split(" ")[0].replace("(root)", "")
            base = ".".join(x for x in (self.prefix, path, f"at_{op.target._opname}") if x)  # type: ignore[union-attr]
            k = self._uses[mode, base] = self._uses.get((mode, base), -1) + 1
        return f"{base}_{k}" if k else base

    def share(self, mode: str, key: str, table: Callable[[Any], np.ndarray]) -> fx.Node:
        if key not in self.shares:
            tensor = torch.from_numpy(table(self.draw(key)))
            floating = tensor.is_floating_point()
            self.shares[key] = tensor.to(self.device, self.dtype if floating else None)
        return self.attribute(mode, key)


def copy_op(w: Writer) -> fx.Node:
    """Most ops: the same call on the teacher's tensors."""
    return w.copy()


@dataclass(frozen=True)
class Rule:
    """How one op treats axes. ``widen`` returns the teacher's node; ``text``: the signature from
    which the axes follow, if there is one."""

    infer: Callable[[Op], Any]
    widen: Callable[[Writer], Any] = copy_op
    text: str = ""

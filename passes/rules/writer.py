"""What a rule is, and the view that it gets of a node to write the teacher's: ``Writer``.

A rule says how an op's output axes follow from its input axes (``infer``, by an ``Op``), and how
the teacher's node is written once widths are known (``widen``; most ops are copied as they are).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from ...algebra.axes import Axis, Product
from ...algebra.frozen import Frozen
from ...calls.sizes import is_free
from ...errors import AxisConflict
from ...kernels import copies
from ...torch_private import op_name
from ..program import origin
from .op import Axes, Op

aten = torch.ops.aten


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
        """The op itself on the teacher's tensors, some arguments replaced (by schema name);
        defaults are left out then."""
        target: Any = self.op.node.target
        if not changes:
            return self.call(target, *self.map(self.op.node.args), **self.map(self.op.node.kwargs))
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for a in target._schema.arguments:
            given = changes.get(a.name, self[a.name])
            if not a.kwarg_only:
                positional.append(given)
            elif given is not None and given != a.default_value:
                keyword[a.name] = given
        return self.call(target, *positional, **keyword)

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
        return self._along(x, axes, dims, copies.spread)

    def narrow(self, x: fx.Node, axes: Axes, dims: Sequence[int] | None = None) -> fx.Node:
        """Merge the copies of a teacher-wide tensor along ``dims``."""
        return self._along(x, axes, dims, copies.narrow)

    def _along(
        self, x: fx.Node, axes: Axes, dims: Sequence[int] | None, step: Callable[..., Any]
    ) -> fx.Node:
        for d in range(len(axes)) if dims is None else dims:
            if self.wide(axes[d]):
                split, core = self.split(axes[d], step is copies.narrow)
                apart = len(split) > 1
                x = self.call(aten.unflatten.int, x, d, split) if apart else x
                frozen = self.frozen(core)
                maps = frozen.merging.values() if step is copies.narrow else [frozen.map]
                x = self.call(step, x, d + apart, *map(self.constant, maps))
                x = self.call(aten.flatten.using_ints, x, d, d + 2) if apart else x
        return x

    def split(self, axis: Axis, teacher: bool) -> tuple[list[int], Axis]:
        """Sizes ``[outer, core, inner]`` and the one wide factor of a product whose size is only
        known at run time; else the axis itself."""
        solver = self.op.solver
        axis = solver.resolve(axis)
        if not solver.is_symbolic(axis):
            return [axis.size], axis
        factors = axis.factors if isinstance(axis, Product) else ()
        wide = [k for k, factor in enumerate(factors) if self.wide(factor)]
        if len(wide) == 1:
            k, core = wide[0], self.frozen(factors[wide[0]])
            outer, inner = (
                -1 if any(map(solver.is_symbolic, part)) else math.prod(f.size for f in part)
                for part in (factors[:k], factors[k + 1 :])
            )
            if (outer, inner).count(-1) == 1:
                return [outer, core.teacher if teacher else core.student, inner], factors[k]
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
            path = origin(op).path
            base = ".".join(x for x in (self.prefix, path, f"at_{op_name(op.target)}") if x)
            k = self._uses[mode, base] = self._uses.get((mode, base), -1) + 1
        return f"{base}_{k}" if k else base

    def share(self, mode: str, key: str, table: Callable[[Any], np.ndarray]) -> fx.Node:
        if key not in self.shares:
            tensor = torch.from_numpy(table(self.draw(key)))
            floating = tensor.is_floating_point()
            self.shares[key] = tensor.to(self.device, self.dtype if floating else None)
        return self.attribute(mode, key)


@dataclass(frozen=True)
class Rule:
    """How one op treats axes. ``widen`` returns the teacher's node; ``text``: the signature from
    which the axes follow, if there is one."""

    infer: Callable[[Op], Any]
    widen: Callable[[Writer], Any] = Writer.copy
    text: str = ""

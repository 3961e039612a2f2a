"""Infer axes: one axis per dimension of every tensor, over both graphs together.

Each op's rule is one transaction. Where it has no rule, or its rule meets a conflict, the op is
marked for a bridge: its inputs will be seen at the student's width, its outputs get fresh axes.
Conflicts resolve in graph order, so the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..algebra.axes import Axis, leaves
from ..algebra.solver import Reason, Solver
from ..calls import progress
from ..calls.sizes import is_free
from ..errors import AxisConflict
from .program import (
    Program,
    describe,
    draws,
    extended,
    is_mutable,
    is_tensor,
    mutated,
    shape,
    size_hint,
    value,
)
from .rules import bridged, rule_of
from .rules.op import Axes, Op, outputs, parts

FROM_PYTHON, TO_PYTHON = "comes from Python", "goes to Python"
"""Why the edges of a part stay: the user's Python between parts sees the student's width."""


@dataclass(frozen=True)
class BridgeReason:
    """Why an op runs at the student's width. ``kind``: ``"no rule"``, ``"conflict"`` (of axes),
    ``"rule failed"`` (it was not written for such a call), ``"positions"`` (matter to the op)."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Inference:
    """``axes``: node -> axes; ``tensors``: the same for parameters and buffers, by name;
    ``ops``: the view through which each node was inferred; ``bridges``: node -> why."""

    solver: Solver
    axes: dict[fx.Node, Any]
    tensors: dict[str, Axes]
    ops: dict[fx.Node, Op]
    bridges: dict[fx.Node, BridgeReason] = field(default_factory=dict)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node reads."""
        return [n for n in node.all_input_nodes if n in self.axes and is_tensor(n)]


@dataclass(frozen=True)
class Inferred(Program):
    """A program with an axis for every dimension of every tensor."""

    inference: Inference = field(kw_only=True)

    def parameters(self, rank: int = 1) -> dict[str, Axes]:
        """Axes of the parameters with ``rank`` or more dimensions, refined."""
        return {
            name: tuple(self.inference.solver.resolve(a) for a in axes)
            for name, axes in self.inference.tensors.items()
            if isinstance(self.tensors[name], nn.Parameter) and len(axes) >= rank
        }

    def check(self) -> None:
        """Also: every tensor has axes of its sizes."""
        super().check()
        for name, node in self.each():
            axes = self.inference.axes.get(node)
            if axes is not None and _sizes(axes) != _shapes(value(node)):
                raise AssertionError(f"{name}: {node.name} has axes of other sizes: {axes}")


class NeedsFunctional(Exception):
    """A view is written in place where its op must be bridged: capture functionally instead."""


def infer(program: Program) -> Inferred:
    """Find the axes. Raises ``NeedsFunctional`` where only a functional capture can be widened."""
    result = Inference(Solver(), {}, {}, {})
    for mode in program.modes.values():
        static: dict[fx.Node, bool] = {}  # what depends on no input: does it on parameters?
        for node in mode.graph.nodes:
            result.solver.at = describe(node) if node.op == "call_function" else str(node.target)
            progress.at(what=result.solver.at)
            _infer_node(program, result, node, static, mode.site.path)
        _check_writes(result, mode.graph)
    _fix_outputs(program, result)
    _fix_positions(result.solver)
    used = {n.target for _, n in program.each() if n.op == "get_attr"}
    apart = _apart(program)
    for name, tensor in program.tensors.items():
        axes = result.tensors.setdefault(name, _tensor_axes(result.solver, tensor))
        kind = "uncaptured" if name in apart else "unused" if name not in used else ""
        for axis in axes if kind else ():
            result.solver.fix(axis, Reason(kind, name))
    return extended(Inferred, program, inference=result)


def _apart(program: Program) -> set[str]:
    """Tensors of modules that are in no part, under any of their names: Python between the parts
    may read them."""
    student = program.student
    inside = {m for path in program.parts for m in student.get_submodule(path).modules()}
    own = [
        f"{path}.{name}".lstrip(".")
        for path, module in student.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
        if module not in inside
    ]
    return {program.alias.get(name, name) for name in own}


def _tensor_axes(solver: Solver, tensor: torch.Tensor) -> Axes:
    return tuple(solver.leaf(s) for s in tensor.shape)


def _infer_node(
    program: Program, result: Inference, node: fx.Node, static: dict[fx.Node, bool], part: str
) -> None:
    solver = result.solver
    if node.op == "placeholder" and is_tensor(node):
        kind = FROM_PYTHON if part else "input"
        result.axes[node] = tuple(solver.leaf(s, Reason(kind, node.name)) for s in shape(node))
        for axis, size in zip(result.axes[node], value(node).shape, strict=True):
            if is_free(size):
                solver.mark(solver.symbolic, axis)
    elif node.op == "get_attr" and node.target in program.tensors:
        assert isinstance(node.target, str)
        static[node] = isinstance(program.tensors[node.target], nn.Parameter)
        if node.target not in result.tensors:
            axes = _tensor_axes(solver, program.tensors[node.target])
            result.tensors[node.target] = axes
        result.axes[node] = result.tensors[node.target]
    elif node.op == "call_function":
        tensors = [n for n in node.all_input_nodes if not _is_number(n)]
        if all(n in static for n in tensors) and not draws(node):
            static[node] = any(static[n] for n in tensors)
        if isinstance(value(node), torch.Tensor | list | tuple):
            rule = rule_of(node.target)
            op = result.ops[node] = Op(node, solver, result.axes, static, rule)
            result.axes[node] = _infer_op(result, op)
            _mark_known(solver, node, result.axes[node])


def _mark_known(solver: Solver, node: fx.Node, axes: Any) -> None:
    """What a size known at capture is made of is known, whatever it was taken from (heads that
    came out of batch times heads)."""
    for val, own in zip(outputs(node), parts(axes), strict=True):
        for size, axis in zip(val.shape, own, strict=True) if isinstance(val, torch.Tensor) else ():
            for leaf in () if is_free(size) else leaves(solver.resolve(axis)):
                if solver.symbolic.get(leaf) is not False:
                    solver.mark(solver.symbolic, leaf, False)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), int | float | bool | torch.SymInt | torch.SymFloat)


def _infer_op(result: Inference, op: Op) -> Any:
    rule, point = op.rule, result.solver.checkpoint()
    if rule is None:
        text = getattr(op.node.target, "why", bridged.reason(op.node.target))
        text = text or "no rule for this op"
        return bridge(result, op, BridgeReason("no rule", text))
    why, kind = "", "conflict"
    for renewed in _attempts(result, op):
        op.reset({n: _renew(op, n) for n in renewed}, why)
        try:
            axes = rule.infer(op)
            if _sizes(axes) == _shapes(value(op.node)):
                return axes
            why = f"its rule gives sizes {_sizes(axes)}, it has {_shapes(value(op.node))}"
            kind = "rule failed"
        except AxisConflict as conflict:
            why = why or str(conflict)
        except Exception as error:  # a rule met a form it was not written for: bridged, reported
            why, kind = f"its rule failed ({type(error).__name__}: {error})", "rule failed"
        result.solver.rollback(point)
        if kind == "rule failed":
            break
    return bridge(result, op, BridgeReason(kind, why))


def _attempts(result: Inference, op: Op) -> Iterator[list[fx.Node]]:
    """Which inputs get fresh axes: none; if that conflicts one of them, the last first; all."""
    yield []
    changeable = [n for n in result.inputs(op.node) if not op.is_static(n)]
    movable = [n for n in changeable if not all(map(result.solver.is_fixed, result.axes[n]))]
    for n in reversed(movable):
        yield [n]
    if len(movable) > 1:
        yield movable


def _renew(op: Op, x: fx.Node) -> Axes:
    """Fresh leaves for what may widen: the input is narrowed and spread again, by another map."""
    fresh = []
    for axis, size in zip(op.axes(x), value(x).shape, strict=True):
        new = axis if op.solver.is_fixed(axis) else op.free(axis.size)
        if is_free(size):
            op.solver.mark(op.solver.symbolic, new)
        fresh.append(new)
    return tuple(fresh)


def _sizes(axes: Any) -> Any:
    return [_sizes(a) for a in axes] if isinstance(axes, list) else [a.size for a in axes]


def _shapes(val: Any) -> Any:
    if isinstance(val, list | tuple):
        return [_shapes(v) for v in val]
    return list(map(size_hint, val.shape)) if isinstance(val, torch.Tensor) else []


def bridge(result: Inference, op: Op, why: BridgeReason) -> Any:
    """Mark the op and give its outputs fresh axes: free where an input's axis of that size is."""
    solver = result.solver
    result.bridges[op.node] = why
    op.reset({}, str(why))
    inputs = result.inputs(op.node)

    def stays(axis: Axis) -> bool:  # for another reason than a bridge, perhaps in the other mode
        reasons = [solver.reason.get(leaf) for leaf in leaves(solver.resolve(axis))]
        return all(r is not None and r.kind != "bridge" for r in reasons)

    def fresh(val: Any) -> Any:
        if isinstance(val, list | tuple):
            return [fresh(v) for v in val]
        if not isinstance(val, torch.Tensor):
            return ()
        axes = []
        for d, size in enumerate(shape(val)):
            raw = val.shape[d]
            alike = [
                a
                for n in inputs
                for k, a in enumerate(result.axes[n])
                if (a.size == size or (k == d and len(result.axes[n]) == val.ndim))
                and is_free(value(n).shape[k]) == is_free(raw)
            ]
            alike = alike or [a for n in inputs for a in result.axes[n]]
            fixed = all(map(stays, alike)) and bool(alike or not inputs)
            axes.append(op.fixed(raw) if fixed else op.free(raw))
        return tuple(axes)

    made = fresh(value(op.node))
    for n in inputs:  # a weight that the op sees stays; what is made of it may be spread
        if n.op == "get_attr":
            for axis in result.axes[n]:
                solver.fix(axis, Reason("bridge", op.where))
    return made


def _fix_outputs(program: Program, result: Inference) -> None:
    """An output axis that no weight contracts is the network's result and stays; a hidden
    feature that is returned too stays wide inside and is narrowed on its way out."""
    solver = result.solver
    for mode in program.modes.values():
        for node in mode.graph.output_node().all_input_nodes:
            for axis in result.axes.get(node, ()) if is_tensor(node) else ():
                if not any(x in solver.contracted for x in leaves(solver.resolve(axis))):
                    kind = TO_PYTHON if mode.site.path else "output"
                    solver.fix(axis, Reason(kind, node.name))


def _fix_positions(solver: Solver) -> None:
    """An axis along which positions are taken, and which nothing contracts, gains nothing from
    copies: they would all be merged again (query, key and value; a table's window)."""
    for leaf, reason in list(solver.inner.items()):
        if leaf not in solver.bound and leaf not in solver.contracted:
            solver.fix(leaf, reason)


def _check_writes(result: Inference, graph: fx.Graph) -> None:
    """A bridged op makes new memory: a write through it, or into it, would be lost."""
    written: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        written |= {target for _, target in mutated(node) if target.op != "get_attr"}
        op = result.ops.get(node)
        if node in written and op is not None:
            fresh = node in result.bridges or op.narrowed or op.renewed
            if fresh and _views(node) and not _all_fixed(result, node):
                raise NeedsFunctional(op.where)
            if _views(node) or is_mutable(node):
                written |= {n for n in node.all_input_nodes if is_tensor(n)}


def _views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(a.alias_info is not None for a in schema.arguments)


def _all_fixed(result: Inference, node: fx.Node) -> bool:
    near = [*result.inputs(node), *([node] if is_tensor(node) else [])]
    return all(result.solver.is_fixed(a) for n in near for a in result.axes[n])

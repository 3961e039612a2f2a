"""Widen: the student's graphs -> the teacher's, given a width for every leaf.

Parameters and buffers are gathered along their axes (inverse reparameterization, IR), integer
arguments are recomputed, contractions get shares, and what has no rule stands between bridges.
"""

from __future__ import annotations

import operator
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from ..algebra.axes import Axis
from ..algebra.frozen import Frozen, freeze
from ..algebra.widths import Widths
from .folded import Branched, Lowered
from .infer import Inference
from .program import Program, has_effect, is_tensor, module_path, mutated, source
from .rules import rule_of
from .rules.op import Axes, Op, parts
from .rules.writer import DynamicAxis, Target, Writer, student_size
from .shares import Use, uses

aten = torch.ops.aten


@dataclass(frozen=True)
class Bridge:
    """An op that runs at the student's width (along some or all of its axes)."""

    node: str
    op: str
    module: str
    source: str
    reason: str = field(compare=False)


@dataclass(frozen=True)
class Widened:
    """The teacher as data: its graphs, and how its tensors follow from the student's.

    ``maps``: name -> one frozen axis per dimension, for every parameter and buffer;
    ``shares`` and ``constants``: tensors that the graphs name and the student does not have.
    ``uses``: weight -> the shares that its op multiplies it by; ``branched``: weights that have
    branches; ``unbranched``: weights that got none -> why; ``lowered``: of the branched,
    those that the fused fold computes; ``unlowered``: the others -> why.
    """

    program: Program
    inference: Inference
    widths: Widths
    graphs: dict[str, fx.Graph]
    maps: dict[str, tuple[Frozen, ...]]
    shares: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    bridges: tuple[Bridge, ...]
    uses: dict[str, Use]
    branched: tuple[Branched, ...] = ()
    unbranched: dict[str, str] = field(default_factory=dict)
    lowered: dict[str, Lowered] = field(default_factory=dict)
    unlowered: dict[str, str] = field(default_factory=dict)

    def frozen(self, axis: Axis) -> Frozen:
        return freeze(self.inference.solver.resolve(axis), self.widths)


def widen(
    program: Program,
    inference: Inference,
    widths: Widths,
    *,
    shares: str = "random",
    independent: bool = False,
    seed: int = 0,
) -> Widened:
    """Write the teacher's graphs. ``shares``, ``independent``, ``seed``: see ``gpdfx.expand``."""
    cache: dict[Axis, Frozen] = {}

    def frozen(axis: Axis) -> Frozen:
        axis = inference.solver.resolve(axis)
        if axis not in cache:
            cache[axis] = freeze(axis, widths)
        return cache[axis]

    def draw(key: str) -> np.random.Generator | None:
        if shares == "uniform":
            return None
        return np.random.default_rng([seed, zlib.crc32(key.encode())])

    graphs = {mode: fx.Graph() for mode in program.modes}
    target = Target(graphs, inference.axes, frozen, draw, independent=independent)
    for tensor in program.tensors.values():
        if tensor.is_floating_point():
            target.dtype, target.device = tensor.dtype, tensor.device
            break
    tops = {name.split(".")[0] for name in program.tensors}
    while target.prefix in tops:
        target.prefix += "_"
    bridges: dict[Bridge, None] = {}
    for mode, graph in graphs.items():
        GraphWriter(program.modes[mode].nodes, inference, target, mode, bridges).run()
        graph.eliminate_dead_code(is_impure_node=has_effect)
        graph.lint()
    maps = {n: tuple(frozen(a) for a in axes) for n, axes in inference.tensors.items()}
    return Widened(
        program,
        inference,
        widths,
        graphs,
        maps,
        target.shares,
        target.constants,
        tuple(bridges),
        uses(graphs),
    )


@dataclass
class GraphWriter:
    """Writes the teacher's graph of one mode, node by node; ``env``: student's node -> teacher's
    (a list for an op with several outputs that had to be spread)."""

    nodes: list[fx.Node]
    inference: Inference
    target: Target
    mode: str
    bridges: dict[Bridge, None]
    env: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self) -> None:
        graph, nodes = self.target.graphs[self.mode], self.nodes
        for node in nodes:
            if node.op == "placeholder":
                self.env[node] = graph.placeholder(node.name)
        anchor = self.target.anchors[self.mode] = graph.call_function(_anchor)
        for node in nodes:
            if node.op == "get_attr":
                self.env[node] = self.target.attribute(self.mode, str(node.target))
            elif node.op == "call_function":
                self.env[node] = new = self._call(node)
                if isinstance(new, fx.Node):
                    new.meta["student"] = node.name
            elif node.op == "output":
                graph.output(tuple(self._output(x) for x in node.args[0]))  # type: ignore[union-attr]
        graph.erase_node(anchor)

    def _call(self, node: fx.Node) -> Any:
        op = self.inference.ops.get(node)
        if op is None:
            return self._number(node)
        if node.target is operator.getitem and isinstance(self.env[node.args[0]], list):  # type: ignore[index]
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        if node in self.inference.bridges:
            return self._bridge(op)
        return self._rule(op)

    def _rule(self, op: Op) -> Any:
        """Write the op by its rule, some dimensions of its inputs narrowed first."""
        own = bool(op.narrowed or op.renewed)
        env, axes = dict(self.env) if own else self.env, self.inference.axes
        w = Writer(op, self.target, self.mode, env)
        for x, fresh in op.renewed.items():
            env[x] = self._renew(w, env[x], axes[x], fresh)
        changed = any(env[x] is not self.env[x] for x in op.renewed)
        for x, dim in sorted(op.narrowed, key=lambda pair: (pair[0].name, pair[1])):
            env[x] = w.narrow(env[x], op.axes(x), [dim])
        rule = rule_of(op.node.target)
        assert rule is not None
        try:
            written = rule.widen(w)
        except DynamicAxis:
            raise
        except Exception as error:  # a form the rule was not written for: bridged, reported
            self.inference.bridges[op.node] = f"its rule failed ({type(error).__name__}: {error})"
            return self._bridge(op)
        new, spread = self._spread(w, written, sorted(op.spread))
        changed = changed or spread or any(w.wide(op.axes(x)[d]) for x, d in op.narrowed)
        if op.why and changed:
            self._note(op.node, op.why)
        return new

    def _renew(self, w: Writer, new: Any, old: Axes, fresh: Axes) -> Any:
        """From one axis to another of the same size: by way of the student's width."""
        for d, (a, b) in enumerate(zip(old, fresh, strict=True)):
            if not np.array_equal(w.frozen(a).map, w.frozen(b).map):
                new = w.spread(w.narrow(new, old, [d]), fresh, [d])
        return new

    def _bridge(self, op: Op) -> Any:
        """Narrow every input, run the op at the student's width, spread its outputs."""
        node, env, axes = op.node, dict(self.env), self.inference.axes
        w = Writer(op, self.target, self.mode, env)
        for x in node.all_input_nodes:
            if x in axes and is_tensor(x):
                env[x] = w.narrow(env[x], axes[x])
        changed = any(env[x] is not self.env[x] for x in node.all_input_nodes)
        new, spread = self._spread(w, w.copy(), None)
        for _, x in mutated(node):
            if env[x] is not self.env[x]:  # the op wrote to a narrowed copy
                w.call(aten.copy_.default, self.env[x], w.spread(env[x], axes[x]))
        if changed or spread:
            self._note(node, self.inference.bridges[node])
        return new

    def _spread(self, w: Writer, new: Any, dims: list[int] | None) -> tuple[Any, bool]:
        """Spread the outputs of an op that ran at the student's width along ``dims`` (all)."""
        axes = self.inference.axes[w.op.node]
        wide = any(
            w.wide(a)
            for part in parts(axes)
            for d, a in enumerate(part)
            if dims is None or d in dims
        )
        if wide and isinstance(axes, list):
            outputs = [w.call(operator.getitem, new, k) for k in range(len(axes))]
            return [w.spread(x, a, dims) for x, a in zip(outputs, axes, strict=True)], True
        return (w.spread(new, axes, dims) if wide else new), wide

    def _note(self, node: fx.Node, why: str) -> None:
        note = Bridge(node.name, str(node.target), module_path(node), source(node), why)
        self.bridges.setdefault(note)

    def _number(self, node: fx.Node) -> fx.Node:
        """Numbers keep the student's value: the size of a widened dimension is scaled back."""
        graph = self.target.graphs[self.mode]
        new = graph.node_copy(node, lambda n: self.env[n])
        new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        if node.target in (aten.sym_size.int, aten.sym_numel.default):
            axes = self.inference.axes[node.args[0]]  # type: ignore[index]
            axes = axes if len(node.args) == 1 else [axes[node.args[1]]]
            frozen = [f for f in map(self.target.frozen, axes) if f.wide]
            for f in frozen:
                new = graph.call_function(student_size, (new, f.student, f.teacher))
        return new

    def _output(self, x: Any) -> Any:
        """A hidden feature that is returned leaves at the student's width."""
        new = fx.node.map_arg(x, lambda n: self.env[n])
        if isinstance(x, fx.Node) and is_tensor(x):
            inference = self.inference
            op = inference.ops.get(x) or Op(x, inference.solver, inference.axes, {})
            new = Writer(op, self.target, self.mode, self.env).narrow(new, inference.axes[x])
        return new


def _anchor() -> None:
    """Marks the place of a graph's constants while it is written."""

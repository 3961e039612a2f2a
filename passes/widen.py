"""Widen: the student's graphs -> the teacher's, given a width for every leaf.

Parameters and buffers are gathered along their axes (inverse reparameterization, IR), integer
arguments are recomputed, contractions get shares, and what has no rule stands between bridges.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import fx

from ..algebra.axes import Axis
from ..algebra.frozen import Frozen, freeze
from ..errors import AxisConflict
from .assign import Assigned
from .folded import Branched, Lowered
from .infer import BridgeReason, Inference
from .program import check_graph, extended, has_effect, is_tensor, mutated, origin, unused
from .rules.op import Axes, Op, parts
from .rules.writer import DynamicAxis, Target, Writer, student_size
from .shares import Shares, shares_of_weights

aten = torch.ops.aten


@dataclass(frozen=True)
class Bridge:
    """An op that runs at the student's width (along some or all of its axes). ``kind``: of the
    ``reason``, see ``BridgeReason``."""

    node: str
    op: str
    module: str
    source: str
    reason: str = field(compare=False)
    kind: str = field(compare=False)


@dataclass(frozen=True)
class Widened(Assigned):
    """The teacher as data: its graphs, and how its tensors follow from the student's.

    ``maps``: name -> one frozen axis per dimension, for every parameter and buffer;
    ``shares`` and ``constants``: tensors that the graphs name and the student does not have.
    ``uses``: weight -> the shares that its op multiplies it by; ``branched``: weights that have
    branches; ``unbranched``: weights that got none -> why; ``lowered``: of the branched,
    those that the fused fold computes; ``unlowered``: the others -> why.
    """

    graphs: dict[str, fx.Graph] = field(kw_only=True)
    maps: dict[str, tuple[Frozen, ...]] = field(kw_only=True)
    shares: dict[str, torch.Tensor] = field(kw_only=True)
    constants: dict[str, torch.Tensor] = field(kw_only=True)
    bridges: tuple[Bridge, ...] = field(kw_only=True)
    uses: dict[str, Shares] = field(kw_only=True)
    branched: tuple[Branched, ...] = ()
    unbranched: dict[str, str] = field(default_factory=dict)
    lowered: dict[str, Lowered] = field(default_factory=dict)
    unlowered: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Also: the teacher's graphs."""
        super().check()
        known = {*self.tensors, *self.children, *self.shares, *self.constants}
        known |= {path for path, _ in self.student.named_modules()}
        for name, graph in self.graphs.items():
            check_graph(name, graph, known, modules=True)


def widen(program: Assigned) -> Widened:
    """Write the teacher's graphs."""
    options = program.options
    # rules that fail while they write are bridged, too: noted in a copy, inference stays as it was
    inference = replace(program.inference, bridges=dict(program.inference.bridges))
    solver, freeze_once = inference.solver, cache(partial(freeze, width=program.widths))
    refined = solver.checkpoint()

    def frozen(axis: Axis) -> Frozen:
        return freeze_once(solver.resolve(axis))

    def draw(key: str) -> np.random.Generator | None:
        if options.shares == "uniform":
            return None
        return np.random.default_rng([options.seed, zlib.crc32(key.encode())])

    graphs = {mode: fx.Graph() for mode in program.modes}
    independent = options.randomness == "independent"
    target = Target(graphs, inference.axes, frozen, draw, independent=independent)
    floating = next((t for t in program.tensors.values() if t.is_floating_point()), None)
    if floating is not None:
        target.dtype, target.device = floating.dtype, floating.device
    target.prefix = unused(target.prefix, {name.split(".")[0] for name in program.tensors})
    bridges: dict[Bridge, None] = {}
    for mode, graph in graphs.items():
        GraphWriter(program.modes[mode].nodes, inference, target, mode, bridges).run()
        graph.eliminate_dead_code(is_impure_node=has_effect)
    assert solver.checkpoint() == refined, "widening refines no axis"
    return extended(
        Widened,
        replace(program, inference=inference),
        graphs=graphs,
        maps={n: tuple(frozen(a) for a in axes) for n, axes in inference.tensors.items()},
        shares=target.shares,
        constants=target.constants,
        bridges=tuple(bridges),
        uses=shares_of_weights(graphs.values()),
    )


@dataclass
class GraphWriter:
    """Writes the teacher's graph of one mode, node by node; ``env``: student's node -> teacher's
    (a list for an op with several outputs that had to be spread). In a node's ``meta``, ``of`` is
    the name of the student's that it is written for, ``student`` of the one that it stands for."""

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
                last = next(iter(reversed(graph.nodes)))  # no iterator in torch 2.11
                self.env[node] = new = self._call(node)
                for made in reversed(graph.nodes):
                    if made is last:
                        break
                    made.meta["of"] = node.name
                if isinstance(new, fx.Node):
                    new.meta["student"] = node.name
            elif node.op == "output":
                graph.output(tuple(self._output(x) for x in node.args[0]))  # type: ignore[union-attr]
        graph.erase_node(anchor)

    def _call(self, node: fx.Node) -> Any:
        op, bridges = self.inference.ops.get(node), self.inference.bridges
        if op is None:
            return self._number(node)
        if node.target is operator.getitem and isinstance(self.env[node.args[0]], list):  # type: ignore[index]
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        if node not in bridges:
            narrowed = sorted(op.narrowed, key=lambda pair: (pair[0].name, pair[1]))
            why = BridgeReason("conflict" if op.renewed else "positions", op.why)
            try:
                return self._write(op, op.rule.widen, op.renewed, narrowed, sorted(op.spread), why)
            except DynamicAxis:
                raise
            except Exception as error:  # a form the rule was not written for: bridged, reported
                failed = f"its rule failed ({type(error).__name__}: {error})"
                conflict = isinstance(error, AxisConflict)
                kind = ("conflict", str(error)) if conflict else ("rule failed", failed)
                bridges[node] = BridgeReason(*kind)
        inputs = self.inference.inputs(node)
        everywhere = [(x, d) for x in inputs for d in range(len(self.inference.axes[x]))]
        return self._write(op, Writer.copy, {}, everywhere, None, bridges[node])

    def _write(
        self,
        op: Op,
        write: Callable[[Writer], Any],
        renewed: dict[fx.Node, Axes],
        narrowed: list[tuple[fx.Node, int]],
        spread: list[int] | None,
        why: BridgeReason,
    ) -> Any:
        """``write`` an op, inputs ``renewed`` or ``narrowed`` first, outputs spread after along
        some dimensions (``None``: all, as behind a bridge)."""
        node, axes = op.node, self.inference.axes
        env = dict(self.env) if renewed or narrowed else self.env
        w = Writer(op, self.target, self.mode, env)
        for x, fresh in renewed.items():
            for d, (old, new) in enumerate(zip(axes[x], fresh, strict=True)):
                if not np.array_equal(w.frozen(old).map, w.frozen(new).map):  # by way of one copy
                    env[x] = w.spread(w.narrow(env[x], axes[x], [d]), fresh, [d])
        for x, d in narrowed:
            env[x] = w.narrow(env[x], renewed.get(x, axes[x]), [d])
        result, widened = self._spread(w, write(w), spread)
        for _, x in mutated(node) if spread is None else ():
            if env[x] is not self.env[x]:  # the op wrote to a narrowed copy
                w.call(aten.copy_.default, self.env[x], w.spread(env[x], axes[x]))
        if why.text and (widened or any(env[x] is not self.env[x] for x in node.all_input_nodes)):
            at = origin(node)
            where = Bridge(node.name, str(node.target), str(at), at.source, why.text, why.kind)
            self.bridges.setdefault(where)
        return result

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
            places = [[d for d in range(len(a)) if dims is None or d in dims] for a in axes]
            return list(map(w.spread, outputs, axes, places)), True
        return (w.spread(new, axes, dims) if wide else new), wide

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

"""Why a parameter widened or did not: its axes, its group, and the chain of ops to the cause."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import fx

from ..algebra.axes import Axis, Leaf, Product, leaves, paths
from ..algebra.widths import Widths
from ..errors import InputError, suggest
from ..passes.program import is_tensor, module_path, value
from ..passes.widen import Widened

if TYPE_CHECKING:
    from ..teacher.module import Teacher


@dataclass(frozen=True)
class Dimension:
    """One dimension of a parameter. ``axis``: its algebra, ``576 = 3 x 3->6 x 64``; ``group``:
    parameters that widen with it; ``reason``: why (part of) it stayed, else empty; ``chain``:
    the ops with source lines from it to the cause."""

    axis: str
    student: int
    teacher: int
    group: tuple[str, ...]
    reason: str
    chain: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """Printed as text; fields for machines."""

    parameter: str
    dimensions: tuple[Dimension, ...]

    def __str__(self) -> str:
        lines = [self.parameter]
        for k, d in enumerate(self.dimensions):
            lines.append(f"  dim {k}: {d.axis}")
            if d.group:
                others = [n for n in d.group if n != self.parameter]
                more = f" and {len(others) - 4} more" if len(others) > 4 else ""
                lines.append(f"    widens together with {', '.join(others[:4]) or 'nothing'}{more}")
            if d.reason:
                lines.append(f"    stays: {d.reason}")
                lines += [f"      via {step}" for step in d.chain]
        return "\n".join(lines)


@dataclass(frozen=True)
class Evidence:
    """What ``explain`` and ``graph`` need, as plain data that pickles with the teacher.

    ``leaves``: the constraint graph, leaves as numbers with ``size``, ``width``, ``reason``,
    ``cause``, ``asked`` (the user wants it to stay); its edges carry the op that unified them.
    ``axes``: parameter -> per dimension the text, the sizes and, per path, its leaves. ``roots``:
    parameter -> the leaf that each dimension began as. ``layers``: the layers with weights, in
    data-flow order.
    """

    leaves: nx.Graph
    axes: dict[str, list[tuple[str, int, int, list[tuple[int, ...]]]]]
    roots: dict[str, list[int | None]]
    layers: nx.DiGraph

    def __deepcopy__(self, memo: dict[int, Any]) -> Evidence:
        return self  # never changed once made


def gather_evidence(widened: Widened) -> Evidence:
    inference, widths = widened.inference, widened.widths
    solver, graph = inference.solver, nx.Graph()
    for a, b, label in solver.edges:
        graph.add_edge(a.order, b.order, label=label)
    parameters = widened.parameters()
    known = {x for axes in inference.tensors.values() for a in axes for x in leaves(a)}
    known |= set(solver.reason) | {
        x for axes in parameters.values() for a in axes for x in leaves(a)
    }
    why = {**solver.reason, **widths.stays}
    for leaf in known:
        held = widths.held.get(leaf)
        reason = str(why[leaf]) if leaf in why else ""
        if held is not None:
            reason = f"factor {held.size} -> {widths(held)} of its product widens instead"
        graph.add_node(leaf.order, size=leaf.size, width=widths(leaf), reason=reason)
        graph.nodes[leaf.order].update(cause=leaf in solver.cause, asked=leaf in widths.stays)
    for leaf, wish in widths.stays.items():  # it begins at the parameter that the user named
        for root in inference.tensors[wish.where]:
            if isinstance(root, Leaf) and leaf in leaves(solver.resolve(root)):
                graph.nodes[root.order].update(reason=str(wish), cause=True)
    axes = {
        name: [
            (
                _text(a, widths),
                a.size,
                widened.frozen(a).teacher,
                [tuple(x.order for x in path) for path in paths(a)],
            )
            for a in dims
        ]
        for name, dims in parameters.items()
    }
    roots = {
        name: [a.order if isinstance(a, Leaf) else None for a in inference.tensors[name]]
        for name in parameters
    }
    return Evidence(graph, axes, roots, _layers(widened))


def _text(axis: Axis, widths: Widths) -> str:
    def show(a: Axis, inner: bool = False) -> str:
        if isinstance(a, Leaf):
            return f"{a.size}->{widths(a)}" if widths(a) != a.size else str(a.size)
        if isinstance(a, Product):
            return " x ".join(show(f, True) for f in a.factors) or "1"
        text = " + ".join(show(t) for t in a.terms)
        return f"({text})" if inner else text

    shown = show(axis)
    return shown if isinstance(axis, Leaf) or axis.size == 1 else f"{axis.size} = {shown}"


def explain(teacher: Teacher, parameter: str) -> Explanation:
    """Explain one parameter of a teacher, by the student's name for it.

    Raises ``InputError`` with near names if there is none of that name.
    """
    evidence = teacher.report().evidence
    parameter = teacher._facts.alias.get(parameter, parameter)
    if parameter not in evidence.axes:
        raise InputError(
            f"no parameter is called {parameter!r}", remedy=suggest(parameter, evidence.axes)
        )
    dimensions = []
    for (text, student, wide, ways), root in zip(
        evidence.axes[parameter], evidence.roots[parameter], strict=True
    ):
        mine = {leaf for way in ways for leaf in way}
        nodes = evidence.leaves.nodes
        grown = {x for x in mine if nodes[x]["width"] != nodes[x]["size"]}
        group = tuple(
            name
            for name, dims in evidence.axes.items()
            if any(grown & set(way) for *_, others in dims for way in others)
        )
        reason = "size one" if student == 1 else ""
        chain: tuple[str, ...] = ()
        for way in ways:
            if way and not grown & set(way):
                reason, chain = _why(evidence, way, root)
                break
        dimensions.append(Dimension(text, student, wide, group, reason, chain))
    return Explanation(parameter, tuple(dimensions))


def _why(evidence: Evidence, way: tuple[int, ...], root: int | None) -> tuple[str, tuple[str, ...]]:
    """The reason of a path's first leaf that has one, and the shortest chain to where it arose."""
    nodes = evidence.leaves.nodes
    reasons = [x for x in way if nodes[x]["reason"]]
    stuck = next((x for x in reasons if nodes[x]["asked"]), next(iter(reasons), None))
    if stuck is None:
        return "too small to widen by this ratio", ()
    reason = nodes[stuck]["reason"]
    causes = {x for x, d in nodes.items() if d.get("cause") and d.get("reason") == reason}
    for start in (root, stuck):
        if start is None or start not in evidence.leaves:
            continue
        reached = nx.single_source_shortest_path(evidence.leaves, start)
        ends = [x for x in causes if x in reached]
        if ends:
            path = reached[min(ends, key=lambda x: (len(reached[x]), x))]
            steps = [evidence.leaves.edges[a, b]["label"] for a, b in itertools.pairwise(path)]
            return reason, tuple(dict.fromkeys(steps))
    return reason, ()


# --------------------------------------------------------------------------- the picture
def _layers(widened: Widened) -> nx.DiGraph:
    """Modules with weights (and bridges) as nodes, data flow between them as edges."""
    program, inference = widened, widened.inference
    modes = [m for m in program.modes.values() if not m.site.training]
    bridged = {b.node: b.reason for b in widened.bridges}
    graph = nx.DiGraph()
    reach: dict[fx.Node, set[str]] = {}
    for path, node in [(m.site.path, node) for m in modes for node in m.nodes]:
        if node.op == "placeholder":
            name = f"{path} {node.name}".lstrip()
            graph.add_node(name, kind="input", group=-1)
            reach[node] = {name}
            continue
        if isinstance(value(node), int | float | torch.SymInt):
            continue  # sizes are no data flow
        sources = set().union(*(reach.get(n, set()) for n in node.all_input_nodes))
        weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        matrices = [w for w in weights if w in inference.tensors and len(inference.tensors[w]) > 1]
        name = ""
        if node.op == "call_function" and is_tensor(node):
            path = module_path(node).split(" ")[0]
            if node.name in bridged:
                name = f"{path} [{node.name}]"
                graph.add_node(name, kind="bridge", group=-1, why=bridged[node.name])
            elif matrices:
                name = matrices[-1].removesuffix(".weight")
                last = inference.tensors[matrices[-1]][0]
                first = next(leaves(inference.solver.resolve(last)), None)
                group = first.order if first and widened.widths(first) != first.size else -1
                graph.add_node(name, kind="layer", group=group)
        if name:
            graph.add_edges_from((s, name) for s in sources if s != name)
            reach[node] = {name}
        else:
            reach[node] = sources
    return graph

"""Why a parameter widened or did not: its axes, its group, and the chain of ops to the cause."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..access.find import find_teacher
from ..algebra.axes import Axis, Leaf, leaves, paths, spell
from ..algebra.solver import Reason
from ..algebra.widths import Path, Widths, width_of
from ..errors import InputError, suggest
from ..passes.widen import Widened
from .flow import data_flow

if TYPE_CHECKING:  # imported where it is used: it takes a fifth of a second
    import networkx as nx


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
    """What ``explain`` and ``graph`` need, as plain data that pickles with the teacher: the only
    thing in a teacher that still knows leaves.

    ``leaves``: the constraint graph; its edges carry the op that unified two leaves (``label``),
    its nodes why a leaf stays (``reason``), and whether that began with this one (``cause``).
    ``axes``: parameter -> per dimension the axis that it began as, and what that was refined to.
    ``layers``: the data flow between layers, see ``flow``.
    """

    leaves: nx.Graph
    axes: dict[str, list[tuple[Axis, Axis]]]
    widths: Widths
    layers: nx.DiGraph

    def __deepcopy__(self, memo: dict[int, Any]) -> Evidence:
        return self  # never changed once made


def gather_evidence(widened: Widened) -> Evidence:
    import networkx as nx

    inference, widths = widened.inference, widened.widths
    solver, graph = inference.solver, nx.Graph()
    graph.add_edges_from((a, b, {"label": label}) for (a, b), label in solver.edges.items())
    held = {
        leaf: Reason(f"factor {other.size} -> {widths(other)} of its product widens instead")
        for leaf, other in widths.held.items()
    }
    for leaf, why in {**solver.reason, **widths.stays, **held}.items():
        graph.add_node(leaf, reason=why, cause=leaf in solver.cause)
    for leaf, wish in widths.stays.items():  # it begins at the parameter that the user named
        for root in inference.tensors[wish.where]:
            if isinstance(root, Leaf) and leaf in leaves(solver.resolve(root)):
                graph.add_node(root, reason=wish, cause=True)
    axes = {
        name: list(zip(inference.tensors[name], dims, strict=True))
        for name, dims in widened.parameters().items()
    }
    return Evidence(graph, axes, widths, data_flow(widened))


def explain(teacher: nn.Module, parameter: str) -> Explanation:
    """Explain one parameter of a teacher, by the student's name for it.

    Raises ``InputError`` with near names if there is none of that name.
    """
    found = find_teacher("explain", teacher)
    evidence, parameter = found.report().evidence, str(parameter)
    parameter = found._facts.alias.get(parameter, parameter)
    if parameter not in evidence.axes:
        raise InputError(
            f"no parameter is called {parameter!r}", remedy=suggest(parameter, evidence.axes)
        )
    dimensions = (_dimension(evidence, *axes) for axes in evidence.axes[parameter])
    return Explanation(parameter, tuple(dimensions))


def _dimension(evidence: Evidence, root: Axis, axis: Axis) -> Dimension:
    widths = evidence.widths
    grown = {leaf for leaf in leaves(axis) if widths(leaf) != leaf.size}
    group = tuple(
        name
        for name, dims in evidence.axes.items()
        if any(not grown.isdisjoint(leaves(other)) for _, other in dims)
    )
    stuck = next((path for path in paths(axis) if path and grown.isdisjoint(path)), None)
    alone = "size one" if axis.size == 1 else ""
    reason, chain = _why(evidence, stuck, root) if stuck else (alone, ())
    shown = spell(axis, lambda x: f"{x.size}->{widths(x)}" if x in grown else str(x.size))
    text = shown if isinstance(axis, Leaf) or axis.size == 1 else f"{axis.size} = {shown}"
    return Dimension(text, axis.size, width_of(axis, widths.size), group, reason, chain)


def _why(evidence: Evidence, path: Path, root: Axis) -> tuple[str, tuple[str, ...]]:
    """The reason of the path's first leaf that has one, what the user asked for first; and the
    shortest chain to where it arose."""
    import networkx as nx

    nodes, asked = evidence.leaves.nodes, evidence.widths.stays
    stuck = [leaf for leaf in path if leaf in nodes and "reason" in nodes[leaf]]
    if not stuck:
        return "too small to widen by this ratio", ()
    first = next((leaf for leaf in stuck if leaf in asked), stuck[0])
    reason = nodes[first]["reason"]
    causes = {x for x, why in nodes.items() if why.get("cause") and why["reason"] == reason}
    for start in (root, first):
        reached = nx.single_source_shortest_path(evidence.leaves, start) if start in nodes else {}
        if ends := causes & reached.keys():
            steps = reached[min(ends, key=lambda leaf: (len(reached[leaf]), leaf))]
            labels = [evidence.leaves.edges[pair]["label"] for pair in itertools.pairwise(steps)]
            return str(reason), tuple(dict.fromkeys(labels))
    return str(reason), ()

"""Folded weights: graphs take them from one further input, a mapping by the names given here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..branches.layer import Layer
from ..branches.sets import BranchSet
from ..kernels.fold import Site
from .program import unused


def read(folded: Mapping[str, Tensor], name: str) -> Tensor:
    """A folded weight, as graphs call it."""
    return folded[name]


def reads(graph: fx.Graph) -> dict[str, fx.Node]:
    """What a graph reads of that input."""
    return {str(n.args[1]): n for n in graph.find_nodes(op="call_function", target=read)}


def add(graph: fx.Graph, name: str) -> fx.Node:
    """Read one more weight."""
    known = next(iter(graph.find_nodes(op="call_function", target=read)), None)
    folded: Any = _input(graph) if known is None else known.args[0]
    with graph.inserting_after(folded):
        return graph.call_function(read, (folded, name))


def _input(graph: fx.Graph) -> fx.Node:
    """A new placeholder, the last."""
    inputs = graph.find_nodes(op="placeholder")
    name = unused("folded", {node.target for node in inputs})
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        return graph.placeholder(name)


@dataclass(frozen=True)
class Branched:
    """A weight with branches, as the branch pass found it. ``bias``: the layer's, if it has one,
    which takes what normalized branches add to every pixel."""

    weight: str
    bias: str | None
    layer: Layer
    chosen: BranchSet


@dataclass(frozen=True)
class Lowered:
    """A weight's place in the fused fold, with branches or without, as the lowering pass found
    it. ``shares``: names of table and classes, if the fold multiplies by them."""

    site: Site
    shares: tuple[str, ...]


Make = Callable[[], Tensor]


Folded = Mapping[str, Tensor]
"""What graphs and student read instead of parameters, by these names:"""


def merged(name: str) -> str:
    """The weight (or bias) with all branches in it: the student's, and the teacher's in eval."""
    return name


def plain(name: str) -> str:
    """The weight without its normalized branches: the teacher's in train mode."""
    return f"{name} plain"


def kernel(name: str, branch: str) -> str:
    """The weight of one normalized branch alone."""
    return f"{name} {branch}"


def teachers(name: str) -> str:
    """The weight that the teacher reads, of the fused fold: with its shares."""
    return f"{name} teacher"


def students(name: str) -> str:
    """The weight that the student reads, of the fused fold: without shares, its part alone if the
    site has a ``cut``."""
    return f"{name} student"


PREFIX = "_branches"


def module_of(name: str) -> str:
    """Where the teacher keeps the branches of a weight."""
    return f"{PREFIX}.{name}"

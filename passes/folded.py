"""Feed: graphs take folded weights from one further input, a mapping by the names of
``gpdfx.fold``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx


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
    name = "folded"
    while any(node.target == name for node in inputs):
        name += "_"
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        return graph.placeholder(name)

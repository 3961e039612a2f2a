"""Shares: what multiplies a contracted axis so that its copies count once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from ..kernels import copies
from ..kernels.fold import Share


@dataclass(frozen=True)
class Shares:
    """How a graph multiplies a tensor by shares: the names of their ``table`` and ``classes``, and
    the ``layout`` that ``copies.share`` takes beside them."""

    table: str
    classes: str
    layout: Share

    @staticmethod
    def of(node: fx.Node) -> Shares | None:
        """Those of a call of ``copies.share``; none of another node."""
        if node.target is not copies.share:
            return None
        _, table, classes, at, dim, split = node.args
        layout = Share(at, dim, tuple(split) if split else None)  # type: ignore[arg-type]
        return Shares(str(table.target), str(classes.target), layout)  # type: ignore[union-attr]


def shares_of_weights(graphs: Iterable[fx.Graph]) -> dict[str, Shares]:
    """Weight -> the first shares that it is multiplied by."""
    found: dict[str, Shares] = {}
    for graph in graphs:
        for node in graph.find_nodes(op="call_function", target=copies.share):
            weight, shares = node.args[0], Shares.of(node)
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and shares:
                found.setdefault(str(weight.target), shares)
    return found

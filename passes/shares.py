"""Shares: what multiplies a contracted axis so that its copies count once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..kernels import copies


@dataclass(frozen=True)
class Use:
    """How a weight's contracted dimension ``dim`` is multiplied by shares: the other arguments of
    ``copies.share``, tensors by name."""

    table: str
    classes: str
    at: int
    dim: int
    split: tuple[int, ...] | None


def uses(graphs: dict[str, fx.Graph]) -> dict[str, Use]:
    """Weight -> its first use with shares."""
    found: dict[str, Use] = {}
    for graph in graphs.values():
        for node in graph.find_nodes(op="call_function", target=copies.share):
            x, table, classes, at, dim, split = node.args
            if x.op == "get_attr":
                use = Use(table.target, classes.target, at, dim, tuple(split) if split else None)
                found.setdefault(x.target, use)
    return found

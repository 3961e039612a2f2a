"""Lower: layers whose branches have a fused fold read their weight from it, shares and all.

Before, a graph reads the merged weight and multiplies it by shares; after, it reads the product.
The fold (``gpdfx.kernels.fold``) picks its implementation by the device of the parameters, so that
a lowered teacher may be moved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..fold import Branched, Lowered, merged, teachers
from ..kernels import copies
from ..kernels.fold import RULES, Share, Site, cut_of
from .widen import Widened


def lower(widened: Widened) -> Widened:
    """Fill in ``lowered`` and ``unlowered``."""
    lowered: dict[str, Lowered] = {}
    unlowered: dict[str, str] = {}
    for one in widened.branched:
        if why := _refusal(one):
            unlowered[one.weight] = why
        else:
            lowered[one.weight] = _lowered(widened, one)
    graphs: dict[str, fx.Graph] = {}
    feeds: dict[str, tuple[str, ...]] = {}
    for key, graph in widened.graphs.items():
        graphs[key] = fx.Graph()
        graphs[key].output(graphs[key].graph_copy(graph, {}))
        nodes = _fed(widened, key, graphs[key])
        for name, its in lowered.items():
            node = nodes.get(merged(name))
            if node is not None and its.shares:
                for user in list(node.users):
                    user.replace_all_uses_with(node)
                    graphs[key].erase_node(user)
        for node in graphs[key].find_nodes(op="get_attr"):
            if not node.users:  # tables of shares
                graphs[key].erase_node(node)
        graphs[key].lint()
        moved = {merged(name): teachers(name) for name in lowered}
        feeds[key] = tuple(moved.get(name, name) for name in widened.feeds.get(key, ()))
    return replace(widened, graphs=graphs, feeds=feeds, lowered=lowered, unlowered=unlowered)


def _refusal(one: Branched) -> str:
    """Why a layer's branches have no fused fold; empty if they have one."""
    kinds = {type(b) for b in one.chosen.branches}
    if any(b.norm for b in one.chosen.branches):
        return "its branches are normalized"
    if own := sorted(kind.__name__ for kind in kinds if kind not in RULES):
        return f"{own[0]} is a kind of its own"
    return ""


def _fed(widened: Widened, key: str, graph: fx.Graph) -> dict[str, fx.Node]:
    """Feed -> its placeholder: the last ones."""
    feeds = widened.feeds.get(key, ())
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    return dict(zip(feeds, inputs[len(inputs) - len(feeds) :], strict=True))


def _lowered(widened: Widened, one: Branched) -> Lowered:
    """With its shares, if all that reads the weight multiplies it by the same ones."""
    uses: list[Any] = []
    for key, graph in widened.graphs.items():
        node = _fed(widened, key, graph).get(merged(one.weight))
        for user in () if node is None else node.users:
            use: Any = None
            if user.target is copies.share:
                _, table, classes, *rest = user.args
                use = (table.target, classes.target, *rest)  # type: ignore[union-attr]
            uses += [] if use in uses else [use]
    names: tuple[str, ...] = ()
    share = None
    if len(uses) == 1 and uses[0] is not None:
        table, classes, at, dim, split = uses[0]
        names, share = (table, classes), Share(at, dim, tuple(split) if split else None)
    layer, branches = one.layer, one.chosen.branches
    tensors = tuple((*b.shapes(layer), *b.constants(layer)) for b in branches)
    cut = cut_of(layer, widened.maps[one.weight])
    return Lowered(Site(layer, branches, tensors, cut, share), names)

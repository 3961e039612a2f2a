"""Lower: layers whose weights have a fused fold read them from it, shares and all.

Before, a graph reads the merged weight (or, without branches, the parameter) and multiplies it by
shares; after, it reads the product. The fold (``gpdfx.kernels.fold``) picks its implementation by
the device of the parameters, so that a lowered teacher may be moved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ..branches import NONE, Layer
from ..fold import Branched, Lowered, merged, teachers
from ..kernels import copies
from ..kernels.fold import RULES, Share, Site, cut_of
from .branch import feed, layer_of, uses_of
from .widen import Widened


def lower(widened: Widened) -> Widened:
    """Fill in ``lowered`` and ``unlowered``."""
    widened, bare = _fed_bare(widened)
    unlowered = {one.weight: why for one in widened.branched if (why := _refusal(one))}
    read = _reads(widened)
    lowered = {
        one.weight: _lowered(widened, one, read.get(one.weight, []))
        for one in (*widened.branched, *bare)
        if one.weight not in unlowered
    }
    graphs: dict[str, fx.Graph] = {}
    feeds: dict[str, tuple[str, ...]] = {}
    for key, graph in widened.graphs.items():
        graphs[key] = _copied(graph)
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
    ordered = {name: lowered[name] for name in widened.maps if name in lowered}
    return replace(widened, graphs=graphs, feeds=feeds, lowered=ordered, unlowered=unlowered)


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _refusal(one: Branched) -> str:
    """Why a layer's branches have no fused fold; empty if they have one."""
    kinds = {type(b) for b in one.chosen.branches}
    if any(b.norm for b in one.chosen.branches):
        return "its branches are normalized"
    if own := sorted(kind.__name__ for kind in kinds if kind not in RULES):
        return f"{own[0]} is a kind of its own"
    return ""


# --------------------------------------------------------------------------- without branches
def _fed_bare(widened: Widened) -> tuple[Widened, list[Branched]]:
    """Layers without branches that have shares, and a student's part that is a block: their
    weights, too, come in as inputs."""
    reads: dict[str, list[fx.Node]] = {}
    for graph in widened.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            reads.setdefault(str(node.target), []).append(node)
    uses, bare = uses_of(widened.program), []
    for name in widened.inference.parameters(widened.program, rank=2):
        layer = layer_of(widened, uses, name) if _shares(reads.get(name, [])) else ""
        if isinstance(layer, Layer) and cut_of(layer, widened.maps[name]) is not None:
            bare.append(Branched(name, None, layer, NONE))
    graphs, feeds = {}, {}
    for key, graph in widened.graphs.items():
        graphs[key] = _copied(graph)
        training = widened.program.modes[key].site.training
        feeds[key] = feed(graphs[key], bare, training, widened.feeds.get(key, ()))
    return replace(widened, graphs=graphs, feeds=feeds), bare


# --------------------------------------------------------------------------- shares
def _fed(widened: Widened, key: str, graph: fx.Graph) -> dict[str, fx.Node]:
    """Feed -> its placeholder: the last ones."""
    feeds = widened.feeds.get(key, ())
    inputs = graph.find_nodes(op="placeholder")
    return dict(zip(feeds, inputs[len(inputs) - len(feeds) :], strict=True))


def _reads(widened: Widened) -> dict[str, list[fx.Node]]:
    """Weight -> where graphs read it merged, under its own name."""
    found: dict[str, list[fx.Node]] = {}
    for key, graph in widened.graphs.items():
        for name, node in _fed(widened, key, graph).items():
            found.setdefault(name, []).append(node)
    return found


def _shares(reads: list[fx.Node]) -> tuple[Any, ...] | None:
    """The arguments of ``copies.share``, if all that reads a weight multiplies it by the same
    ones."""
    uses: list[Any] = []
    for node in reads:
        for user in node.users:
            use: Any = None
            if user.target is copies.share:
                _, table, classes, *rest = user.args
                use = (table.target, classes.target, *rest)  # type: ignore[union-attr]
            uses += [] if use in uses else [use]
    return uses[0] if len(uses) == 1 else None


def _lowered(widened: Widened, one: Branched, reads: list[fx.Node]) -> Lowered:
    """With its shares, if it has them everywhere."""
    found = _shares(reads)
    names: tuple[str, ...] = ()
    share = None
    if found is not None:
        table, classes, at, dim, split = found
        names, share = (table, classes), Share(at, dim, tuple(split) if split else None)
    layer, branches = one.layer, one.chosen.branches
    tensors = tuple((*b.shapes(layer), *b.constants(layer)) for b in branches)
    cut = cut_of(layer, widened.maps[one.weight])
    return Lowered(Site(layer, branches, tensors, cut, share), names)

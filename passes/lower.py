"""Lower: layers whose weights have a fused fold read them from it, shares and all.

Before, a graph reads the merged weight (or, without branches, the parameter) and multiplies it by
shares; after, it reads the product. The fold (``gpdfx.kernels.fold``) picks its implementation by
the device of the parameters, so that a lowered teacher may be moved.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..branches.layer import Layer
from ..branches.sets import NONE
from ..kernels.fold import Site, cut_of
from .branch import layer_of, read_folded, uses_of
from .folded import Branched, Lowered, merged, reads, teachers
from .program import copied
from .shares import Shares
from .widen import Widened


def lower(program: Widened) -> Widened:
    """Fill in ``lowered`` and ``unlowered``."""
    unbranched = _unbranched(program)
    graphs = {key: copied(graph) for key, graph in program.graphs.items()}
    for key, graph in graphs.items():
        read_folded(graph, unbranched, program.modes[key].site.training)
    unlowered = {one.weight: why for one in program.branched if (why := _refusal(one))}
    read = [reads(graph) for graph in graphs.values()]
    lowered = {}
    for one in (*program.branched, *unbranched):
        if one.weight not in unlowered:
            nodes = [its[merged(one.weight)] for its in read if merged(one.weight) in its]
            lowered[one.weight] = _lowered(program, one, nodes)
            for node in nodes:
                node.args = (node.args[0], teachers(one.weight))
                for user in list(node.users) if lowered[one.weight].shares else ():
                    user.replace_all_uses_with(node)
                    user.graph.erase_node(user)
    for graph in graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            if not node.users:  # tables of shares
                graph.erase_node(node)
    ordered = {name: lowered[name] for name in program.maps if name in lowered}
    return replace(program, graphs=graphs, lowered=ordered, unlowered=unlowered)


def _refusal(one: Branched) -> str:
    """Why a layer's branches have no fused fold; empty if they have one."""
    if any(b.norm for b in one.chosen.branches):
        return "its branches are normalized"
    own = {type(b).__name__ for b in one.chosen.branches if b.fused(one.layer) is None}
    return f"{min(own)} is a kind of its own" if own else ""


def _unbranched(program: Widened) -> list[Branched]:
    """Layers without branches that have shares, and a student's part that is a block."""
    nodes: dict[str, list[fx.Node]] = {}
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="get_attr"):
            nodes.setdefault(str(node.target), []).append(node)
    uses, found = uses_of(program), []
    for name in program.parameters(rank=2):
        layer = layer_of(program, uses, name) if _shares(nodes.get(name, [])) else ""
        if isinstance(layer, Layer) and cut_of(layer, program.maps[name]) is not None:
            found.append(Branched(name, None, layer, NONE))
    return found


# --------------------------------------------------------------------------- shares
def _shares(nodes: list[fx.Node]) -> Shares | None:
    """Those of a weight, if all that reads it multiplies it by the same ones."""
    (first, *others) = {Shares.of(user) for node in nodes for user in node.users} or {None}
    return None if others else first


def _lowered(program: Widened, one: Branched, nodes: list[fx.Node]) -> Lowered:
    """With its shares, if it has them everywhere."""
    layer, maps, shares = one.layer, program.maps[one.weight], _shares(nodes)
    terms = tuple(filter(None, (b.fused(layer) for b in one.chosen.branches)))
    weighted = shares is not None or one.weight not in program.uses
    mean = program.options.extract == "mean"
    cut = cut_of(layer, maps, mean) if weighted or not mean else None
    share = shares.layout.of(layer, program.constants[shares.classes]) if shares else None
    site = Site(layer, terms, cut, share, mean and cut is not None)
    return Lowered(site, (shares.table, shares.classes) if shares else ())

"""The picture: layers, coloured by what widens together."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from ..access.find import find_teacher
from ..algebra.axes import leaves
from ..errors import InputError, check_place
from ..passes.capture.modes import GIVEN
from ..passes.program import is_tensor, origin, value
from ..passes.widen import Widened

if TYPE_CHECKING:  # imported where it is used: it takes a fifth of a second
    import networkx as nx


def graph(teacher: nn.Module, out: str | Path) -> None:
    """Draw the layers, coloured by the group that their output axis widens with; bridges are
    diamonds, layers that stay are grey. ``out`` ends in ``.svg``, ``.png`` or ``.html``."""
    import matplotlib
    import networkx as nx

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = find_teacher("graph", teacher)
    out = check_place(out)
    if out.suffix not in (".svg", ".png", ".html"):
        raise InputError(f"cannot draw to {out.name}", remedy="use a name ending in .svg or .html")
    layers = found.report().evidence.layers
    flow = nx.DiGraph(layers.edges)
    flow.add_nodes_from(layers)
    depths = _depths(flow)
    nx.set_node_attributes(flow, depths, "depth")
    at = nx.multipartite_layout(flow, subset_key="depth", align="horizontal")
    at = {name: (x, -float(depths[name])) for name, (x, _) in at.items()}
    rows = list(depths.values())
    size = (max(6.0, 2.6 * max(map(rows.count, rows))), max(4.0, 0.42 * (max(rows) + 2)))
    figure, ax = pyplot.subplots(figsize=size)
    groups = sorted({group for _, group in layers.nodes(data="group") if group >= 0})
    palette = pyplot.get_cmap("tab20")
    nx.draw_networkx_edges(flow, at, ax=ax, edge_color="#999", arrowsize=7, width=0.7)
    for name, layer in layers.nodes(data=True):
        color = palette(groups.index(layer["group"]) % 20) if layer["group"] >= 0 else "#ddd"
        shape = "darrow" if layer["kind"] == "bridge" else "round"
        box = {"boxstyle": f"{shape},pad=0.25", "facecolor": color, "edgecolor": "#555"}
        x, y = at[name]
        ax.text(x, y, name, ha="center", va="center", fontsize=6, bbox=box)
    title = "same colour: output channels widen together; grey: stays; arrow box: bridge"
    ax.set_title(title, fontsize=8)
    ax.axis("off")
    if out.suffix == ".html":
        svg = io.StringIO()
        figure.savefig(svg, format="svg", bbox_inches="tight")
        report = html.escape(str(found.report()))
        page = f"<!doctype html><meta charset=utf-8><title>gpdfx</title><pre>{report}</pre>"
        out.write_text(page + svg.getvalue()[svg.getvalue().index("<svg") :])
    else:
        figure.savefig(out, bbox_inches="tight")
    pyplot.close(figure)


def _depths(flow: nx.DiGraph) -> dict[str, int]:
    """The longest way to each layer; by first appearance where modules are called twice."""
    import networkx as nx

    order = nx.topological_sort(flow) if nx.is_directed_acyclic_graph(flow) else flow
    depths: dict[str, int] = {}
    for name in order:
        depths[name] = 1 + max((depths.get(p, 0) for p in flow.predecessors(name)), default=-1)
    return depths


def data_flow(widened: Widened) -> nx.DiGraph:
    """Inputs, modules with weights and bridges as nodes (``kind``), data flow between them as
    edges. ``group``: the leaf that a layer's output axis widens by, as a number, or -1."""
    import networkx as nx

    inference, widths = widened.inference, widened.widths
    modes = [m for m in widened.modes.values() if not m.site.training and m.site.mode != GIVEN]
    bridged = {b.node: b.reason for b in widened.bridges}
    flow = nx.DiGraph()
    reach: dict[fx.Node, set[str]] = {}  # the layers that a node's value comes from
    for path, node in [(m.site.path, node) for m in modes for node in m.nodes]:
        if node.op == "placeholder":
            name = f"{path} {node.name}".lstrip()
            flow.add_node(name, kind="input", group=-1)
            reach[node] = {name}
            continue
        if isinstance(value(node), int | float | torch.SymInt):
            continue  # sizes are no data flow
        reach[node] = set().union(*(reach.get(n, set()) for n in node.all_input_nodes))
        if node.op != "call_function" or not is_tensor(node):
            continue
        read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        matrices = [name for name in read if len(inference.tensors.get(name, ())) > 1]
        if node.name in bridged:
            name = f"{(origin(node).path or '(root)')} [{node.name}]"
            flow.add_node(name, kind="bridge", group=-1, why=bridged[node.name])
        elif matrices:
            name = matrices[-1].removesuffix(".weight")
            output = leaves(inference.solver.resolve(inference.tensors[matrices[-1]][0]))
            wide = bool(output) and widths(output[0]) != output[0].size
            flow.add_node(name, kind="layer", group=output[0].order if wide else -1)
        else:
            continue
        flow.add_edges_from((source, name) for source in reach[node] if source != name)
        reach[node] = {name}
    return flow

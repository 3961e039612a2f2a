"""The picture: layers, coloured by what widens together."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx

from ..errors import InputError

if TYPE_CHECKING:
    from ..teacher.module import Teacher


def graph(teacher: Teacher, out: str | Path) -> None:
    """Draw the layers, coloured by the group that their output axis widens with; bridges are
    diamonds, layers that stay are grey. ``out`` ends in ``.svg``, ``.png`` or ``.html``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out = Path(out)
    if out.suffix not in (".svg", ".png", ".html"):
        raise InputError(f"cannot draw to {out.name}", remedy="use a name ending in .svg or .html")
    layers = teacher.report().evidence.layers
    acyclic = nx.DiGraph((a, b) for a, b in layers.edges if a != b)
    acyclic.add_nodes_from(layers.nodes)
    depth: dict[str, int] = {}
    for name in _order(acyclic):
        depth[name] = 1 + max((depth.get(p, 0) for p in acyclic.predecessors(name)), default=-1)
    for name in acyclic:
        acyclic.nodes[name]["depth"] = depth[name]
    place = nx.multipartite_layout(acyclic, subset_key="depth", align="horizontal")
    place = {n: (x, -float(depth[n])) for n, (x, _) in place.items()}
    columns = max(sum(d == k for d in depth.values()) for k in set(depth.values()))
    size = (max(6.0, 2.6 * columns), max(4.0, 0.42 * (max(depth.values()) + 2)))
    figure, ax = pyplot.subplots(figsize=size)
    groups = sorted({d["group"] for _, d in layers.nodes(data=True) if d["group"] >= 0})
    palette = pyplot.get_cmap("tab20")
    nx.draw_networkx_edges(acyclic, place, ax=ax, edge_color="#999", arrowsize=7, width=0.7)
    for name, data in layers.nodes(data=True):
        x, y = place[name]
        color = palette(groups.index(data["group"]) % 20) if data["group"] >= 0 else "#ddd"
        shape = {"bridge": "darrow", "input": "round"}.get(data["kind"], "round")
        box = {"boxstyle": f"{shape},pad=0.25", "facecolor": color, "edgecolor": "#555"}
        ax.text(x, y, name, ha="center", va="center", fontsize=6, bbox=box)
    title = "same colour: output channels widen together; grey: stays; arrow box: bridge"
    ax.set_title(title, fontsize=8)
    ax.axis("off")
    if out.suffix == ".html":
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        report = html.escape(str(teacher.report()))
        page = f"<!doctype html><meta charset=utf-8><title>gpdfx</title><pre>{report}</pre>"
        out.write_text(page + buffer.getvalue()[buffer.getvalue().index("<svg") :])
    else:
        figure.savefig(out, bbox_inches="tight")
    pyplot.close(figure)


def _order(acyclic: nx.DiGraph) -> list[str]:
    """Topological, or by first appearance where modules are called twice."""
    return list(nx.topological_sort(acyclic) if nx.is_directed_acyclic_graph(acyclic) else acyclic)

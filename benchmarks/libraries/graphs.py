"""Graphs: convolutions on edge lists and on dense adjacencies, pooling, points, molecules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries.entry import Entry, Inputs, Table, floats, given, join, of, tokens

NODES, EDGES, FEATURES = 12, 30, 6


def _edges() -> tuple[Tensor, ...]:
    """Of one graph, without loops, sorted by where they lead; at least two lead to every node."""
    draw = torch.Generator().manual_seed(0)
    source = torch.randint(NODES, (EDGES,), generator=draw)
    target = (torch.arange(EDGES) % NODES).sort().values
    return (torch.stack([torch.where(source == target, (source + 1) % NODES, source), target]),)


def _dense() -> tuple[Tensor, ...]:
    """Symmetric adjacencies of four graphs of eight nodes."""
    links = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.6
    return ((links | links.mT).float(),)


def _sparse(layout: torch.layout) -> Inputs:
    (edges,) = _edges()
    dense = torch.zeros(NODES, NODES).index_put_((edges[1], edges[0]), torch.ones(EDGES))
    return lambda: (dense.to_sparse(layout=layout),)


NODE = floats(NODES, FEATURES)
GRAPH = join(NODE, _edges)
WEIGHTED = join(GRAPH, floats(EDGES, 3))
BATCH = given(torch.arange(NODES) // 6)
ATOMS = join(tokens(NODES, among=9), floats(NODES, 3), BATCH)
POINTS = floats(NODES, 3)

_pyg = partial(of, "torch_geometric.nn")


def _convs(make: Callable[[Any, int, int], nn.Module], inputs: Inputs = GRAPH) -> Entry:
    """Two of them, a norm and an activation between, and a linear layer."""
    names = "x, edge_index, edge_attr" if inputs is WEIGHTED else "x, edge_index"

    def build(pyg: Any) -> nn.Module:
        first, second = make(pyg, FEATURES, 16), make(pyg, 16, 12)
        steps = [(first, f"{names} -> x"), nn.BatchNorm1d(16), nn.ReLU()]
        network: nn.Module = pyg.Sequential(
            names, [*steps, (second, f"{names} -> x"), nn.ReLU(), nn.Linear(12, 5)]
        )
        return network

    return _pyg(build, inputs)


def _mlp(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(layers[0], *(m for x in layers[1:] for m in (nn.ReLU(), x)))


class Pooled(nn.Module):
    """Two convolutions, one vector a graph, a linear layer."""

    def __init__(self, pyg: Any, pool: Callable[..., Any], width: int = 16) -> None:
        super().__init__()
        self.first, self.second = pyg.GraphConv(FEATURES, 16), pyg.GCNConv(16, 16)
        self.pool, self.last = pool, nn.Linear(width, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.second(self.first(x, edge_index).relu(), edge_index).relu()
        y: Tensor = self.last(self.pool(x, batch))
        return y


class DensePool(nn.Module):
    """Nodes assigned to four clusters by a network of their own (DiffPool, MinCut)."""

    def __init__(self, pyg: Any, pool: str) -> None:
        super().__init__()
        self.embed, self.assign = pyg.DenseSAGEConv(FEATURES, 16), pyg.DenseGCNConv(FEATURES, 4)
        self.after, self.last = pyg.DenseGraphConv(16, 16), nn.Linear(16, 3)
        self.pool = getattr(pyg, pool)

    def forward(self, x: Tensor, adj: Tensor) -> tuple[Tensor, Tensor]:
        s = self.assign(x, adj)
        x, adj, *losses = self.pool(self.embed(x, adj).relu(), adj, s)
        return self.last(self.after(x, adj).relu().mean(1)), sum(losses)


class PointNet(nn.Module):
    """Messages of neighbours' places and features, and the maximum of all points."""

    def __init__(self, pyg: Any) -> None:
        super().__init__()
        self.first = pyg.PointNetConv(_mlp(6, 16, 16))
        self.second = pyg.PointNetConv(_mlp(19, 16), _mlp(16, 24))
        self.last = nn.Linear(24, 4)

    def forward(self, pos: Tensor, edge_index: Tensor) -> Tensor:
        x = self.second(self.first(pos, pos, edge_index).relu(), pos, edge_index)
        y: Tensor = self.last(x.relu().amax(0))
        return y


class DeepGCN(nn.Module):
    """Residual GEN convolutions (the package's example for large graphs)."""

    def __init__(self, pyg: Any, layers: int = 3) -> None:
        super().__init__()
        self.encode, self.edges = nn.Linear(FEATURES, 16), nn.Linear(3, 16)
        self.layers = nn.ModuleList(
            pyg.DeepGCNLayer(
                pyg.GENConv(16, 16, aggr="softmax", t=1.0, learn_t=True, num_layers=2),
                *(pyg.LayerNorm(16, affine=True), nn.ReLU()),
                dropout=0.1,
            )
            for _ in range(layers)
        )
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        x, edge_attr = self.encode(x), self.edges(edge_attr)
        for layer in self.layers:
            x = layer(x, edge_index, edge_attr)
        y: Tensor = self.last(x)
        return y


class Relations(nn.Module):
    def __init__(self, pyg: Any) -> None:
        super().__init__()
        self.first = pyg.RGCNConv(FEATURES, 16, 3, num_bases=2)
        self.second = pyg.FastRGCNConv(16, 8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, kind: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x, edge_index, kind).relu(), edge_index, kind)
        return y


def _complete(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of atoms of a molecule: the package's own search needs a compiled extension."""
    pairs = (batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)
    row, col = pairs.nonzero().T
    return torch.stack([row, col]), (pos[row] - pos[col]).norm(dim=-1)


_DEGREES = torch.tensor([0, 2, 5, 4, 1])
_STATISTICS = {"aggregators": ["mean", "min", "max", "std"], "deg": _DEGREES}
_SCALERS = ["identity", "amplification", "attenuation"]

TABLE: Table = {
    "torch-geometric": {
        "GCN": _pyg(lambda g: g.GCN(FEATURES, 16, 3, 5, dropout=0.1), GRAPH),
        "GCN/jumping": _pyg(lambda g: g.GCN(FEATURES, 16, 3, 5, jk="cat"), GRAPH),
        "GCN/csr": _pyg(lambda g: g.GCN(FEATURES, 16, 2, 5), NODE, _sparse(torch.sparse_csr)),
        "GraphSAGE": _pyg(lambda g: g.GraphSAGE(FEATURES, 16, 2, 5, norm="LayerNorm"), GRAPH),
        "GraphSAGE/lstm": _convs(lambda g, a, b: g.SAGEConv(a, b, aggr="lstm")),
        "GAT": _pyg(lambda g: g.GAT(FEATURES, 16, 2, 5, heads=2), GRAPH),
        "GATv2": _pyg(lambda g: g.GAT(FEATURES, 16, 2, 5, v2=True, heads=2, dropout=0.1), GRAPH),
        "GATv2/edges": _convs(lambda g, a, b: g.GATv2Conv(a, b // 2, 2, edge_dim=3), WEIGHTED),
        "GIN": _pyg(lambda g: g.GIN(FEATURES, 16, 3, 5, norm="batch_norm"), GRAPH),
        "GINE": _convs(lambda g, a, b: g.GINEConv(_mlp(a, b, b), edge_dim=3), WEIGHTED),
        "PNA": _pyg(lambda g: g.PNA(FEATURES, 16, 2, 5, scalers=_SCALERS, **_STATISTICS), GRAPH),
        "EdgeCNN": _pyg(lambda g: g.EdgeCNN(FEATURES, 16, 2, 5), GRAPH),
        "ChebConv": _convs(lambda g, a, b: g.ChebConv(a, b, 3)),
        "TransformerConv": _convs(
            lambda g, a, b: g.TransformerConv(a, b // 2, 2, beta=True, edge_dim=3), WEIGHTED
        ),
        "ResGatedGraphConv": _convs(
            lambda g, a, b: g.ResGatedGraphConv(a, b, edge_dim=3), WEIGHTED
        ),
        "NNConv": _convs(lambda g, a, b: g.NNConv(a, b, _mlp(3, 8, a * b)), WEIGHTED),
        "GatedGraphConv": _pyg(lambda g: g.GatedGraphConv(16, 2), GRAPH),
        "GPS": _pyg(lambda g: g.GPSConv(16, g.GINConv(_mlp(16, 16)), 2), floats(NODES, 16), _edges),
        "RGCN": _pyg(Relations, GRAPH, given(torch.arange(EDGES) % 3)),
        "DeepGCN": _pyg(DeepGCN, WEIGHTED),
        "GraphUNet": _pyg(lambda g: g.GraphUNet(FEATURES, 16, 5, depth=2), GRAPH),
        "AttentiveFP": _pyg(lambda g: g.AttentiveFP(FEATURES, 16, 5, 3, 2, 2), WEIGHTED, BATCH),
        "LINKX": _pyg(lambda g: g.LINKX(NODES, FEATURES, 16, 5, 2), GRAPH),
        "LightGCN": _pyg(lambda g: g.LightGCN(NODES, 16, 2), _edges),
        "SGFormer": _pyg(lambda g: g.SGFormer(FEATURES, 16, 5), GRAPH, BATCH),
        "mean": _pyg(lambda g: Pooled(g, partial(g.global_mean_pool, size=2)), GRAPH, BATCH),
        "Set2Set": _pyg(lambda g: Pooled(g, g.Set2Set(16, 2), 32), GRAPH, BATCH),
        "attention": _pyg(
            lambda g: Pooled(g, g.AttentionalAggregation(_mlp(16, 8, 1))), GRAPH, BATCH
        ),
        "diff_pool": _pyg(
            lambda g: DensePool(g, "dense_diff_pool"), floats(4, 8, FEATURES), _dense
        ),
        "mincut_pool": _pyg(
            lambda g: DensePool(g, "dense_mincut_pool"), floats(4, 8, FEATURES), _dense
        ),
        "PointNet": _pyg(PointNet, POINTS, _edges),
        "PointTransformer": _pyg(
            lambda g: g.PointTransformerConv(FEATURES, 16, _mlp(3, 16), _mlp(16, 16)),
            *(NODE, POINTS, _edges),
        ),
        "SchNet": _pyg(lambda g: g.SchNet(16, 16, 2, 8, interaction_graph=_complete), ATOMS),
    },
    "egnn-pytorch": {
        "EGNN": of(
            "egnn_pytorch", lambda m: m.EGNN(16, m_dim=16), floats(2, 9, 16), floats(2, 9, 3)
        ),
        "EGNN_Network": of(
            "egnn_pytorch",
            lambda m: m.EGNN_Network(depth=2, dim=16, num_tokens=9, num_positions=16, m_dim=16),
            *(tokens(2, 9, among=9), floats(2, 9, 3)),
        ),
        "EGNN_Sparse": of("egnn_pytorch", lambda m: m.EGNN_Sparse(16), floats(NODES, 19), _edges),
    },
}

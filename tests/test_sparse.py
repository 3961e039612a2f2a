"""Sparse tensors: an adjacency is data, and what is multiplied by it widens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gpdfx
from gpdfx import storage

COO, CSR, CSC = Tensor.to_sparse_coo, Tensor.to_sparse_csr, Tensor.to_sparse_csc


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)


class Convolution(Base):
    """Two products: as in the usual graph network, and from the right."""

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        h = torch.sparse.mm(adj, self.first(x)).relu()
        h = torch.spmm(adj.t(), h) + (h.t() @ adj).t() + torch.addmm(h, adj, h, alpha=0.5)
        y: Tensor = self.last(h) * adj.size(0)
        return y


class Normed(Base):
    """Degrees, and the values themselves."""

    def forward(self, x: Tensor, adj: Tensor) -> tuple[Tensor, Tensor]:
        if not adj.is_sparse or adj.layout != torch.sparse_coo:
            raise TypeError
        adj = (adj * 2.0).coalesce()
        degree = torch.sparse.sum(adj, 1).to_dense() + 1
        return self.last((adj @ self.first(x)) / degree[:, None]), adj.values().sum()


class Compressed(Base):
    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        degree = adj.crow_indices().diff().to(x.dtype) + 1
        y: Tensor = self.last((adj @ self.first(x)).relu() / degree[:, None])
        return y


class Made(Base):
    """One that forward makes of an edge list."""

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        adj = torch.sparse_coo_tensor(edges, weights, (x.shape[0], x.shape[0]))
        y: Tensor = self.last((adj @ self.first(x)).relu())
        return y


def graph(nodes: int, kind: Callable[[Tensor], Tensor], seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    dense = torch.rand(nodes, nodes, generator=draw)
    dense = torch.where(dense > 0.6, dense, 0.0)
    return torch.randn(nodes, 6, generator=draw), kind(dense)


@pytest.mark.parametrize(
    ("network", "kind"),
    [(Convolution, COO), (Convolution, CSR), (Convolution, CSC), (Normed, COO), (Compressed, CSR)],
)
def test_products_of_a_sparse_input_widen(
    network: type[nn.Module], kind: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = network().eval()
    teacher = gpdfx.expand(model, 2, example_inputs=graph(7, kind), branches=None).eval()
    report = teacher.report()
    assert report.widened == 1.0
    assert not report.bridged
    gpdfx.save(teacher, tmp_path / "teacher.safetensors")
    loaded = gpdfx.load(tmp_path / "teacher.safetensors", network()).eval()
    for nodes in (7, 9, 5):  # other nodes, other links
        call = graph(nodes, kind, seed=nodes)
        want = model(*call)
        for one in (teacher, teacher.student, copy.deepcopy(teacher), loaded):
            torch.testing.assert_close(one(*call), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gpdfx.collapse(teacher)(*call), want, rtol=0, atol=0)


def test_indices_of_a_file_are_checked(tmp_path: Path) -> None:
    teacher = gpdfx.expand(Convolution(), 2, example_inputs=graph(5, COO), verify=False)
    gpdfx.save(teacher, tmp_path / "t")
    tensors, header = storage.FILE.read(tmp_path / "t")
    (name,) = (n for n, x in tensors.items() if n[0] == "." and x.dtype == torch.int64)
    storage.FILE.write(tmp_path / "t", tensors | {name: tensors[name] - 9}, header)
    with pytest.raises(gpdfx.InputError, match="index of a sparse tensor is negative"):
        gpdfx.load(tmp_path / "t", Convolution())


def test_gradients_reach_the_values() -> None:
    torch.manual_seed(0)
    model = Convolution()
    teacher = gpdfx.expand(model, 2, example_inputs=graph(7, COO), branches=None)
    found = []
    for one in (model, teacher, teacher.student):
        x, adj = graph(7, COO)
        adj.requires_grad_()
        one(x, adj).square().sum().backward()
        assert adj.grad is not None
        entries = adj.detach().to_dense() != 0  # torch gives some products' gradients everywhere
        found.append(adj.grad.to_dense()[entries])
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=1e-4, atol=1e-4)


def test_a_sparse_tensor_that_forward_makes_widens() -> None:
    torch.manual_seed(0)
    (x, adj), model = graph(7, COO), Made()
    example = x, adj.indices().clone(), adj.values().clone()
    teacher = gpdfx.expand(model, 2, example_inputs=example, branches=None)
    assert teacher.report().widened == 1.0
    twice = x, example[1].repeat(1, 2), example[2].repeat(2)  # entries add up
    torch.testing.assert_close(teacher(*twice), model(*twice))


class Squared(Base):
    """The product of two sparse tensors depends on values in its number of entries."""

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        y: Tensor = self.last(torch.sparse.mm(adj, adj) @ self.first(x))
        return y


def test_what_a_graph_cannot_say_of_a_sparse_tensor_stays_python() -> None:
    torch.manual_seed(0)
    model, call = Squared(), graph(7, COO)
    teacher = gpdfx.expand(model, 2, example_inputs=call, branches=None)
    assert "two sparse tensors" in str(teacher.report())
    torch.testing.assert_close(teacher(*call), model(*call))


def test_other_layouts_are_refused() -> None:
    x, dense = graph(8, Tensor.to_dense)
    with pytest.raises(gpdfx.GpdfxError, match="sparse_bsr"):
        gpdfx.expand(Convolution(), 2, example_inputs=(x, dense.to_sparse_bsr((2, 2))))

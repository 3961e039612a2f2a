"""Sizes that depend on values (boolean indices, ``nonzero``) stay in the graph, and are new at
every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gpdfx


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, 3)


class Edges(Base):
    """Messages along the edges that are no loops, and one loop for every node."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges[:, edges[0] != edges[1]]
        source, target = torch.cat([edges, torch.arange(x.shape[0]).expand(2, -1)], 1)
        x = self.first(x)
        x = torch.zeros_like(x).index_add(0, target, x[source])
        y: Tensor = self.last(self.norm(x).relu())
        return y


class Picked(Base):
    """Only of rows that a mask picks, normalised over these; how many they are."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        x = self.norm(self.first(x)[mask]).relu()
        return self.last(self.inner(x)), x.shape[0]


class PutBack(Base):
    """Rows that a mask picks are replaced in place."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        y = x.clone()
        y[mask] = self.inner(x[mask]).relu()
        z: Tensor = self.last(y)
        return z


class Pairs(Base):
    """All pairs of points that are near each other."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        row, col = (mask[:, None] & mask).nonzero().T
        x = self.first(x)
        message = x[row] * self.inner(x[col]).sigmoid()
        index = row[:, None].expand_as(message)
        y: Tensor = self.last(torch.zeros_like(x).scatter_add(0, index, message))
        return y


class Plane(Base):
    """A mask of two dimensions."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found = self.first(torch.stack([x, x + 1, x * x], 1))
        both = torch.stack([mask, ~mask, mask], 1)
        y: Tensor = self.last(self.inner(found[both]).relu())
        return y


class Places(Base):
    """A mask beside an index: the places where it holds, read and written."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        table = torch.stack([x, -x], 1)
        which = torch.zeros(1, dtype=torch.long)
        chosen = self.inner(table[mask, which])
        table = table.index_put((mask, which + 1), chosen)
        y: Tensor = self.last(table.sum(1))
        return y


class Features(Base):
    """A mask over channels, where positions count; one that is wide itself, where they do not."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        kept = torch.arange(16) % 3 > 0
        y = self.inner(x).masked_fill(mask[:, None], 0.0)
        y = y.index_put((x > 0,), torch.zeros(()))
        z: Tensor = self.last(y)
        return z + x[:, kept].sum(1, keepdim=True)


EDGES = torch.tensor([[0, 1, 2, 3, 4, 4, 6, 2], [1, 1, 3, 3, 0, 5, 5, 0]])
MASK = torch.tensor([True, False, True, True, False, True, False])
OTHER = (
    torch.tensor([[5, 5, 5], [0, 0, 5]]),
    torch.tensor([False, True, False, True] + 3 * [False]),
)
KINDS = (Edges, Picked, PutBack, Pairs, Plane, Places, Features)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_sizes_that_depend_on_values_are_captured(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(7, 6)
    own, other = (EDGES, OTHER[0]) if kind is Edges else (MASK, OTHER[1])
    teacher = gpdfx.expand(model, 2, example_inputs=(x, own), branches=None)
    report = teacher.report()
    assert not report.apart
    assert report.widened == 1 if kind is not Features else report.widened > 0.5
    if kind not in (Places, Features):
        assert not report.bridged
    for given in (own, other, own.flip(-1)):
        want, found = model.eval()(x, given), teacher.eval()(x, given)
        want, found = ((y if isinstance(y, tuple) else (y,)) for y in (want, found))
        torch.testing.assert_close(found[0], want[0])
        assert list(found[1:]) == list(want[1:])
    plain = gpdfx.collapse(teacher)
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))

"""``int(tensor)`` is a number that the graph computes: a size that is new at every call."""

from __future__ import annotations

import builtins
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import gpdfx


class Sums(nn.Module):
    """One row for every group, as many as the largest number of a group says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def rows(self, groups: Tensor) -> int:
        return int(groups.max()) + 1

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        n = self.rows(groups)
        assert isinstance(n, int)
        assert issubclass(bool, int)
        x = self.norm(self.first(x)).relu()
        y: Tensor = self.last(x.new_zeros(int(n), int("16")).index_add(0, groups, x))
        return y


class Average(Sums):
    """Of a number that is no integer: towards zero, as ``int`` goes."""

    def rows(self, groups: Tensor) -> int:
        return int(groups.max() + 1.75)


class Half(Sums):
    """A number that is computed of it."""

    def rows(self, groups: Tensor) -> int:
        return int(int(groups.max()) / 2 + 1.75) + int(groups.max())


class Item(Sums):
    """Of what is a number already."""

    def rows(self, groups: Tensor) -> int:
        return int(groups.max().item()) + 1


class Branch(Sums):
    """What it computes depends on how many there are."""

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        if self.rows(groups) > 3:
            x = 2 * x
        return super().forward(x, groups)


class Loop(Sums):
    """As many steps as the number says."""

    def forward(self, x: Tensor, groups: Tensor) -> Tensor:
        for _ in range(self.rows(groups)):
            x = 2 * x
        return super().forward(x, groups)


GROUPS = torch.tensor([0, 0, 1, 1, 2, 2, 2])
OTHERS = (torch.zeros_like(GROUPS), torch.arange(7), GROUPS)


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """The name is Python's own again, whether the module was captured or not."""
    yield
    assert "int" not in globals()
    assert int is builtins.int


@pytest.mark.parametrize("kind", [Sums, Average, Half, Item], ids=lambda kind: kind.__name__)
def test_a_size_from_int_is_captured(kind: type[Sums]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(7, 6)
    teacher = gpdfx.expand(model, 2, example_inputs=(x, GROUPS), branches=None)
    report = teacher.report()
    assert not report.apart
    assert not report.bridged
    assert report.widened == 1
    for groups in OTHERS:
        torch.testing.assert_close(teacher.eval()(x, groups), model.eval()(x, groups))


@pytest.mark.parametrize("kind", [Branch, Loop], ids=lambda kind: kind.__name__)
def test_what_depends_on_it_is_never_baked(kind: type[Sums]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(7, 6)
    teacher = gpdfx.expand(model, 2, example_inputs=(x, GROUPS), branches=None)
    (reason,) = teacher.report().apart.values()
    assert "data-dependent" in reason
    assert "self.rows(groups)" in reason
    for groups in OTHERS:
        torch.testing.assert_close(teacher.eval()(x, groups), model.eval()(x, groups))


class Attends(nn.Module):
    """Steps with a state of the input's dtype, which attend to what a mask of lengths leaves: the
    largest length and the input's own are one size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.score, self.last = nn.GRUCell(8, 12), nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(0, torch.max(lengths).item()) < lengths.unsqueeze(1)
        h, ys = torch.zeros(x.shape[0], 12, dtype=x.dtype), []
        for k in range(x.shape[1]):
            h = self.cell(x[:, k], h)
            scores = (x @ self.score(h).unsqueeze(2)).squeeze(2)
            weights = scores.masked_fill(~mask, -1e4).softmax(1)
            ys.append(self.last(h) + (weights.unsqueeze(2) * x).sum(1))
        return torch.stack(ys, 1)


class Decoder(nn.Module):
    def __init__(self, python: bool) -> None:
        super().__init__()
        self.first, self.steps, self.last = nn.Linear(6, 8), Attends(), nn.Linear(8, 3)
        self.python = python

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.first(x)
        if self.python and x.sum().item() > 1e6:
            x = 2 * x
        y: Tensor = self.last(self.steps(x, lengths))
        return y


@pytest.mark.parametrize("python", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("dynamic", ["sizes", "none"])
def test_a_number_that_is_another_size_is_that_size(python: bool, dynamic: str) -> None:
    """In parts ``steps`` makes its state in the dtype of what it is given, also in float64."""
    torch.manual_seed(0)
    model, x = Decoder(python).eval(), torch.randn(4, 5, 6)
    lengths = torch.tensor([5, 3, 2, 5])
    options = {"branches": None, "dynamic": dynamic}
    teacher = gpdfx.expand(model, 2, example_inputs=(x, lengths), **options).eval()
    report = teacher.report()
    assert list(report.apart) == [""] * python
    assert report.widened > 0.9
    given = x[:2] if dynamic == "sizes" else x.flip(0)
    for ones in (lengths, lengths.flip(0)):
        torch.testing.assert_close(
            teacher(given, ones[: len(given)]), model(given, ones[: len(given)])
        )

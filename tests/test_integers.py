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


@pytest.mark.parametrize("kind", [Sums, Average, Half], ids=lambda kind: kind.__name__)
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

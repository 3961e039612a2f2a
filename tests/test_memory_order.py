"""Dropout deals out its random numbers in the memory order of what it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gpdfx


class Transposed(nn.Module):
    """Batch norm makes contiguous what its fake kernel leaves transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        y = self.second(nn.functional.dropout(y.relu(), 0.3, self.training)).relu()
        out: Tensor = self.last(y)
        return out


class ByDtype(nn.Module):
    """Its memory is in another order in float32 than in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            x = x.to(memory_format=torch.channels_last)
        y = nn.functional.dropout(self.first(x).relu(), 0.3, self.training)
        out: Tensor = self.last(y)
        return out.mean((2, 3), dtype=x.dtype)


@pytest.mark.parametrize(
    ("model", "size"), [(Transposed(), (4, 5, 6)), (ByDtype(), (4, 3, 8, 8))], ids=["norm", "dtype"]
)
def test_equal_seeds_give_equal_functions(model: nn.Module, size: tuple[int, ...]) -> None:
    teacher = gpdfx.expand(model.train(), 2, example_inputs=(torch.randn(size),), branches=None)
    report = teacher.report()
    assert report.widened == 1
    assert not report.apart
    for dtype in (torch.float32, torch.float64):
        teacher, x = teacher.to(dtype), torch.randn(size, dtype=dtype)
        results = []
        for run in (teacher, teacher.student):
            torch.manual_seed(0)
            results.append(run(x))
        torch.testing.assert_close(*results)

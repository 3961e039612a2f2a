"""Layers with branches, and teachers of small networks that have them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from gpdfx.calls import tree

from .networks import NETWORKS


def a_teacher(name: str, branches: Any = "auto", ratio: float = 2, **options: Any) -> Any:
    """A model and its teacher: copies of those that a test with the same options had before."""
    return copy.deepcopy(_a_teacher(name, branches, ratio, **options))


@functools.lru_cache(maxsize=8)
def _a_teacher(name: str, branches: Any, ratio: float, **options: Any) -> Any:
    case = NETWORKS[name]
    model = case.model()
    options = {"verify": False, "dynamic": "batch", **options}
    inputs = case.inputs()
    return model, gpdfx.expand(model, ratio, example_inputs=inputs, branches=branches, **options)


def leaf(y: Any) -> Tensor:
    found = tree.leaves(y)[0]
    assert isinstance(found, Tensor)
    return found


def plain_teacher(branches: Any, **options: Any) -> tuple[Plain, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(8, 3, 9, 9)
    ratio = options.pop("ratio", 2)
    return model, gpdfx.expand(model, ratio, example_inputs=(x,), branches=branches, **options), x


class Plain(nn.Module):
    """A layer of each kind, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return self.head(self.point(x).mean((2, 3)))

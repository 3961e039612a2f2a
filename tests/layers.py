"""Layers with branches, and teachers of small networks that have them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpdfx
from gpdfx.algebra.frozen import Frozen, share_table
from gpdfx.branches.layer import Layer
from gpdfx.branches.sets import NONE, SETS
from gpdfx.calls import tree
from gpdfx.kernels import copies
from gpdfx.kernels.fold import Share, Site, cut_of, fold, key_of
from gpdfx.teacher.extract import take_first

from .networks import NETWORKS

LAYERS = {
    "conv": Layer(1, 6, 4, (3, 3), "conv"),
    "even kernel": Layer(1, 6, 4, (2, 4), "conv"),
    "grouped": Layer(2, 3, 4, (3, 3), "conv"),
    "depthwise": Layer(5, 1, 1, (5, 5), "conv"),
    "conv1d": Layer(1, 4, 4, (3,), "conv"),
    "conv3d": Layer(1, 4, 2, (3, 1, 3), "conv"),
    "transposed": Layer(2, 3, 4, (3, 2), "transposed"),
    "1x1": Layer(1, 16, 8, (1, 1), "conv"),
    "linear": Layer(1, 16, 8, (), "linear"),
    "matrix": Layer(1, 16, 8, (), "matrix"),
}


def stored_shape(layer: Layer) -> tuple[int, ...]:
    return layer.stored


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


class Case:
    """A layer with random branches, its shares, and the student in it: of every axis the first of
    two copies, of every group where there are several."""

    def __init__(
        self, layer: Layer, chosen: str, dtype: torch.dtype = torch.float64, mean: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.layer, self.dtype = layer, dtype
        self.branches = (SETS | {"none": NONE})[chosen].on(layer).branches
        self.origin = self.leaf(*stored_shape(layer))
        self.scales = [self.leaf(1 + len(self.branches), layer.channels)] if self.branches else []
        self.own: list[dict[str, Tensor]] = []
        for branch in self.branches:
            own = {name: self.leaf(*size) for name, size in branch.shapes(layer).items()}
            own |= {name: c.to(dtype) for name, c in branch.constants(layer).items()}
            self.own.append({name: own[name] for name in branch.term(layer).names})
        grouped = layer.groups > 1 and layer.outputs > 1  # in depthwise layers groups have copies
        self.maps = tuple(
            self.axis(layer.groups if grouped and not d else 1, size, d < 2)
            for d, size in enumerate(self.origin.shape)
        )
        dim = 0 if layer.layout in ("transposed", "matrix") else 1
        axis, rows = self.maps[dim], self.origin.shape[1 - dim]
        drawn = share_table(axis, (rows,), np.random.default_rng(0))
        split = (axis.teacher // axis.run, axis.run)
        ones = [1] * (self.origin.ndim - 2)
        table = torch.from_numpy(drawn if dim else np.ascontiguousarray(drawn.T)).to(dtype)
        self.table = table.view(*((rows, -1, 1) if dim else (-1, 1, rows)), *ones)
        self.classes = torch.from_numpy(axis.classes[0][:: axis.run])
        self.share = Share(dim - self.table.ndim, dim, split)
        terms = tuple(branch.term(layer) for branch in self.branches)
        cut = cut_of(layer, self.maps, mean)
        assert cut is not None
        self.site = Site(layer, terms, cut, self.share, mean)

    def leaf(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype).requires_grad_()

    @staticmethod
    def axis(groups: int, size: int, wide: bool) -> Frozen:
        inner = np.arange(size // groups)
        student = (len(inner) + 1) // 2 if wide else len(inner)
        index = np.arange(groups)[:, None] * student + inner % student
        return Frozen(groups * student, index.ravel())

    @property
    def tensors(self) -> list[Tensor]:
        own = [t for tensors in self.own for t in tensors.values()]
        return [self.origin, *self.scales, self.table, self.classes, *own]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors if t.requires_grad]

    def naive(self) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's weight, summand by summand."""
        layer = self.layer
        total = layer.view(self.origin)
        rows = list(self.scales[0]) if self.scales else []
        if rows:
            total = total * layer.per_channel(rows.pop(0))
        for branch, own, row in zip(self.branches, self.own, rows, strict=True):
            total = total + branch.kernel(layer, own) * layer.per_channel(row)
        weight = layer.store(total)
        share = self.share
        split = list(share.split) if share.split else None
        wide = copies.share(weight, self.table, self.classes, share.at, share.dim, split)
        return wide, self.mean(weight) if self.site.mean else take_first(weight, self.maps)

    def mean(self, weight: Tensor) -> Tensor:
        """Of all copies: by shares along the inputs, else in equal parts."""
        share, ones = self.share, torch.ones_like(weight)
        split = list(share.split) if share.split else None
        shares = copies.share(ones, self.table, self.classes, share.at, share.dim, split)
        dims = [share.dim, 1 - share.dim]
        for dim, part in zip(dims, (shares, ones), strict=True):
            each = torch.from_numpy(np.eye(self.maps[dim].student)[self.maps[dim].map]).to(weight)
            if self.maps[dim].wide:
                part = part.narrow(1 - dim, 0, weight.shape[1 - dim])
                total = torch.tensordot(part.movedim(dim, -1), each, 1)
                weight = torch.tensordot((weight * part).movedim(dim, -1), each, 1) / total
                weight = weight.movedim(-1, dim)
        return weight

    def fused(
        self, teacher: bool = True, student: bool = True, tensors: list[Tensor] | None = None
    ) -> list[Tensor]:
        tensors = self.tensors if tensors is None else tensors
        sites, index = (self.site,), tuple(range(len(tensors)))
        ((wide, own),) = fold(
            sites, key_of(sites), index, tensors, teacher=teacher, student=student
        )
        return [w for w in (wide, own) if w is not None]


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

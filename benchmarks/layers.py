"""Layers with random branches, and how far a fold of them is from the exact one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpdfx.algebra.frozen import Frozen, share_table
from gpdfx.branches.layer import Layer
from gpdfx.branches.sets import NONE, SETS
from gpdfx.kernels import copies
from gpdfx.kernels.fold import Share, Site, cut_of, fold, key_of, reference
from gpdfx.teacher.extract import take_first

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


class Case:
    """A layer with random branches, its shares, and the student in it: of every axis the first of
    two copies, of every group where there are several."""

    def __init__(
        self, layer: Layer, chosen: str, dtype: torch.dtype = torch.float64, mean: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.layer, self.dtype = layer, dtype
        self.branches = (SETS | {"none": NONE})[chosen].on(layer).branches
        self.origin = self.leaf(*layer.stored)
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
        self.share = Share(dim - self.table.ndim, dim, split).of(layer, self.classes)
        terms = tuple(branch.term(layer) for branch in self.branches)
        cut = cut_of(layer, self.maps, mean)
        assert cut is not None
        self.site = Site(layer, terms, cut, self.share, mean)

    def leaf(self, *size: int) -> Tensor:
        return torch.randn(*size, dtype=self.dtype).requires_grad_()

    def last(self) -> Case:
        """The same with inputs last in memory."""
        dims = [0, *range(2, self.origin.ndim), 1]
        moved = self.origin.detach().permute(dims).contiguous()
        self.origin = moved.permute([dims.index(d) for d in range(len(dims))]).requires_grad_()
        return self

    def change(self, how: Callable[[Tensor], Tensor]) -> Case:
        """Other tensors in place of all."""

        def changed(x: Tensor) -> Tensor:
            return how(x.detach()).requires_grad_(x.requires_grad)

        for name in ("origin", "table", "classes"):
            setattr(self, name, changed(getattr(self, name)))
        self.scales = [changed(t) for t in self.scales]
        self.own = [{name: changed(t) for name, t in own.items()} for own in self.own]
        return self

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


# --------------------------------------------------------------------------- exactness
class Deviation(NamedTuple):
    """Of a weight or a gradient: root mean squares of its ``error``, of that of plain torch in the
    same type, and of a ``unit`` in the last place of the sum of its summands' absolute values."""

    error: float
    plain: float
    unit: float

    @property
    def ratio(self) -> float:
        """At most 1.5 is as exact as plain torch."""
        return self.error / max(self.plain, self.unit / 1.5)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def plainly(
    cases: list[Case], asked: Any, grads: Any, change: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Weights and gradients in plain torch, of the same numbers, changed."""
    found: list[Tensor | None] = []
    for case, pair in zip(cases, grads, strict=True):
        own = [change(t.detach()) if t.is_floating_point() else t for t in case.tensors]
        found += reference.forward(case.site, own, *asked)
        given = [None if g is None else change(g) for g in pair]
        found += reference.backward(case.site, own, *given)
    return [x for x in found if x is not None]


def deviations(
    cases: list[Case], asked: Any, grads: Any, got: Sequence[Tensor], half: torch.dtype | None
) -> Iterator[tuple[Tensor, Tensor, Deviation]]:
    """Weights and gradients, those of plain torch (with products in ``half``), and how far they
    are from float64."""
    exact = plainly(cases, asked, grads, Tensor.double)
    sizes = plainly(cases, asked, grads, lambda x: x.double().abs())
    with torch.autocast(got[0].device.type, half, enabled=half is not None):
        theirs = plainly(cases, asked, grads, lambda x: x)
    for x, y, true, size in zip(got, theirs, exact, sizes, strict=True):
        unit = torch.finfo(x.dtype).eps * float(size.square().mean().sqrt())
        yield x, y, Deviation(error(x, true), error(y, true), unit)

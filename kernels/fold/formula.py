"""Every kind of branch as the fold computes it: a summand of the weight, and its gradients.

Weights are ``(groups, out, in, taps)``, taps the elements of the kernel; with ``G`` the gradient
of the weight and s the branch's scales, one per output channel,

    W += s K(p)        dp = K'(p)^T (s G)        ds[o] = sum_(i, x) G[o, i, x] K[o, i, x]

where ``ds`` needs no K: every K is linear in one parameter p, so ``ds[o] = sum p K'(p)^T G`` over
what belongs to row o, of which ``dp`` is s times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...branches.kinds import (
    Average,
    Branch,
    Frequency,
    Full,
    Identity,
    Line,
    LowRank,
    Pointwise,
    Product,
    Separable,
)
from ...branches.layer import Layer

Gradients = tuple[Tensor, tuple[Tensor | None, ...]]
"""Of the scales, (groups, out) or (channels,), and of the tensors."""


@dataclass(frozen=True)
class Formula:
    """``axes``: of each tensor, by letters of ``goi`` as in ``Cut.view``.
    ``add(branch, layer, total, row, *tensors)`` adds to the weight in place;
    ``back(branch, layer, grad, row, *tensors)`` gives the gradients. ``row``: the scales,
    (groups, out, 1, 1)."""

    axes: tuple[str, ...]
    add: Callable[..., None]
    back: Callable[..., Gradients]


class Grad:
    """The gradient of a weight in two memory orders: ``whole`` (groups, out, in, taps) and
    ``flat`` (groups, out, taps, in), contiguous."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self._flat: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        if self._flat is None:
            self._flat = self.whole.transpose(2, 3).contiguous()
        return self._flat


def scaled(x: Tensor, row: Tensor) -> Tensor:
    """``x * row``, in place where no gradient of a gradient is asked for."""
    return x * row if torch.is_grad_enabled() else x.mul_(row)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``(x * y).sum((2, 3))``, without the product in memory."""
    n = x.shape[2] * x.shape[3]
    with torch.autocast(x.device.type, enabled=False):
        rows = torch.bmm(x.reshape(-1, 1, n), y.reshape(-1, n, 1))
    return rows.view(x.shape[:2])


def copied(x: Tensor, like: Tensor) -> Tensor:
    """A copy in the memory order and type of another tensor."""
    return torch.empty_like(like).copy_(x)


# ------------------------------------------------------- K[o, i, x] = w[o, i, x] on some taps
@lru_cache(maxsize=1024)
def some(branch: Any, layer: Layer) -> slice:
    """The taps of a ``Line``, or of a point at the centre."""
    along = branch.dim if isinstance(branch, Line) else -1
    strides = [math.prod(layer.kernel[d + 1 :]) for d in range(len(layer.kernel))]
    steps = enumerate(zip(layer.kernel, strides, strict=True))
    start = sum(k // 2 * step for d, (k, step) in steps if d != along)
    if along < 0:
        return slice(start, start + 1)
    return slice(start, start + strides[along] * layer.kernel[along], strides[along])


def add_full(branch: Branch, layer: Layer, total: Tensor, row: Tensor, w: Tensor) -> None:
    total.addcmul_(w.reshape(total.shape), row)


def back_full(branch: Branch, layer: Layer, grad: Grad, row: Tensor, w: Tensor) -> Gradients:
    rows = dot(grad.whole, w.reshape(grad.whole.shape))
    return rows, ((grad.whole * row).reshape(w.shape),)


def add_some(branch: Branch, layer: Layer, total: Tensor, row: Tensor, w: Tensor) -> None:
    total[..., some(branch, layer)].addcmul_(w if w.ndim == 4 else w.unsqueeze(3), row)


def back_some(branch: Branch, layer: Layer, grad: Grad, row: Tensor, w: Tensor) -> Gradients:
    part = grad.whole[..., some(branch, layer)]
    rows = (part * (w if w.ndim == 4 else w.unsqueeze(3))).sum((2, 3))
    return rows, (None if isinstance(branch, Identity) else (part * row).reshape(w.shape),)


# ------------------------------------------------------- K[o, i, x] = w[o, i] f[o, x]
def add_average(branch: Branch, layer: Layer, total: Tensor, row: Tensor, w: Tensor) -> None:
    total.addcmul_(w.unsqueeze(3), row / total.shape[3])


def back_average(branch: Branch, layer: Layer, grad: Grad, row: Tensor, w: Tensor) -> Gradients:
    mean = grad.flat.mean(2)
    return (mean * w).sum(2), (mean * row.squeeze(3),)


def add_frequency(
    branch: Branch, layer: Layer, total: Tensor, row: Tensor, w: Tensor, filters: Tensor
) -> None:
    total.addcmul_(w.unsqueeze(3), filters.flatten(3) * row)


def back_frequency(
    branch: Branch, layer: Layer, grad: Grad, row: Tensor, w: Tensor, filters: Tensor
) -> Gradients:
    rows = layer.channels
    sums = torch.bmm(filters.reshape(rows, 1, -1), grad.flat.view(rows, -1, layer.inputs))
    sums = sums.view(w.shape)
    return (sums * w).sum(2), (sums * row.squeeze(3), None)


# ------------------------------------------------------- K[o, i, x] = sum_h l[o, h, x] r[h, i]
def add_product(layer: Layer, total: Tensor, row: Tensor, left: Tensor, right: Tensor) -> None:
    """``left``: (groups, out, hidden, taps), ``right``: (groups, hidden, in)."""
    groups, outputs, hidden, taps = left.shape
    flat = left.transpose(2, 3).reshape(groups, outputs * taps, hidden)
    made = torch.bmm(flat, right).view(groups, outputs, taps, -1).transpose(2, 3)
    total.addcmul_(made.to(total.dtype), row)


def back_product(
    layer: Layer, grad: Grad, row: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the scales, ``left`` and ``right``."""
    groups, outputs, hidden, taps = left.shape
    flat = grad.flat.view(groups, outputs * taps, -1)
    moved = torch.bmm(flat, right.transpose(1, 2)).view(groups, outputs, taps, hidden)
    moved = moved.transpose(2, 3)
    rows = (left * moved).sum((2, 3), dtype=left.dtype)
    of_left = scaled(copied(moved, left), row)
    lefts = scaled(left.transpose(2, 3).clone(memory_format=torch.contiguous_format), row)
    lefts = lefts.view(groups, outputs * taps, hidden)
    of_right = torch.bmm(lefts.transpose(1, 2), flat)
    return rows, of_left, of_right.to(right.dtype)


def add_residual(
    branch: Branch,
    layer: Layer,
    total: Tensor,
    row: Tensor,
    first: Tensor,
    second: Tensor,
    eye: Tensor,
) -> None:
    add_product(layer, total, row, second.flatten(3), first + eye)


def back_residual(
    branch: Branch,
    layer: Layer,
    grad: Grad,
    row: Tensor,
    first: Tensor,
    second: Tensor,
    eye: Tensor,
) -> Gradients:
    rows, left, right = back_product(layer, grad, row, second.flatten(3), first + eye)
    return rows, (right, left.view(second.shape), None)


def add_low_rank(
    branch: Branch, layer: Layer, total: Tensor, row: Tensor, down: Tensor, up: Tensor
) -> None:
    add_product(layer, total, row, up.unsqueeze(3), down)


def back_low_rank(
    branch: Branch, layer: Layer, grad: Grad, row: Tensor, down: Tensor, up: Tensor
) -> Gradients:
    rows, left, right = back_product(layer, grad, row, up.unsqueeze(3), down)
    return rows, (right, left.squeeze(3))


# ------------------------------------------------------- K[o, i, x] = sum_e p[o, i, e] d[i, e, x]
def by_input(x: Tensor) -> Tensor:
    """(groups, a, in, n) -> (groups * in, a, n): a batch of products, one for every input."""
    groups, rows, inputs, n = x.shape
    return x.transpose(1, 2).reshape(groups * inputs, rows, n)


def add_separable(
    branch: Branch, layer: Layer, total: Tensor, row: Tensor, depthwise: Tensor, pointwise: Tensor
) -> None:
    groups, outputs, inputs, n = pointwise.shape
    made = torch.bmm(by_input(pointwise), depthwise.reshape(groups * inputs, n, -1))
    made = made.view(groups, inputs, outputs, -1).transpose(1, 2)
    total.addcmul_(made.to(total.dtype), row)


def back_separable(
    branch: Branch, layer: Layer, grad: Grad, row: Tensor, depthwise: Tensor, pointwise: Tensor
) -> Gradients:
    groups, outputs, inputs, n = pointwise.shape
    of_input = by_input(grad.whole)
    kernels = depthwise.reshape(groups * inputs, n, -1)
    moved = torch.bmm(of_input, kernels.transpose(1, 2))
    moved = moved.view(groups, inputs, outputs, n).transpose(1, 2)
    rows = (pointwise * moved).sum((2, 3), dtype=pointwise.dtype)
    of_pointwise = scaled(copied(moved, pointwise), row)
    of_depthwise = torch.bmm(by_input(pointwise * row).transpose(1, 2), of_input)
    return rows, (of_depthwise.view(depthwise.shape).to(depthwise.dtype), of_pointwise)


FORMULAS: dict[type[Branch], Formula] = {
    Full: Formula(("goi",), add_full, back_full),
    Line: Formula(("goi",), add_some, back_some),
    Pointwise: Formula(("goi",), add_some, back_some),
    Identity: Formula((".oi",), add_some, back_some),
    Average: Formula(("goi",), add_average, back_average),
    Frequency: Formula(("goi", "go"), add_frequency, back_frequency),
    Product: Formula(("g.i", "go", ".i"), add_residual, back_residual),
    LowRank: Formula(("g.i", "go"), add_low_rank, back_low_rank),
    Separable: Formula(("gi", "goi"), add_separable, back_separable),
}
"""By exact type: a kind derived from one of these may compute something else."""

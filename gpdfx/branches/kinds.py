"""Branches: other ways to write a weight, which train beside it and merge into it.

A layer's weight becomes

    W = scale_0 * origin + sum_b scale_b * kernel_b(params_b)

with one scale per output channel and branch. All of it happens in weight space, so one layer runs
whatever the number of branches, and stride, padding, dilation and the data do not matter
(OREPA, arXiv 2204.00826, section 3; arXiv 2410.04140, section 3.3). A branch with ``norm`` is
normalized on its own, over the batch, while the teacher trains (RepVGG, arXiv 2101.03697;
Diverse Branch Block, arXiv 2103.13425; MobileOne, arXiv 2206.04040).

Every weight is seen as ``(groups, out, in, *kernel)``, sizes per group. A branch of your own is a
frozen dataclass that derives from ``Branch`` and says its ``term``, or computes its ``kernel``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .layer import Layer
from .term import Term

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Branch:
    """One summand of a weight. ``norm``: batch-normalized on its own in training. ``live``: its
    scale when training from scratch."""

    norm: bool = field(default=False, kw_only=True)
    live: float = field(default=1.0, kw_only=True)
    carrier: ClassVar[str] = "weight"
    """Without a term: a parameter that the kernel is linear in, and that no other op scales."""

    def fits(self, layer: Layer) -> bool:
        """True if this branch adds something to such a layer."""
        return True

    def shapes(self, layer: Layer) -> Shapes:
        """The parameters it has, by name; their dimensions after the second are fan-in."""
        raise NotImplementedError

    def constants(self, layer: Layer) -> dict[str, Tensor]:
        """What it needs beside parameters, by name: handed to ``kernel`` with them."""
        return {}

    def term(self, layer: Layer) -> Term | None:
        """Its kernel as a formula of its parameters, which the fused fold computes; none, and
        ``kernel`` is called."""
        return None

    def kernel(self, layer: Layer, params: Mapping[str, Tensor]) -> Tensor:
        """The weight it makes of them, broadcastable to ``layer.shape``; differentiable."""
        term = self.term(layer)
        assert term is not None, f"{type(self).__name__} has neither a term nor a kernel"
        return term.kernel(layer, params)

    def fused(self, layer: Layer) -> Term | None:
        """Its term, unless its kernel is something else."""
        return self.term(layer) if type(self).kernel is Branch.kernel else None

    def within(self, layer: Layer, most: float) -> Branch:
        """The same with at most so many hidden channels, if it has any."""
        return self

    def init(self, layer: Layer, draw: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters: uniform with variance 2 / fan-in (He et al., 2015)."""
        found = {}
        for name, shape in self.shapes(layer).items():
            bound = math.sqrt(6 / math.prod(shape[2:]))
            found[name] = torch.empty(shape).uniform_(-bound, bound, generator=draw)
        return found


def fewer(channels: int, most: float) -> int:
    """A power of two of at most so many, and at least ``LEAST``, if there are as many channels."""
    return min(channels, max(LEAST, 1 << int(most).bit_length() - 1 if most >= 1 else 0))


LEAST = 8
"""Hidden channels that ``within`` leaves in any case."""


# --------------------------------------------------------------------------- the branches
@dataclass(frozen=True)
class Full(Branch):
    """``K = w``: another weight of the layer's own shape. MobileOne."""

    def shapes(self, layer: Layer) -> Shapes:
        return {"weight": layer.shape}

    def term(self, layer: Layer) -> Term:
        return Term("weight", "goix")


@dataclass(frozen=True)
class _Spatial(Branch):
    """A kind for kernels with more than one element."""

    def fits(self, layer: Layer) -> bool:
        return layer.spatial


@dataclass(frozen=True)
class Pointwise(_Spatial):
    """``K[o, i, c] = w[o, i]`` at the centre c, else 0: a 1x1 convolution. RepVGG."""

    def shapes(self, layer: Layer) -> Shapes:
        return {"weight": layer.shape[:3]}

    def term(self, layer: Layer) -> Term:
        return Term("weight", "goi", taps=layer.line())


@dataclass(frozen=True)
class Identity(Branch):
    """``K[o, i, c] = 1`` where o = i at the centre c, else 0: a skip connection. RepVGG."""

    def fits(self, layer: Layer) -> bool:
        return layer.outputs == layer.inputs

    def shapes(self, layer: Layer) -> Shapes:
        return {}

    def term(self, layer: Layer) -> Term:
        return Term("", "goi", taps=layer.line())


@dataclass(frozen=True)
class Average(_Spatial):
    """``K[o, i, x] = w[o, i] / size of the kernel``: 1x1, then average pooling. DBB, OREPA."""

    def shapes(self, layer: Layer) -> Shapes:
        return {"weight": layer.shape[:3]}

    def term(self, layer: Layer) -> Term:
        return Term("weight", "goi", gain=1 / layer.taps)


@dataclass(frozen=True)
class Frequency(_Spatial):
    """``K[o, i, x] = w[o, i] * cos(pi (x_d + 1/2) f / k_d)``: 1x1, then a cosine filter.

    Output channel o has the frequency f = 1 + (o // D) % (k_d - 1) along dimension d = o % D of
    those with k_d > 1. OREPA's frequency prior; frequencies of fcanet (arXiv 2012.11879).
    """

    def shapes(self, layer: Layer) -> Shapes:
        return {"weight": layer.shape[:3]}

    def constants(self, layer: Layer) -> dict[str, Tensor]:
        dims = [d for d, k in enumerate(layer.kernel) if k > 1]
        filters = torch.zeros(layer.channels, *layer.kernel)
        for n, d in enumerate(dims):
            own, k = filters[n :: len(dims)], layer.kernel[d]
            f = 1 + torch.arange(len(own)) % (k - 1)
            wave = torch.cos(math.pi / k * f.unsqueeze(1) * (torch.arange(k) + 0.5))
            own += wave.view(-1, *[k if e == d else 1 for e in range(len(layer.kernel))])
        return {"filters": filters.unflatten(0, layer.shape[:2]).unsqueeze(2)}

    def term(self, layer: Layer) -> Term:
        return Term("weight", "goi", "filters", "gox")


@dataclass(frozen=True)
class Product(_Spatial):
    """``K[o, i, x] = sum_h p[o, h, x] (delta[h, i] + q[h, i])``: a residual 1x1, then the full
    kernel. ``hidden``: as many channels between the two at most; the paper has as many as there
    are inputs, and two in depthwise layers. DBB, OREPA."""

    hidden: int | None = None

    def shapes(self, layer: Layer) -> Shapes:
        hidden = layer.inputs * (2 if layer.inputs == 1 else 1)
        hidden = min(hidden, self.hidden or hidden)
        return {
            "first": (layer.groups, hidden, layer.inputs),
            "second": (layer.groups, layer.outputs, hidden, *layer.kernel),
        }

    def within(self, layer: Layer, most: float) -> Branch:
        hidden = self.shapes(layer)["first"][1]
        return replace(self, hidden=fewer(hidden, most)) if most < hidden else self

    def init(self, layer: Layer, draw: torch.Generator) -> dict[str, Tensor]:
        return super().init(layer, draw) | {"first": torch.zeros(self.shapes(layer)["first"])}

    def term(self, layer: Layer) -> Term:
        return Term("second", "gohx", "first", "ghi", residual=True)


@dataclass(frozen=True)
class Separable(_Spatial):
    """``K[o, i, x] = sum_e p[o, i, e] d[i, e, x]``: a depthwise kernel with ``expand`` channels
    per input channel, then 1x1. OREPA."""

    expand: int = 8

    def shapes(self, layer: Layer) -> Shapes:
        groups, outputs, inputs, *kernel = layer.shape
        return {
            "depthwise": (groups, inputs, self.expand, *kernel),
            "pointwise": (groups, outputs, inputs, self.expand),
        }

    def init(self, layer: Layer, draw: torch.Generator) -> dict[str, Tensor]:
        made = super().init(layer, draw)  # the depthwise kernel has a fan-in of the kernel alone
        return made | {"depthwise": made["depthwise"] * math.sqrt(self.expand)}

    def term(self, layer: Layer) -> Term:
        return Term("pointwise", "goie", "depthwise", "giex")


@dataclass(frozen=True)
class Line(Branch):
    """A kernel along dimension ``dim`` through the centre, else 0: 1xk, kx1. ACNet
    (arXiv 1908.03930)."""

    dim: int = 0

    def fits(self, layer: Layer) -> bool:
        longer = [d for d, k in enumerate(layer.kernel) if k > 1]
        return len(longer) > 1 and self.dim in longer

    def shapes(self, layer: Layer) -> Shapes:
        return {"weight": (*layer.shape[:3], layer.kernel[self.dim])}

    def term(self, layer: Layer) -> Term:
        return Term("weight", "goix", taps=layer.line(self.dim))


@dataclass(frozen=True)
class LowRank(Branch):
    """``K[o, i] = sum_r u[o, r] v[r, i]`` for linear layers and 1x1 convolutions, of rank an
    eighth of the smaller side unless given. LoRA's form (arXiv 2106.09685)."""

    rank: int | None = None

    def fits(self, layer: Layer) -> bool:
        return not layer.spatial and min(layer.outputs, layer.inputs) > 1

    def shapes(self, layer: Layer) -> Shapes:
        rank = self.rank or max(1, min(layer.outputs, layer.inputs) // 8)
        return {
            "down": (layer.groups, rank, layer.inputs),
            "up": (layer.groups, layer.outputs, rank),
        }

    def within(self, layer: Layer, most: float) -> Branch:
        rank = self.shapes(layer)["down"][1]
        return replace(self, rank=fewer(rank, most)) if most < rank else self

    def term(self, layer: Layer) -> Term:
        return Term("up", "goh", "down", "ghi")


KINDS = (Full, Pointwise, Identity, Average, Frequency, Product, Separable, Line, LowRank)

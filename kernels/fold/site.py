"""What the fold knows of a layer beside its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...algebra.frozen import Frozen, blocks_of
from ...branches.kinds import Branch
from ...branches.layer import LAYOUTS, Layer
from .formula import FORMULAS

Tensors = list[Tensor]
Blocks = tuple[int, int, int]
"""``(outer, wide, narrow)``: the first ``narrow`` of every ``wide`` indices, ``outer`` times."""


@dataclass(frozen=True)
class Cut:
    """The student's part of a weight (groups, out, in, ...): its first copies, by dimension."""

    g: Blocks
    o: Blocks
    i: Blocks

    def layer(self, layer: Layer) -> Layer:
        """The student's."""
        groups, outputs, inputs = (outer * narrow for outer, _, narrow in (self.g, self.o, self.i))
        return replace(layer, groups=groups, outputs=outputs, inputs=inputs)

    def view(self, x: Tensor, axes: str) -> Tensor:
        """The part of a tensor whose first dimensions are ``axes``, letters of ``goi`` or others,
        which are taken whole. A dimension with several blocks is split in two."""
        dim = 0
        for letter in axes:
            if letter in "goi":
                outer, wide, narrow = getattr(self, letter)
                if wide != narrow:
                    if outer > 1:
                        x = x.unflatten(dim, (outer, wide))
                        dim += 1
                    x = x.narrow(dim, 0, narrow)
            dim += 1
        return x

    def take(self, x: Tensor, axes: str) -> Tensor:
        """``view`` with the split dimensions joined."""
        sizes = list(x.shape)
        for dim, letter in enumerate(axes):
            if letter in "goi":
                outer, _, narrow = getattr(self, letter)
                sizes[dim] = outer * narrow
        return self.view(x, axes).reshape(sizes)

    def pad(self, part: Tensor, like: Tensor, axes: str) -> Tensor:
        """The inverse of ``take`` as a gradient: zeros elsewhere."""
        whole = torch.zeros_like(like)
        view = self.view(whole, axes)
        view.copy_(part.reshape(view.shape))
        return whole


def cut_of(layer: Layer, maps: tuple[Frozen, ...]) -> Cut | None:
    """The student's part of a stored weight; ``None`` if it is not a product of blocks."""
    split, swapped = LAYOUTS[layer.layout]
    sizes = (layer.inputs, layer.outputs) if swapped else (layer.outputs, layer.inputs)
    if any(m.wide for m in maps[2:]):
        return None
    # the first stored dimension is (groups x one of the two), the second the other one
    first = maps[0].first
    groups = np.unique(first // sizes[0])
    inner = first[: len(first) // len(groups)] % sizes[0]
    if not np.array_equal((groups[:, None] * sizes[0] + inner).ravel(), first):
        return None
    found = [
        blocks_of(index, size)
        for index, size in (
            (groups, layer.groups if split else 1),
            (inner, sizes[0]),
            (maps[1].first, sizes[1]),
        )
    ]
    if not all(outer for outer, _, _ in found):
        return None
    g, a, b = found
    return Cut(g, b, a) if swapped else Cut(g, a, b)


@dataclass(frozen=True)
class Share:
    """How the teacher's weight is multiplied by shares: what ``copies.share`` takes beside
    tensors."""

    at: int
    dim: int
    split: tuple[int, ...] | None


@dataclass(frozen=True)
class Site:
    """One layer of a fold. Its tensors, in this order: the origin, the scales if it has branches,
    table and classes of the ``share`` if there is one, then those of each branch by ``names``.

    ``cut``: what the student's weight is of the whole; ``None``: all of it.
    """

    layer: Layer
    branches: tuple[Branch, ...]
    names: tuple[tuple[str, ...], ...]
    cut: Cut | None = None
    share: Share | None = None

    @property
    def unbranched(self) -> bool:
        """True without branches."""
        return len(self.branches) == 0

    @property
    def first(self) -> int:
        """Where the tensors of its branches begin."""
        return 1 + (not self.unbranched) + 2 * (self.share is not None)

    @property
    def size(self) -> int:
        """How many tensors it has."""
        return self.first + sum(map(len, self.names))

    @property
    def distinct(self) -> bool:
        """True if the student's weight is not the teacher's."""
        return self.cut is not None or self.share is not None

    @property
    def narrow(self) -> Layer:
        """The student's layer."""
        return self.layer if self.cut is None else self.cut.layer(self.layer)

    @cached_property
    def form(self) -> Any:
        """All that it is but for its sizes."""

        def small(layer: Layer) -> Layer:
            groups, outputs, inputs = (min(n, 2) for n in layer.shape[:3])
            return Layer(groups, outputs, inputs, layer.kernel, layer.layout)

        blocks = () if self.cut is None else (self.cut.g, self.cut.o, self.cut.i)
        cut = tuple((outer > 1, wide > narrow) for outer, wide, narrow in blocks)
        share = self.share and (self.share.at, self.share.dim, self.share.split is None)
        return small(self.layer), small(self.narrow), self.branches, cut, share


TYPES: dict[str, type[Any]] = {t.__name__: t for t in (Site, Cut, Share, Layer, *FORMULAS)}
"""What a key is made of."""


def key_of(sites: tuple[Site, ...]) -> str:
    """All that they are as a text, under which operators, graphs and other processes know them:
    nobody has to keep them anywhere."""

    def named(value: Any) -> dict[str, Any]:
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"type": type(value).__name__} | own

    return json.dumps(sites, default=named, separators=(",", ":"))


@lru_cache(maxsize=256)
def sites_of(key: str) -> tuple[Site, ...]:
    """The inverse of ``key_of``."""

    def unnamed(value: dict[str, Any]) -> Any:
        return TYPES[value.pop("type")](**{name: hashable(own) for name, own in value.items()})

    def hashable(value: Any) -> Any:
        return tuple(map(hashable, value)) if isinstance(value, list) else value

    sites: tuple[Site, ...] = hashable(json.loads(key, object_hook=unnamed))
    return sites


def each(key: str, index: Sequence[int], tensors: Sequence[Tensor]) -> list[tuple[Site, Tensors]]:
    """``owned`` of a key's sites."""
    return owned(sites_of(key), index, tensors)


def owned(
    sites: Sequence[Site], index: Sequence[int], tensors: Sequence[Any]
) -> list[tuple[Site, list[Any]]]:
    """Every site with its tensors, or their names. ``index``: which of ``tensors`` they are, one
    site after the other."""
    found = []
    at = 0
    for site in sites:
        found.append((site, [tensors[k] for k in index[at : at + site.size]]))
        at += site.size
    return found


def pairs(
    sites: Sequence[Site], weights: Sequence[Any], teacher: bool, student: bool
) -> list[tuple[Any, Any]]:
    """The teacher's and the student's by site, of what a fold gives one after the other; ``None``
    for one that was not asked for, or that is the other one."""
    rest = iter(weights)
    found = []
    for site in sites:
        wide = next(rest) if teacher else None
        found.append((wide, next(rest) if student and (site.distinct or not teacher) else None))
    return found


def elements(layer: Layer) -> int:
    """Of a layer's weight."""
    return math.prod(layer.shape)


def load(layer: Layer, weight: Tensor) -> Tensor:
    """A stored weight as (groups, out, in, taps)."""
    groups, outputs, inputs, taps = *layer.shape[:3], math.prod(layer.kernel)
    if LAYOUTS[layer.layout][1]:
        return weight.reshape(groups, inputs, outputs, taps).transpose(1, 2)
    return weight.reshape(groups, outputs, inputs, taps)


def store(layer: Layer, weight: Tensor) -> Tensor:
    """The inverse of ``load``."""
    swapped = LAYOUTS[layer.layout][1]
    rows, columns = (layer.inputs, layer.outputs) if swapped else (layer.outputs, layer.inputs)
    weight = weight.transpose(1, 2) if swapped else weight
    return weight.reshape(layer.groups * rows, columns, *layer.kernel)

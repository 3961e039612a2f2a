"""What the fold knows of a layer beside its tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...algebra.frozen import Frozen, blocks_of, turns
from ...branches.layer import LAYOUTS, Layer
from ...branches.term import Term
from .. import copies

Tensors = list[Tensor]
Blocks = tuple[int, int, int]
"""``(outer, wide, narrow)``: the first ``narrow`` of every ``wide`` indices, ``outer`` times."""


def segments(blocks: Blocks) -> Iterator[tuple[int, int, int, int, int]]:
    """What stands for what in one of the outer blocks: (teacher's index, student's index, length,
    which copy, of how many), (4, 0, 2, 1, 3) of (1, 10, 4)."""
    _, wide, narrow = blocks
    rest = wide % narrow
    for start, end, count in ((0, rest, wide // narrow + 1), (rest, narrow, wide // narrow)):
        for copy in range(count if end > start else 0):
            yield copy * narrow + start, start, end - start, copy, count


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
            outer, wide, narrow = getattr(self, letter) if letter in "goi" else (1, 1, 1)
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


def cut_of(layer: Layer, maps: tuple[Frozen, ...], mean: bool = False) -> Cut | None:
    """The student's part of a stored weight; ``None`` if it is not a product of blocks, or, for
    the ``mean``, if copies do not stand in turn in these."""
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
    rows = np.add.outer(turns(g) * a[0] * a[2], turns(a)).ravel()
    if mean and not (np.array_equal(rows, maps[0].map) and np.array_equal(turns(b), maps[1].map)):
        return None
    return Cut(g, b, a) if swapped else Cut(g, a, b)


@dataclass(frozen=True)
class Share:
    """How the teacher's weight is multiplied by shares: what ``copies.share`` takes beside
    tensors. ``run``: classes change only at multiples of so many inputs; ``classes``: a name of
    their numbers, which plans are made of."""

    at: int
    dim: int
    split: tuple[int, ...] | None
    run: int = 1
    classes: str = ""

    def of_inputs(
        self, layer: Layer, table: Tensor, classes: Tensor, like: Any = None, run: int = 1
    ) -> Tensor:
        """(groups, outputs, inputs, 1): what the table says of every ``run``-th input, in the type
        of another tensor; a view as far as rows have the same."""
        split, dim = list(self.split or ()), self.dim % len(layer.stored)
        step = split[-1] if split and run % split[-1] == 0 else 1
        if step > 1:
            layer, split[-1] = replace(layer, inputs=layer.inputs // step), 1
        shape = layer.stored
        ones = (table if like is None else like).new_ones(
            [n if d == dim else 1 for d, n in enumerate(shape)]
        )
        found = copies.share(ones, table, classes, self.at, self.dim, split or None)
        found = replace(layer, kernel=()).by_taps(found.expand(*shape[:2], *found.shape[2:]))
        return found[:, :, :: run // step]

    def of(self, layer: Layer, classes: Tensor) -> Share:
        """With what these classes say."""
        numbers = torch.arange(int(classes.max()) + 1, dtype=torch.float64)
        shape = [1] * (len(layer.stored) + len(self.split or (0,)) - 1)
        shape[self.at] = -1
        each = self.of_inputs(layer, numbers.to(classes.device).view(shape), classes)
        changes = each[:, 0, :, 0].diff().nonzero()[:, 1] + 1
        run = math.gcd(layer.inputs, *changes.tolist())
        name = hashlib.sha1(classes.cpu().numpy().tobytes()).hexdigest()[:16]
        return replace(self, run=run, classes=name)


def uniform(blocks: Blocks, size: int, run: int) -> bool:
    """Whether every tile of so many inputs lies between two multiples of ``run``."""
    outer, wide, narrow = blocks
    copies = [
        (b * wide + c, b * wide + min(c + narrow, wide))
        for b in range(outer)
        for c in range(0, wide, narrow)
    ]
    tiles = ((t, min(t + size, end) - 1) for c, end in copies for t in range(c, end, size))
    return all(first // run == last // run for first, last in tiles)


@dataclass(frozen=True)
class Site:
    """One layer of a fold. Its tensors, in this order: the origin, the scales if it has terms,
    table and classes of the ``share`` if there is one, then those of each term by its names.

    ``cut``: what the student's weight is of the whole, ``None``: all of it; ``mean``: it is the
    mean of the copies (see ``teacher.extract``), not the first ones.
    """

    layer: Layer
    terms: tuple[Term, ...]
    cut: Cut | None = None
    share: Share | None = None
    mean: bool = False

    @property
    def first(self) -> int:
        """Where the tensors of its terms begin."""
        return 1 + (len(self.terms) > 0) + 2 * (self.share is not None)

    @property
    def size(self) -> int:
        """How many tensors it has."""
        return self.first + sum(len(term.names) for term in self.terms)

    @property
    def distinct(self) -> bool:
        """True if the student's weight is not the teacher's."""
        return self.cut is not None or self.share is not None

    @property
    def narrow(self) -> Layer:
        """The student's layer."""
        return self.layer if self.cut is None else self.cut.layer(self.layer)

    @property
    def apart(self) -> bool:
        """True if the student's weight can be made of its own part of all tensors."""
        cut = self.cut
        return (
            cut is not None
            and not self.mean
            and (cut.o == cut.i or all(term.carrier for term in self.terms))
        )

    @property
    def blocks(self) -> dict[str, Blocks]:
        """By letter: how copies stand for the student's indices."""
        layer, cut = self.layer, self.cut
        sizes = zip("goi", layer.shape, strict=False)
        return {c: (1, n, n) if cut is None else getattr(cut, c) for c, n in sizes}

    @cached_property
    def form(self) -> Any:
        """All that it is but for its sizes."""

        def small(layer: Layer) -> Layer:
            groups, outputs, inputs = (min(n, 2) for n in layer.shape[:3])
            return Layer(groups, outputs, inputs, layer.kernel, layer.layout)

        cut = tuple((outer > 1, wide > narrow) for outer, wide, narrow in self.blocks.values())
        share = self.share and (self.share.at, self.share.dim, self.share.split is None)
        return small(self.layer), small(self.narrow), self.terms, cut, share, self.mean

    def differentiable(self) -> list[bool]:
        """Which of its tensors are parameters."""
        found = [True] * (1 + (len(self.terms) > 0)) + [False] * (2 * (self.share is not None))
        for term in self.terms:
            found += [True] * bool(term.carrier) + ["o" not in term.others] * bool(term.factor)
        return found


TYPES: dict[str, type[Any]] = {t.__name__: t for t in (Site, Cut, Share, Layer, Term)}
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


def owned(sites: Sequence[Site], tensors: Sequence[Any]) -> list[tuple[Site, list[Any]]]:
    """Every site with its tensors, or their names, which come one site after the other."""
    rest = iter(tensors)
    return [(site, list(islice(rest, site.size))) for site in sites]


def room(layer: Layer, like: Tensor) -> Tensor:
    """An empty stored weight in the memory order of another, whose view by taps is one."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-strides[d], d))
    taps = list(range(2, like.ndim))
    if taps and order[(at := order.index(2)) : at + len(taps)] != taps:
        order = list(range(like.ndim))
    size = layer.stored
    made = like.new_empty([size[d] for d in order])
    return made.permute([order.index(d) for d in range(like.ndim)])


# --------------------------------------------------------------------------- results
REGION = 16
"""Results of a fold begin at multiples of so many elements."""
View = tuple[tuple[int, ...], tuple[int, ...], int]
"""What ``as_strided`` takes."""


def weights_like(
    each: Sequence[tuple[Site, Sequence[Tensor]]], teacher: bool, student: bool
) -> list[Tensor | None]:
    """Like the weights, the teacher's and the student's of each site; none where none is wanted."""
    found: list[Tensor | None] = []
    for site, (origin, *_) in each:
        own = student and (site.distinct or not teacher)
        for layer, asked in ((site.layer, teacher), (site.narrow, own)):
            found.append(room(layer, origin.to("meta")) if asked else None)
    return found


def tensors_like(site: Site, own: Sequence[Tensor]) -> list[Tensor]:
    """Like the tensors of a site, in the order in which kernels read them and write gradients."""
    origin, *rest = own
    rest = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in rest]
    return [room(site.layer, origin.to("meta")), *rest]


@dataclass(frozen=True)
class Regions:
    """Results in one flat tensor of so many elements, and where each lies. Those of one shape lie
    side by side, in ``stacks``: views are made of all at once, in this ``order``."""

    size: int
    views: list[View | None]
    stacks: list[View]
    order: list[int]


def places(
    each: Sequence[tuple[Site, Sequence[Tensor]]], teacher: bool, student: bool
) -> tuple[Regions, Regions]:
    """Of weights and of gradients."""
    both = [zip(tensors_like(*one), one[0].differentiable(), strict=True) for one in each]
    grads = [like if trains else None for one in both for like, trains in one]
    return regions(weights_like(each, teacher, student)), regions(grads)


def rounded(elements: int) -> int:
    """The size of a region."""
    return -(-elements // REGION) * REGION


def regions(likes: Sequence[Tensor | None]) -> Regions:
    """Where results like these go."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for n, like in enumerate(likes):
        if like is not None:
            alike.setdefault((tuple(like.shape), like.stride()), []).append(n)
    views: list[View | None] = [None] * len(likes)
    stacks, size = [], 0
    for (shape, steps), members in alike.items():
        region = rounded(math.prod(shape))
        stacks.append(((len(members), *shape), (region, *steps), size))
        for n in members:
            views[n] = shape, steps, size
            size += region
    return Regions(size, views, stacks, [n for members in alike.values() for n in members])


def viewed(flat: Tensor, where: Regions) -> list[Tensor | None]:
    """What lies in it."""
    found: list[Tensor | None] = [None] * len(where.views)
    parts = (part for stack in where.stacks for part in flat.as_strided(*stack).unbind(0))
    for n, part in zip(where.order, parts, strict=True):
        found[n] = part
    return found


# --------------------------------------------------------------------------- kernels
KINDS = {
    ("goix", ""): "taps",
    ("goi", ""): "point",
    ("goi", "gox"): "point",
    ("gohx", "ghi"): "made",
    ("goh", "ghi"): "made",
    ("goie", "giex"): "depth",
}
"""What the kernels take a term for, by its letters."""


def refusal(site: Site) -> str:
    """Why a layer's branches have no kernel; empty if they have."""
    kinds = [KINDS.get((term.letters, term.others), "") for term in site.terms]
    for term, kind in zip(site.terms, kinds, strict=True):
        if not kind or (kind in ("made", "depth") and term.taps is not None):
            return f"there is no kernel for {term.letters} {term.others}".rstrip()
    twice = any(kinds.count(kind) > 1 for kind in ("made", "depth"))
    return "it has two products" if twice else ""

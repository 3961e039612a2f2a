"""Bytes that the elementwise kernels of a fold move, counted from the tables of a plan.

    python -m benchmarks.kernels bytes         # benchmarks/results/kernels_bytes.csv

All kernels but the matrix products: what they load and store of parameters, weights, gradients,
shares with their indices, operands and results of products, and partial sums; not the tables of
sizes and addresses, a few numbers a program. ``moved``: every load and store counts. ``unique``:
every address counts once a kernel, as if a cache kept all until the kernel ends, and no longer.

The least that any implementation has to move:

- forward: parameters, scales and tables of shares are read once, weights are written once;
- backward: the same and the weights' gradients are read once, those of parameters written once;
  a parameter without branches beside it is not read;
- operands of a product are written once, unless they are a parameter as it lies in memory: the left
  one if there is one tap, the right one without a residual, both in the parameters' type. The
  forward then reads this parameter in the product alone. The gradient of a product is an operand;
- results of a product are read once; but the gradient of a right operand in the parameters' type
  is written by the product where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gpdfx import Teacher
from gpdfx.kernels.fold import launch

SETS = ("none", "auto", "orepa", "acnet", "repvgg")
NETWORKS = ("torchvision:resnet18", "torchvision:resnet50")
SIZE = 224
"""Pixels: ``auto`` is narrower for small images."""
INDEX, SUM = 4, 4
"""Bytes of an index of shares, and of a partial sum."""
Move = tuple[str, int, int]
"""Kernel, bytes moved, distinct ones."""


class Sizes:
    """A layer's, in bytes."""

    def __init__(self, one: launch.Layout, own: Sequence[Tensor], made: torch.dtype) -> None:
        self.one, self.layer, self.form = one, one.site.layer, one.form
        self.item, self.made = own[0].itemsize, made.itemsize
        self.own = [t.numel() * t.itemsize for t in own]
        self.table = own[self.form.table].itemsize if one.site.share else 0
        self.visits = self.layer.channels * one.lines
        """Tiles of all rows."""
        self.teacher = self.own[0] if self.form.teacher else 0
        self.student = one.narrow.elements * self.item if self.form.student else 0
        self.terms = [part for part in one.parts if part.kind != "made"]
        self.product = next((part for part in one.parts if part.kind == "made"), None)
        self.left, self.right, self.result = 0, 0, 0
        if self.product is not None:  # elements
            self.left, self.right, self.result = (
                self.own[k] // self.item for k in (self.product.carrier, self.product.factor, 0)
            )

    def rows(self, kernel: str, count: int, item: int) -> Move:
        """So many numbers a row, in each of its tiles."""
        return kernel, count * self.visits * item, count * self.layer.channels * item

    def share(self, kernel: str) -> Iterator[Move]:
        """Shares of all inputs of a row, or one for a tile; their indices are read once for a
        program's rows."""
        one, layer = self.one, self.layer
        if one.site.share is None:
            return
        yield self.rows(kernel, 1, INDEX)
        inputs, pairs = layer.groups * layer.inputs, layer.channels * layer.inputs
        read = inputs
        if self.form.uniform:
            groups, _, copies = self.form.copies
            read, pairs = one.narrow.groups * groups * one.tiles * copies, self.visits
        yield kernel, read * INDEX * self.times(kernel), min(read, inputs) * INDEX
        yield kernel, pairs * self.table, self.own[self.form.table]

    def times(self, kernel: str) -> int:
        """How often what all rows of a program read is read: a mean reads it again in every row."""
        groups, outputs, inputs = self.form.copies
        again = kernel == "combine" and self.form.student == "mean" and groups * inputs > 1
        return self.one.row_blocks * (self.form.rows * outputs if again else 1)

    def term(self, kernel: str, part: launch.Part) -> Iterator[Move]:
        """What it is made of."""
        if part.kind != "eye":
            yield kernel, *[self.own[part.carrier]] * 2
        yield from self.factor(kernel, part)

    def factor(self, kernel: str, part: launch.Part) -> Iterator[Move]:
        """Depthwise kernels, or what there is along the taps of each row."""
        if part.kind == "depth":
            yield kernel, self.own[part.factor] * self.times(kernel), self.own[part.factor]
        elif part.factor >= 0:
            yield self.rows(kernel, self.layer.taps, self.item)

    def prepare(self, elements: int) -> Move:
        """So many of operands."""
        return "prepare", *[elements * (self.item + self.made)] * 2

    # ---- directions
    def forward(self) -> Iterator[Move]:
        if self.product:
            yield self.prepare(self.left + self.right)
        yield "combine", *[self.own[0] + self.teacher + self.student] * 2
        yield "combine", *[self.result * self.made] * 2
        if self.one.parts:
            yield self.rows("combine", 1 + len(self.one.parts), self.item)
        for part in self.terms:
            yield from self.term("combine", part)
        yield from self.share("combine")

    def backward(self) -> Iterator[Move]:
        one, channels, mean = self.one, self.layer.channels, self.form.student == "mean"
        yield "scatter", *[self.teacher + self.own[0]] * 2
        yield "scatter", self.own[0] if mean else self.student, self.student
        yield "scatter", *[self.result * self.made] * 2
        yield from self.share("scatter")
        if not one.parts:
            return
        several = 1 + len(self.terms)
        yield "scatter", *[self.own[0]] * 2
        yield self.rows("scatter", several, self.item)
        yield "scatter", *[several * self.visits * SUM] * 2
        yield "reduce", *[several * (self.visits * SUM + channels * self.item)] * 2
        for part in self.terms:
            yield from self.term("scatter", part)
            if part.kind == "eye":
                continue
            yield "scatter", *[self.own[part.carrier]] * 2  # its gradient
            if part.kind == "depth":
                sums = one.depths * one.row_blocks * SUM
                yield "scatter", sums, sums
                yield "reduce", *[sums + self.own[part.factor]] * 2
        if self.product:
            yield self.prepare(self.right)
            yield "finish", *[self.left * 2 * (self.made + self.item)] * 2
            yield "finish", *[2 * channels * self.item] * 2
            yield "reduce", *[self.right * (self.made + self.item)] * 2

    def least(self, backward: bool) -> int:
        """See above."""
        site, same = self.one.site, self.item == self.made
        classes = {self.form.table + 1} if site.share else set()
        total = sum(n for k, n in enumerate(self.own) if k not in classes)
        total += self.teacher + self.student + self.result * self.made
        if self.product is not None:
            residual = any(term.residual for term in site.terms)
            left, right = same and self.layer.taps == 1, same and not residual
            total += 0 if left else self.left * self.made
            total += -self.right * self.item if right else self.right * self.made
            if left and not backward:
                total -= self.left * self.item
        if backward:
            total -= 0 if self.one.parts else self.own[0]
            trained = zip(self.own, site.differentiable(), strict=True)
            total += sum(n for n, trains in trained if trains)
            total += self.left * self.made
            total += -self.right * self.item if same else self.right * self.made
        return total


def rows(network: str, branches: str, teacher: Teacher) -> Iterator[dict[str, object]]:
    """One for a direction and one for each of its kernels; parameters in float32, products in
    bfloat16."""
    (chunk,) = teacher._folding.whole
    tensors = chunk.tensors()
    own = [tensors[n].detach() for n in chunk.index]
    call = launch.prepared(own, chunk.key, True, True, torch.bfloat16)
    sizes = sizes_of(call.plan, own)
    for backward in (False, True):
        found = count(sizes, backward)
        least = sum(one.least(backward) for one in sizes)
        whole = tuple(sum(part) for part in zip(*found.values(), strict=True))
        for kernel, (moved, unique) in {"all": whole, **found}.items():
            yield {
                "network": network,
                "branches": branches,
                "direction": "backward" if backward else "forward",
                "kernel": kernel,
                "moved_mib": f"{moved / 2**20:.1f}",
                "unique_mib": f"{unique / 2**20:.1f}",
                "least_mib": f"{least / 2**20:.1f}",
                "moved": f"{moved / least:.3f}",
                "unique": f"{unique / least:.3f}",
            }


def sizes_of(plan: launch.Plan, own: Sequence[Tensor]) -> list[Sizes]:
    """Of all layers of a plan."""
    owned = (own[a:b] for a, b in pairwise(plan.firsts))
    return [Sizes(*both, plan.made) for both in zip(plan.layers, owned, strict=True)]


def count(sizes: Sequence[Sizes], backward: bool) -> dict[str, tuple[int, int]]:
    """Bytes moved and distinct ones, by kernel."""
    found: dict[str, tuple[int, int]] = {}
    for one in sizes:
        for kernel, moved, unique in one.backward() if backward else one.forward():
            before = found.get(kernel, (0, 0))
            found[kernel] = before[0] + moved, before[1] + unique
    return found

"""The geometry of a layer's weight, and how it is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """The geometry of a layer's weight. ``layout``: how it is stored, one of ``LAYOUTS``."""

    groups: int
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(groups, out, in, *kernel), per group."""
        return (self.groups, self.outputs, self.inputs, *self.kernel)

    @property
    def elements(self) -> int:
        """Of its weight."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Output channels of all groups."""
        return self.groups * self.outputs

    @property
    def taps(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.kernel)

    @property
    def spatial(self) -> bool:
        """True if the kernel has more than one element."""
        return self.taps > 1

    def line(self, along: int = -1) -> tuple[int, int, int]:
        """(start, stop, step) of the taps through the centre along a dimension of the kernel, or
        of the centre alone."""
        strides = [math.prod(self.kernel[d + 1 :]) for d in range(len(self.kernel))]
        steps = enumerate(zip(self.kernel, strides, strict=True))
        start = sum(k // 2 * step for d, (k, step) in steps if d != along)
        if along < 0:
            return start, start + 1, 1
        return start, start + strides[along] * self.kernel[along], strides[along]

    @property
    def channel_dim(self) -> int:
        """The dimension of the layer's output that its channels are."""
        return 1 if LAYOUTS[self.layout][0] else -1

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of a stored weight."""
        swapped = LAYOUTS[self.layout][1]
        rows, columns = (self.inputs, self.outputs) if swapped else (self.outputs, self.inputs)
        return self.groups * rows, columns, *self.kernel

    def by_taps(self, weight: Tensor) -> Tensor:
        """A stored weight as (groups, out, in, taps)."""
        if LAYOUTS[self.layout][1]:
            shape = self.groups, self.inputs, self.outputs, self.taps
            return weight.reshape(shape).transpose(1, 2)
        return weight.reshape(self.groups, self.outputs, self.inputs, self.taps)

    def view(self, weight: Tensor) -> Tensor:
        """A stored weight as (groups, out, in, *kernel)."""
        return self.by_taps(weight).reshape(self.shape)

    def store(self, weight: Tensor) -> Tensor:
        """The inverse of both."""
        weight = weight.transpose(1, 2) if LAYOUTS[self.layout][1] else weight
        return weight.reshape(self.stored)

    def per_channel(self, row: Tensor) -> Tensor:
        """(channels,) -> (groups, out, 1, ...): broadcasts against a weight."""
        return row.view(self.groups, self.outputs, *[1] * (1 + len(self.kernel)))


LAYOUTS = {
    "conv": (True, False),  # (groups * out, in, *kernel)
    "transposed": (True, True),  # (groups * in, out, *kernel)
    "linear": (False, False),  # (out, in)
    "matrix": (False, True),  # (in, out), as in x @ W
}
"""Layout -> groups and channels share the first dimension; input channels come first."""

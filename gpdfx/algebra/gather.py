"""Inverse reparameterization (IR) of one tensor: the student's values at the teacher's indices
(arXiv 2410.04140, section 3.2, without the division: see ``frozen`` for shares)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .frozen import Frozen

BLOCK = 2**14
"""Elements that a block must have on average to be copied by itself; below that, an index costs
less than a call for each."""


def gather(tensor: Tensor, maps: tuple[Frozen, ...], into: Tensor | None = None) -> Tensor:
    """``T[i, j, ...] = S[p(i), q(j), ...]``, one map per dimension, in the tensor's memory format:
    channels-last weights stay so. The tensor itself where no axis is wide. ``into``: memory that
    may be used, the result of another call for the same maps."""
    if not any(frozen.wide for frozen in maps):
        return tensor
    shape, kind = [frozen.teacher for frozen in maps], _memory_format(tensor)
    if math.prod(len(frozen.runs) for frozen in maps) * BLOCK > math.prod(shape):
        for dim, frozen in enumerate(maps):
            if frozen.wide:
                index = torch.from_numpy(frozen.map).to(tensor.device)
                tensor = tensor.index_select(dim, index)
        return tensor.contiguous(memory_format=kind)
    if into is None or into.dtype is not tensor.dtype:
        into = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=kind)
    for block in itertools.product(*(frozen.runs for frozen in maps)):
        copy = tuple(slice(to, to + n) for to, _, n in block)
        into[copy] = tensor[tuple(slice(at, at + n) for _, at, n in block)]
    return into


def scatter(wide: Tensor, maps: tuple[Frozen, ...]) -> Tensor:
    """The adjoint of ``gather``: the sum over all copies of every student index."""
    if not any(frozen.wide for frozen in maps):
        return wide
    if math.prod(len(frozen.runs) for frozen in maps) * BLOCK > wide.numel():
        for dim, frozen in enumerate(maps):
            if frozen.wide:
                index = torch.from_numpy(frozen.map).to(wide.device)
                shape = [*wide.shape[:dim], frozen.student, *wide.shape[dim + 1 :]]
                wide = wide.new_zeros(shape).index_add(dim, index, wide)
        return wide
    total = wide.new_zeros([frozen.student for frozen in maps])
    for block in itertools.product(*(frozen.runs for frozen in maps)):
        copy = tuple(slice(to, to + n) for to, _, n in block)
        total[tuple(slice(at, at + n) for _, at, n in block)] += wide[copy]
    return total


def _memory_format(tensor: Tensor) -> torch.memory_format:
    plain = torch.contiguous_format
    kind = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim, plain)
    return plain if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=kind) else kind

"""Extraction: the student's tensor out of the teacher's (the second half of CBR).

``first``, the paper's (arXiv 2410.04140, section 3.3): the first copy of every index, a view where
it can be one. Only the first copies then train with the student's loss, the others follow the
teacher's alone.

``mean``: the share-weighted mean of the copies. The student hears of everything that the teacher
learned in any copy, and its loss trains them all; where copies that grew apart cancel, it is
further from the teacher.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..algebra.frozen import Frozen
from ..kernels import copies
from ..passes.shares import Use

Maps = tuple[Frozen, ...]


def take_first(tensor: Tensor, maps: Maps) -> Tensor:
    """The first copy of every student index; a view where it can be one."""
    for dim, frozen in enumerate(maps):
        if not frozen.wide:
            continue
        outer, wide, narrow = frozen.blocks
        if outer == 1:
            tensor = tensor.narrow(dim, 0, narrow)
        elif outer:
            parts = tensor.unflatten(dim, (outer, wide)).narrow(dim + 1, 0, narrow)
            tensor = parts.flatten(dim, dim + 1)
        else:
            tensor = tensor.index_select(dim, _first(frozen, tensor.device))
    return tensor


_FIRST: WeakKeyDictionary[Frozen, dict[torch.device, Tensor]] = WeakKeyDictionary()
"""An axis owns its entry, which ends with it. Axes are pickled; what is on a device is not."""


def _first(frozen: Frozen, device: torch.device) -> Tensor:
    """Where the first copies are. Copied to a device once: every copy would make the host wait,
    which a CUDA graph cannot hold."""
    held = _FIRST.setdefault(frozen, {})
    if device not in held:
        with torch.inference_mode(False):  # or no later call could have a gradient
            index = torch.from_numpy(frozen.first).to(device)
        if type(index) is not Tensor:
            return index  # a tracer's own
        held[device] = index
    return held[device]


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: half the time of torch
_first._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Mean(nn.Module):
    """The share-weighted mean of one tensor's copies: ``first + sum_i s_i (copy_i - first)``,
    bit-exact while copies are equal, whatever the rounding of the shares.

    Along the dimension that the tensor's op contracts, s are the shares of that op (over the
    copies of one index they add up to 1); along all others every copy weighs the same.
    """

    def __init__(self, maps: Maps, use: Use | None) -> None:
        super().__init__()
        self.use = use
        wide = [d for d, m in enumerate(maps) if m.wide]
        place = -1 if use is None else use.dim % len(maps)
        self.dims = sorted(wide, key=lambda d: d != place)  # shares have the whole tensor's shape
        self.weighted = place in wide
        for d in wide:
            frozen = maps[d]
            rest = np.setdiff1d(np.arange(frozen.teacher), frozen.first)
            for name, array in (
                ("first", frozen.first),
                ("rest", rest),
                ("owner", frozen.map[rest]),
                ("copies", frozen.copies[frozen.map[rest]]),
                ("map", frozen.map),
            ):
                self.register_buffer(f"{name}_{d}", torch.from_numpy(array), persistent=False)

    def forward(self, tensor: Tensor, find: Any) -> Tensor:
        """``find``: name -> tensor of the teacher."""
        for d in self.dims:
            names = ("first", "rest", "owner", "copies", "map")
            first, rest, owner, count, index = (self.get_buffer(f"{k}_{d}") for k in names)
            if self.weighted and d == self.dims[0]:
                shares = self._shares(tensor, find)
                total = torch.zeros_like(shares.index_select(d, first)).index_add(d, index, shares)
                weight = (shares / total.index_select(d, index)).index_select(d, rest)
            else:
                weight = count.to(tensor.dtype).reciprocal()
                weight = weight.view([-1 if e == d else 1 for e in range(tensor.ndim)])
            head = tensor.index_select(d, first)
            delta = tensor.index_select(d, rest) - head.index_select(d, owner)
            tensor = head.index_add(d, owner, delta * weight)
        return tensor

    def _shares(self, like: Tensor, find: Any) -> Tensor:
        use = self.use
        assert use is not None
        split = list(use.split) if use.split else None
        ones = torch.ones_like(like)
        return copies.share(ones, find(use.table), find(use.classes), use.at, use.dim, split)

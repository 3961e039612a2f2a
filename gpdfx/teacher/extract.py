"""Extraction: the student's tensor out of the teacher's (the second half of CBR).

``first``, the paper's (arXiv 2410.04140, section 3.3): the first copy of every index, a view where
it can be one. Only the first copies then train with the student's loss, the others follow the
teacher's alone.

``mean``: the share-weighted mean of the copies. The student hears of everything that the teacher
learned in any copy, and its loss trains them all; where copies that grew apart cancel, it is
further from the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..algebra.frozen import MERGING, Frozen
from ..kernels import copies
from ..passes.shares import Shares
from ..torch_private import constant_result

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


def settle(maps: Maps) -> None:
    """Make now what ``take_first`` reads of axes: it may be traced before it ever ran, and the
    compiler does not look into what is made once."""
    for frozen in maps:
        if frozen.wide:
            _ = frozen.blocks


_FIRST: WeakKeyDictionary[Frozen, dict[torch.device, Tensor]] = WeakKeyDictionary()
"""An axis owns its entry, which ends with it. Axes are pickled; what is on a device is not."""


@constant_result
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


class Mean(nn.Module):
    """The share-weighted mean of one tensor's copies: ``first + sum_i s_i (copy_i - first)``,
    bit-exact while copies are equal, whatever the rounding of the shares.

    Along the dimension that the tensor's op contracts, s are the shares of that op (over the
    copies of one index they add up to 1); along all others every copy weighs the same.
    """

    def __init__(self, maps: Maps, shares: Shares | None) -> None:
        super().__init__()
        wide = [d for d, m in enumerate(maps) if m.wide]
        contracted = -1 if shares is None else shares.layout.dim % len(maps)
        self.shares = shares if contracted in wide else None
        self.dims = sorted(wide, key=lambda d: d != contracted)  # shares have the tensor's shape
        alike = [d for d in wide if d != contracted or self.shares is None]
        self.turns = {d: maps[d].blocks for d in alike if maps[d].in_turn}
        for d in [d for d in wide if d not in self.turns]:
            for name, array in maps[d].merging.items():
                self.register_buffer(f"{name}_{d}", torch.from_numpy(array), persistent=False)

    def forward(self, tensor: Tensor, find: Callable[[str], Tensor]) -> Tensor:
        """``find``: name -> tensor of the teacher."""
        for k, d in enumerate(self.dims):
            if d in self.turns:
                tensor = copies.narrow_turns(tensor, d, *self.turns[d])
                continue
            merging = (self.get_buffer(f"{name}_{d}") for name in MERGING)
            if k or self.shares is None:
                tensor = copies.narrow(tensor, d, *merging)
                continue
            first, rest, owner, _ = merging
            shares = self._read_shares(self.shares, tensor, find)
            others = shares.index_select(d, rest)
            total = shares.index_select(d, first).index_add(d, owner, others)
            head = tensor.index_select(d, first)
            delta = tensor.index_select(d, rest) - head.index_select(d, owner)
            tensor = head.index_add(d, owner, delta * (others / total.index_select(d, owner)))
        return tensor

    def _read_shares(self, shares: Shares, like: Tensor, find: Callable[[str], Tensor]) -> Tensor:
        at, dim, split = shares.layout.at, shares.layout.dim, shares.layout.split
        table, classes = find(shares.table), find(shares.classes)
        sizes = list(split) if split else None
        return copies.share(torch.ones_like(like), table, classes, at, dim, sizes)

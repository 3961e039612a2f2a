"""Placeholders: parameters that have a shape and no values yet."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def placeholder(p: nn.Parameter) -> nn.Parameter:
    """A parameter without values; of one of a class of its own a copy."""
    if type(p) is not nn.Parameter:
        return copy.deepcopy(p)
    empty = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=p.requires_grad)


def apply_to(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """``fn``, which moves a module to a dtype or a device; a placeholder stays one."""
    if not t.is_meta:
        return fn(t)
    try:
        return fn(t)
    except NotImplementedError:  # to a device
        dtype = fn(torch.empty(0, dtype=t.dtype)).dtype
        return torch.empty_strided(t.size(), t.stride(), dtype=dtype, device="meta")

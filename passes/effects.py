"""Which nodes stay although nobody reads what they return."""

from __future__ import annotations

import torch
from torch import fx

from ..kernels import copies
from .capture.inline import REGION
from .program import bind, is_mutable

aten = torch.ops.aten

_STATISTICS = {aten.batch_norm.default: "training", aten.instance_norm.default: "use_input_stats"}
"""Ops that write to statistics without their schema saying so -> the argument that says when."""


def draws(node: fx.Node) -> bool:
    """True if it moves the random state: without it every later draw would be another."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.target is copies.dropout_mask


def has_effect(node: fx.Node) -> bool:
    """True for what writes, draws random numbers, or enters or leaves a region."""
    if node.is_impure() or is_mutable(node) or draws(node) or node.target in REGION:
        return True
    return node.target in _STATISTICS and bool(bind(node)[_STATISTICS[node.target]])

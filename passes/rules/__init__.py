"""The rule tables: ATen overload -> how it treats axes. One file a family."""

from __future__ import annotations

from typing import Any

import torch

from . import (
    contraction,
    factory,
    lookup,
    movement,
    norm,
    pointwise,
    random,
    recurrent,
    reduction,
    spatial,
)
from .base import Rule

FAMILIES = (
    pointwise, contraction, recurrent, norm, reduction, movement, spatial, lookup, random, factory,
)  # fmt: skip
TABLE: dict[Any, Rule] = {op: rule for family in FAMILIES for op, rule in family.TABLE.items()}

CUSTOM: dict[Any, Rule] = {}
"""The user's own rows: see ``gpdfx.rule``."""


def rule_of(op: Any) -> Rule | None:
    """The rule of an overload: its row, or the one for every pointwise op, or none (a bridge)."""
    for table in (TABLE, CUSTOM):
        if op in table:
            return table[op]
    if (name := getattr(op, "_schema", None) and op._schema.name) in contraction.NAMED:
        return contraction.NAMED[name]
    tags = getattr(op, "tags", ())
    random_ = torch.Tag.nondeterministic_seeded in tags
    return pointwise.POINTWISE if torch.Tag.pointwise in tags and not random_ else None

"""The rule tables: ATen overload -> how it treats axes. ``tables/`` has one file a family.

Of the 413 rows 172 are signatures (``signature.py``): a line that is read like einops. Pointwise
ops have one rule by their tag, a signature too.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.user_function import UserFunction
from .tables import (
    contraction,
    factory,
    lookup,
    movement,
    norm,
    pointwise,
    quantized,
    random,
    recurrent,
    reduction,
    spatial,
)
from .writer import Rule

FAMILIES = (
    pointwise, contraction, recurrent, norm, reduction, movement, spatial, lookup, random, factory,
    quantized,
)  # fmt: skip
TABLE: dict[Any, Rule] = {op: rule for family in FAMILIES for op, rule in family.TABLE.items()}
SIGNATURES = sum(bool(rule.text) for rule in TABLE.values())

CUSTOM: dict[Any, Rule] = {}
"""The user's own rows: ``gpdfx.rule`` and ``gpdfx.unrule`` write them, ``rule_of`` reads them."""


def rule_of(op: Any) -> Rule | None:
    """The rule of an overload: its row, or the one for every pointwise op, or none (a bridge); of
    a user's function the one that it was seen to bear out."""
    if isinstance(op, UserFunction):
        return op.rule  # type: ignore[no-any-return]
    name = op._schema.name if hasattr(op, "_schema") else ""
    tags = getattr(op, "tags", ())
    random_ = torch.Tag.nondeterministic_seeded in tags
    by_tag = pointwise.POINTWISE if torch.Tag.pointwise in tags and not random_ else None
    return TABLE.get(op) or CUSTOM.get(op) or contraction.NAMED.get(name, by_tag)

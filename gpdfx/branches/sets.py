"""Sets of branches that go together, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from ..errors import InputError
from .kinds import (
    KINDS,
    Average,
    Branch,
    Frequency,
    Full,
    Identity,
    Line,
    LowRank,
    Pointwise,
    Product,
    Separable,
)
from .layer import Layer


@dataclass(frozen=True)
class BranchSet:
    """Branches that go together; ``live``: the origin's scale when training from scratch."""

    name: str
    branches: tuple[Branch, ...]
    live: float = 1.0

    def on(self, layer: Layer, positions: float = math.inf) -> BranchSet:
        """Those that fit a layer. ``positions``: how many a sample has that it computes."""
        fitting = tuple(b for b in self.branches if b.fits(layer))
        return BranchSet(self.name, fitting, self.live if fitting else 1.0)

    def named(self) -> dict[str, Branch]:
        """Branch by a name of its own: ``full``, ``full_1`` ..."""
        found: dict[str, Branch] = {}
        for branch in self.branches:
            kind = type(branch).__name__.lower()
            k = sum(type(b) is type(branch) for b in found.values())
            found[f"{kind}_{k}" if k else kind] = branch
        return found


_OREPA = (
    Average(live=0.25),
    Frequency(live=0.0),
    Product(live=0.5),
    Full(live=1.0),
    Separable(live=0.5),
)


_LINES = tuple(Line(dim=d) for d in range(3))


SETS = {
    s.name: s
    for s in (
        BranchSet("orepa", _OREPA, live=0.25),
        BranchSet("acnet", _LINES),
        BranchSet("repvgg", (Identity(), Pointwise())),
        BranchSet("lowrank", (LowRank(),)),
        BranchSet("dbb", (Pointwise(norm=True), Product(norm=True), Average(norm=True))),
        BranchSet(
            "mobileone",
            (Full(norm=True), Full(norm=True), Pointwise(norm=True), Identity(norm=True)),
        ),
    )
}
"""The named sets. ``"orepa"`` is the paper's: six branches with the origin."""


NONE = BranchSet("none", ())
PART, BATCH = 1 / 8, 64
"""What a product may cost of its layer, and at which batch."""


@dataclass(frozen=True)
class Auto(BranchSet):
    """The default: the paper's set where a kernel has more than one element, a low-rank branch
    on linear layers and 1x1 convolutions, for which the paper's branches are plain copies.

    A product is folded once a step, whatever the batch, and takes hidden times as many
    multiply-adds as the weight has elements; the layer takes batch times positions as many. So
    products are as narrow as keeps them to ``PART`` of their layer at a batch of ``BATCH``."""

    name: str = "auto"
    branches: tuple[Branch, ...] = ()

    def on(self, layer: Layer, positions: float = math.inf) -> BranchSet:
        chosen = SETS["orepa" if layer.spatial else "lowrank"].on(layer)
        most = PART * BATCH * positions
        return replace(chosen, branches=tuple(b.within(layer, most) for b in chosen.branches))


def branch_set(what: str, given: Any) -> BranchSet:
    """A set by its name, a list of branches, or none. Raises ``InputError``."""
    if given is None:
        return NONE
    if isinstance(given, str) and given == "auto":
        return Auto()
    if isinstance(given, str) and given in SETS:
        return SETS[given]
    if isinstance(given, Branch):
        return BranchSet("own", (given,))
    if isinstance(given, Sequence) and all(isinstance(b, Branch) for b in given):
        return BranchSet("own", tuple(given))
    if isinstance(given, BranchSet):
        return given
    raise InputError(
        f"{what} is {given!r}",
        remedy=f"pass one of auto, {', '.join(SETS)}, None, or a list of gpdfx.branches.Branch",
    )


def spell(chosen: BranchSet) -> Any:
    """A set as JSON: its name, or its branches with their fields."""
    if chosen.name != "own":
        return chosen.name
    return [
        {"branch": type(b).__name__} | {f.name: getattr(b, f.name) for f in fields(b)}
        for b in chosen.branches
    ]


def read(spelled: Any) -> Any:
    """The inverse of ``spell``, as ``expand`` takes it. Raises ``InputError`` for a branch that
    this module does not have, or not with these fields."""
    if not isinstance(spelled, list):
        return None if spelled == "none" else spelled
    return [_branch(dict(one) if isinstance(one, dict) else {}) for one in spelled]


def _branch(given: dict[str, Any]) -> Branch:
    kinds: dict[Any, type[Branch]] = {k.__name__: k for k in KINDS}
    name = given.pop("branch", None)
    if not isinstance(name, str) or name not in kinds:
        raise InputError(
            f"the file has branches of your own kind {name!r}",
            remedy="pass the same branches= to load",
        )
    types = get_type_hints(kinds[name])
    for key, value in given.items():
        if key not in types or not isinstance(value, types[key]):
            text = f"the file has a branch {name} with {key}={value!r}"
            raise InputError(text, remedy="pass branches= to load")
    return kinds[name](**given)

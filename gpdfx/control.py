"""What a user asks for beyond one width: ratios by module, what to keep, round numbers.

A pattern is matched as ``fnmatch`` does, case and all (``*`` crosses dots too), against names of
parameters and paths of modules; one that matches a module covers everything in it:

    "layer4"         layer4.0.conv1.weight, layer4.1.bn2.bias ...
    "*.bias"         every bias
    "blocks.[01]"    the first two blocks
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .branches.sets import NONE, BranchSet, branch_set
from .errors import InputError, suggest

MOST = 2**16
"""What a width is at most multiplied by, or a multiple of."""


@dataclass(frozen=True)
class Control:
    """``ratios``: pattern -> ratio, of which the last that covers a parameter counts; ``keep``:
    patterns of what stays; ``round_to``: what widened axes are multiples of; ``branches``:
    pattern -> branch set, of which the last that covers a weight counts.

    Parameters are asked for by all their names: a tied one has several.
    """

    ratios: dict[str, float]
    keep: tuple[str, ...] = ()
    round_to: int = 1
    branches: dict[str, BranchSet] = field(default_factory=dict)

    def entry(self, names: Sequence[str]) -> str:
        """The pattern whose ratio is a parameter's; ``"*"``, and ratio 1, if none covers it."""
        return _last(self.ratios, names)

    def ratio_of(self, names: Sequence[str]) -> float:
        """The ratio asked for a parameter."""
        return self.ratios.get(self.entry(names), 1.0)

    def keeps(self, names: Sequence[str]) -> bool:
        """True if a parameter has to stay."""
        return any(covers(pattern, names) for pattern in self.keep)

    def without(self, names: Iterable[str]) -> Control:
        """The same, but that these parameters stay, and have no branches."""
        bare = dict.fromkeys(names, NONE)
        return replace(self, keep=(*self.keep, *bare), branches=self.branches | bare)

    def branches_of(self, names: Sequence[str]) -> BranchSet:
        """The branch set asked for a weight."""
        return self.branches.get(_last(self.branches, names), NONE)

    @property
    def ratio(self) -> float | dict[str, float]:
        """One number for the whole network, or by pattern."""
        return self.ratios["*"] if [*self.ratios] == ["*"] else self.ratios

    def __str__(self) -> str:
        each = ", ".join(f"{pattern}: {r:g}" for pattern, r in self.ratios.items())
        text = "ratio " + (f"{self.ratio:g}" if isinstance(self.ratio, float) else f"{{{each}}}")
        text += f", keep {', '.join(self.keep)}" if self.keep else ""
        return text + (f", round to {self.round_to}" if self.round_to > 1 else "")


@dataclass(frozen=True)
class ExpandOptions:
    """How a teacher is made: what ``expand`` was asked for, checked."""

    control: Control = field(default_factory=lambda: Control({"*": 2.0}))
    scales: str = "preserve"
    shares: str = "random"
    extract: str = "first"
    features: tuple[str, ...] = ()
    randomness: str = "shared"
    dynamic: str = "sizes"
    seed: int = 0


def covers(pattern: str, names: Iterable[str]) -> bool:
    """True if a pattern matches one of these names, or a module that it lies in."""
    return any(fnmatchcase(path, pattern) for name in names for path in _paths(name))


def _last(patterns: Mapping[str, Any], names: Sequence[str]) -> str:
    """The last pattern that covers one of these names, ``"*"`` if there is none."""
    return next((p for p in reversed([*patterns]) if covers(p, names)), "*")


def _paths(name: str) -> list[str]:
    """``"a.b.weight"`` -> ``"a"``, ``"a.b"``, ``"a.b.weight"``."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format))


# --------------------------------------------------------------------------- checking arguments
def make_control(
    model: nn.Module, ratio: Any, keep: Any = (), round_to: Any = 1, branches: Any = None
) -> Control:
    """The arguments of ``expand`` as a value. Raises ``InputError``, with near names for a
    pattern that matches nothing in the model."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = dict.fromkeys(path for name in names for path in _paths(name))
    by_pattern = _by_pattern("ratio", ratio, known) or {"*": ("ratio", ratio)}
    ratios = {pattern: _number(*given) for pattern, given in by_pattern.items()}
    patterns = (keep,) if isinstance(keep, str) else keep
    if not isinstance(patterns, Sequence):
        raise InputError(f"keep is {keep!r}", remedy='pass patterns: keep="head", keep=["a", "b"]')
    for pattern in patterns:
        _check_pattern("keep", pattern, known)
    whole = isinstance(round_to, numbers.Integral) and not isinstance(round_to, bool)
    if not whole or not 1 <= round_to <= MOST:
        raise InputError(
            f"round_to is {round_to!r}",
            remedy=f"pass a whole number from 1 to {MOST}, for example 8",
        )
    sets = {p: branch_set(*given) for p, given in _by_pattern("branches", branches, known).items()}
    return Control(ratios, tuple(patterns), int(round_to), sets)


def _by_pattern(argument: str, given: Any, known: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Pattern -> what was given for it, and by which argument: ``ratio['blocks']``."""
    if not isinstance(given, Mapping):
        return {"*": (argument, given)}
    by_pattern = {pattern: (f"{argument}[{pattern!r}]", one) for pattern, one in given.items()}
    for pattern, (name, _) in by_pattern.items():
        _check_pattern(name, pattern, known)
    return by_pattern


def _number(what: str, given: Any) -> float:
    bad = not isinstance(given, numbers.Real) or isinstance(given, bool)
    if bad or not 1 <= given <= MOST:
        raise InputError(
            f"{what} is {given!r}",
            remedy=f"pass a number from 1 to {MOST}, for example 2 or 1.5, or a mapping from "
            'patterns to such numbers: {"*": 2, "layer4": 1.5}',
        )
    return float(given)


def _check_pattern(argument: str, pattern: Any, known: Iterable[str]) -> None:
    if not isinstance(pattern, str):
        raise InputError(
            f"{argument}: {pattern!r} is no pattern", remedy="pass names of modules or parameters"
        )
    if not covers(pattern, known):
        raise InputError(
            f"{argument}: {pattern!r} matches no parameter, and no module that has one",
            remedy=suggest(pattern, known),
        )

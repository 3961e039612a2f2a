"""What folds are called, and what passes find out about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..branches.kinds import BranchSet, Layer
from ..kernels.fold import Site


@dataclass(frozen=True)
class Branched:
    """A weight with branches, as the branch pass found it. ``bias``: the layer's, if it has one,
    which takes what normalized branches add to every pixel."""

    weight: str
    bias: str | None
    layer: Layer
    chosen: BranchSet


@dataclass(frozen=True)
class Lowered:
    """A weight's place in the fused fold, with branches or without, as the lowering pass found
    it. ``shares``: names of table and classes, if the fold multiplies by them."""

    site: Site
    shares: tuple[str, ...]


Make = Callable[[], Tensor]
Folded = Mapping[str, Tensor]
"""What graphs and student read instead of parameters, by these names:"""


def merged(name: str) -> str:
    """The weight (or bias) with all branches in it: the student's, and the teacher's in eval."""
    return name


def plain(name: str) -> str:
    """The weight without its normalized branches: the teacher's in train mode."""
    return f"{name} plain"


def kernel(name: str, branch: str) -> str:
    """The weight of one normalized branch alone."""
    return f"{name} {branch}"


def teachers(name: str) -> str:
    """The weight that the teacher reads, of the fused fold: with its shares."""
    return f"{name} teacher"


def students(name: str) -> str:
    """The weight that the student reads, of the fused fold: without shares, its part alone if the
    site has a ``cut``."""
    return f"{name} student"


PREFIX = "_branches"


def module_of(name: str) -> str:
    """Where the teacher keeps the branches of a weight."""
    return f"{PREFIX}.{name}"

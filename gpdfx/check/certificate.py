"""What the check found: law by law, where it was looked at, the worst error, what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..calls.sizes import Sizes
from ..errors import LossyError
from .facts import Errors
from .visit import BUG

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Finding:
    """One law at one visit (``"probe/eval"``): the worst relative error, of which fact, and how
    much was allowed."""

    law: str
    where: str
    error: float
    fact: str
    allowed: float

    @property
    def holds(self) -> bool:
        """True if it is no more than allowed, and a number."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Check:
    """A passed check: the certificate. ``findings``: what each law showed at each visit;
    ``left_out``: what could not be looked at, and why; ``dead``: parameters that move no output;
    ``vacuous``: outputs that are zero, or in part not numbers; ``dtype``: of the probe;
    ``sizes``: graph -> the input sizes at which it was seen to hold; ``unseen``: mode -> which
    gradients the student itself does not have."""

    findings: tuple[Finding, ...]
    left_out: tuple[str, ...]
    dead: tuple[str, ...]
    vacuous: tuple[str, ...]
    dtype: torch.dtype
    sizes: Mapping[str, Sizes]
    unseen: dict[str, str]

    @property
    def error(self) -> dict[str, float]:
        """The largest of each visit in float64: ``{"probe/eval": 1e-15, ...}``."""
        found: dict[str, float] = {}
        for one in self.findings:
            if one.where.startswith(("probe/", "real/")):
                found[one.where] = max(found.get(one.where, 0.0), one.error)
        return found

    @property
    def certificate(self) -> tuple[Certified, ...]:
        """Law by law."""
        made = []
        for law in dict.fromkeys(f.law for f in self.findings):
            of = [f for f in self.findings if f.law == law]
            worst = max(of, key=lambda f: f.error / (f.allowed or 1.0))
            where = tuple(dict.fromkeys(f.where for f in of))
            made.append(Certified(law, where, worst.error, worst.fact, worst.where))
        return tuple(made)

    @property
    def tolerance(self) -> float:
        """The largest that was used for them."""
        used = (f.allowed for f in self.findings if f.where in self.error)
        return max(used, default=TOLERANCE)


@dataclass(frozen=True)
class Certified:
    """One law of the certificate. ``where``: the visits at which it was looked at; ``error``: the
    largest, relative; ``fact``: of what; ``at``: where that was."""

    law: str
    where: tuple[str, ...]
    error: float
    fact: str
    at: str

    def __str__(self) -> str:
        seen = f"{self.error:.1e} ({self.fact}, {self.at})" if self.error else "no difference"
        return f"{self.law}: {seen}; looked at in {', '.join(self.where)}"


def worst(where: str, errors: Errors, law: str, allowed: float | Errors = TOLERANCE) -> Finding:
    """The worst of some facts, by what is allowed of it."""
    limits = allowed if isinstance(allowed, dict) else dict.fromkeys(errors, allowed)
    fact = max(errors, key=lambda f: errors[f] / limits[f], default=None)
    if fact is None:
        return Finding(law, where, 0.0, "", TOLERANCE)
    return Finding(law, where, errors[fact], str(fact), limits[fact])


def lossy(finding: Finding, **where: str | None) -> LossyError:
    """The error for a finding that is not allowed."""
    mode = finding.where.replace("/", ", ")
    text = f"{mode} mode: {finding.fact} differs by {finding.error:.2e}"
    return LossyError(f"{text} (allowed {finding.allowed:.0e})", remedy=BUG, **where)

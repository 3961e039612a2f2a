"""What can be observed of a call, and how far two observations of it are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..calls import tree
from ..calls.held import has_gradient

Inputs = tuple[Any, Any]
"""Positional and keyword inputs of a call."""


class Law(Enum):
    """What has to be the same, in words, and what a fact of it is called."""

    OUTPUTS = "outputs", "output {}"
    INPUTS = "gradients of inputs", "gradient of input {}"
    PARAMETERS = "gradients of parameters", "gradient of {}"
    BUFFERS = "buffers after the call", "buffer {}"
    GENERATORS = "generators after the call", "state of {}"
    CASTS = "casts", "{}"
    FOLD = "branches at the start", "{}"
    STUDENT = "the student's view", "{} of teacher.student"

    def __init__(self, title: str, fact: str) -> None:
        self.title, self.fact = title, fact


@dataclass(frozen=True)
class Fact:
    """One thing that is observed: an output or an input by number, a parameter or a buffer by
    name. ``part``: the path of the captured module that returned an output on the way; ``call``:
    which call of a sequence it belongs to.

    >>> str(Fact(Law.OUTPUTS, 3, "stem", 1))
    'output 3 (stem) of call 2'
    """

    law: Law
    which: int | str
    part: str = ""
    call: int = 0

    def __str__(self) -> str:
        text = self.law.fact.format(self.which)
        text += f" ({self.part})" if self.part else ""
        return f"{text} of call {self.call + 1}" if self.call else text


Observed = dict[Fact, Tensor]
Errors = dict[Fact, float]


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# --------------------------------------------------------------------------- the measure
MASK = 5e3
"""What is larger stands for infinity, as a rule (a mask of -1e4, -1e9, the least float16)."""
ORDERS = 1e-9
"""The typical size of a tensor is no more than this below its largest number under 1e12: what is
smaller may be a difference of numbers that were as large."""
EXACT = 1e-12
"""Of the typical size: what differs by less is told so, and not element by element."""
PIECE = 2**18
"""Elements that are looked at in one go: large memory costs more than what is done in it."""


def typical(x: Tensor) -> float:
    """The root mean square of what is not extreme, so that no mask can hide the rest."""
    x = x.detach()
    size = x.abs() if x.is_complex() else x
    total = float(torch.linalg.vector_norm(size, dtype=torch.float64))
    if total < MASK or float(torch.linalg.vector_norm(size, math.inf)) < MASK:  # as a rule
        return total / math.sqrt(max(size.numel(), 1))
    size = size.abs()
    size = size[size.isfinite() & (size > 0)].to(torch.float64)
    usual, bounded = size[size < MASK], size[size < 1e12]
    if not usual.numel():
        return float(size.square().mean().sqrt()) if size.numel() else 0.0
    return max(float(usual.square().mean().sqrt()), ORDERS * float(bounded.max()))


@torch.no_grad()
def difference(reference: Tensor, other: Tensor | None, floor: float = 0.0) -> float:
    """``max |a - b| / max(|a|, typical size, floor)``, element by element; infinite where shape or
    dtype differ, or what is not finite."""
    if other is None or reference.shape != other.shape or reference.dtype != other.dtype:
        return math.inf
    if reference.numel() == 0:
        return 0.0
    if not has_gradient(reference):
        return 0.0 if torch.equal(reference, other) else math.inf
    largest, size = _largest_gap(reference, other), None
    if not math.isfinite(largest):  # a mask of -inf, as a rule
        same = (reference == other) | (reference.isnan() & other.isnan())
        if not (same | (reference.isfinite() & other.isfinite())).all():
            return math.inf
        reference, other = (x.masked_fill(same, 0) for x in (reference, other))
        largest = _largest_gap(reference, other)
        size = reference.abs().nan_to_num(nan=1.0, posinf=1.0)
    if not largest:
        return 0.0
    scale = max(typical(reference), floor)
    if not scale:
        return math.inf
    if largest <= EXACT * scale:
        return largest / scale
    size = reference.abs() if size is None else size
    error = float((reference - other).abs().div_(size.clamp_min_(scale)).max())
    return error if not math.isnan(error) else math.inf


def _largest_gap(a: Tensor, b: Tensor) -> float:
    """``max |a - b|``."""
    pieces = zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True)
    return float(torch.stack([torch.linalg.vector_norm(x - y, math.inf) for x, y in pieces]).max())


def errors_of(reference: Observed, other: Observed, scales: Callable[[Fact], float]) -> Errors:
    """The error of all that is observed in either. A gradient that one of the two does not have is
    zero. ``scales``: below which size a fact is zero but for rounding."""
    errors: Errors = {}
    for fact in reference.keys() | other.keys():
        x, y = reference.get(fact), other.get(fact)
        if fact.law in (Law.INPUTS, Law.PARAMETERS):
            if x is None and y is not None:
                x = torch.zeros_like(y)
            y = torch.zeros_like(x) if y is None and x is not None else y
        errors[fact] = math.inf if x is None else difference(x, y, scales(fact))
    return errors


def scales_of(
    reference: Observed, inputs: Inputs, parameters: Mapping[str, Tensor]
) -> Callable[[Fact], float]:
    """Below some size a value is zero but for rounding: a mean is measured by the standard
    deviation, a gradient by a small part of output over input, or parameter (before a norm it is
    zero)."""
    outputs = [x for f, x in reference.items() if f.law is Law.OUTPUTS and floating(x)]
    largest = max(map(typical, outputs), default=0.0)
    leaves = tree.leaves(inputs)
    of = {str(f.which): typical(x) for f, x in reference.items() if f.law is Law.PARAMETERS}
    moved = max((x * typical(parameters[name]) for name, x in of.items()), default=0.0)

    def scale(fact: Fact) -> float:
        match fact:
            case Fact(Law.BUFFERS, str(name)) if name.endswith("_mean"):
                other = Fact(Law.BUFFERS, name.removesuffix("mean") + "var", call=fact.call)
                variance = reference.get(other)
                return 0.0 if variance is None else math.sqrt(float(variance.max()))
            case Fact(Law.INPUTS, int(k)):
                return 1e-6 * largest / (typical(leaves[k]) or 1.0)
            case Fact(Law.PARAMETERS, str(name)):
                return 1e-2 * moved / (typical(parameters[name]) or 1.0)
        return 0.0

    return scale


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal, number by number; not a number is equal to itself."""
    if torch.equal(a, b) or a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

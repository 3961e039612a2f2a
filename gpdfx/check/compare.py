"""Student and teacher, run once and compared in everything that is observed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import nn

from ..algebra.gather import gather
from ..errors import InputError, LossyError
from ..passes.program import duplicate
from .observe import GRADIENTS, Fact, Inputs, Kind, Observed, errors_of, floating, observe
from .streaming import StreamingTeacher

BUG = "this is a bug in gpdfx: please report it with the network"


class WrittenError(Exception):
    """A student writes to its own parameters."""


# --------------------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Pair:
    """A student, and a teacher that has its weights. ``borrow``: copies of the student share its
    parameters, and must not write to them."""

    student: nn.Module
    teacher: StreamingTeacher
    inputs: Inputs
    seed: int
    borrow: bool

    def copy(self) -> nn.Module:
        """Another student, with buffers of its own."""
        shared = {id(p): p for p in self.student.parameters()} if self.borrow else None
        return duplicate(self.student, shared)

    def digest(self) -> list[str]:
        """Another one after a copy has written to what it borrows."""
        return [str(p.detach().sum().item()) for p in self.student.parameters() if self.borrow]

    def load(self) -> None:
        """Give the teacher the student's parameters and buffers."""
        self.teacher.load_student(self.student)

    def reload(self) -> None:
        """Undo what a call of the teacher wrote."""
        if self.borrow:
            self.teacher._load_buffers(self.student)
        else:  # the call wrote to its parameters, too
            self.load()


# --------------------------------------------------------------------------- comparing
@dataclass(frozen=True)
class Comparison:
    """What one mode shows. ``errors``: relative, of everything observed; ``moved``: parameters
    that moved an output; ``vacuous``: outputs that are zero, or in part not numbers; ``silent``:
    no output is anything else; ``gradients``: which of ``GRADIENTS`` the student has."""

    errors: dict[Fact, float]
    moved: frozenset[str]
    vacuous: tuple[Fact, ...]
    silent: bool
    gradients: str

    @property
    def worst(self) -> tuple[Fact | None, float]:
        """What differs most, and by how much."""
        return max(self.errors.items(), key=itemgetter(1), default=(None, 0.0))


def compare(pair: Pair, mode: str, *, dead: bool) -> Comparison:
    """Run both in one mode. ``dead``: also see which parameters move an output (their gradients
    are most of the cost). Raises ``WrittenError`` if borrowed parameters are written to."""
    teacher = pair.teacher
    teacher.train(mode == "train")
    run, expected, gradients = _run_student(pair, mode, dead)
    try:
        parts = teacher._parts_in(teacher._python_shell)
        with teacher.saving():
            got = observe(teacher, pair.inputs, pair.seed, gradients, parts=parts, given=expected)
    except Exception as error:  # whatever torch raises when widths do not fit
        text = f"the teacher fails where the student runs: {error}"
        raise LossyError(text, remedy=BUG) from error
    asked = [fact for fact in expected if fact.kind is Kind.PARAMETER_GRADIENT]
    moved = [str(fact.which) for fact in asked if expected.pop(fact)]
    if dead and gradients == "none":  # unknown
        moved = [name for name, _ in run.named_parameters()]
    _add_buffers(teacher, run, expected, got)
    _drop_missing(expected, got)
    errors = errors_of(expected, got, pair.inputs)
    errors |= {fact: math.inf for fact in got if fact not in expected}
    shown = {f: x for f, x in expected.items() if f.kind is Kind.OUTPUT and x.numel()}
    blank = [f for f, x in shown.items() if floating(x) and not x[x.isfinite()].any()]
    partial = [f for f, x in shown.items() if f not in blank and x.isnan().any()]
    silent = len(blank) == len(shown)
    return Comparison(errors, frozenset(moved), (*blank, *partial), silent, gradients)


def _run_student(pair: Pair, mode: str, dead: bool) -> tuple[nn.Module, Observed, str]:
    """A copy that ran, what it showed, and which of ``GRADIENTS`` it has."""
    for gradients in GRADIENTS:
        before, run = pair.digest(), pair.copy().train(mode == "train")
        parts, named = pair.teacher._parts_in(run), run.named_parameters()
        asked = {n: p.requires_grad_() for n, p in named if dead and p.is_floating_point()}
        try:
            seen = observe(run, pair.inputs, pair.seed, gradients, parameters=asked, parts=parts)
            break
        except RuntimeError as error:
            if gradients == "none":
                remedy = "mend the model, or pass verify=False if it is never used in this mode"
                text = f"the model itself fails in {mode} mode: {error}"
                raise InputError(text, remedy=remedy) from error
    if pair.digest() != before:
        raise WrittenError
    for p in asked.values():
        p.requires_grad_(False)
    return run, seen, gradients


def _add_buffers(
    teacher: StreamingTeacher, run: nn.Module, expected: Observed, got: Observed
) -> None:
    """Those of a student that ran, at the teacher's indices, and the teacher's. One that was
    registered in forward, or replaced by one of another shape, is a cache."""
    buffers, facts = dict(teacher.named_buffers()), teacher._facts
    for name, buffer in run.named_buffers():
        maps = facts.maps.get(facts.alias.get(name, name))
        if maps is not None and tuple(m.student for m in maps) == buffer.shape:
            fact = Fact(Kind.BUFFER, name)
            expected[fact], got[fact] = gather(buffer, maps), buffers[name]


def _drop_missing(expected: Observed, got: Observed) -> None:
    """Leave out the gradients that the student itself does not have: a root at zero, say, of the
    distance between boxes. The teacher must lack the same ones."""
    for fact in expected.keys() & got.keys():
        if fact.kind is Kind.INPUT_GRADIENT and expected[fact].shape == got[fact].shape:
            missing = ~expected[fact].isfinite()
            if torch.equal(missing, ~got[fact].isfinite()):
                for seen in (expected, got):
                    seen[fact] = seen[fact].masked_fill(missing, 0)


def rounding(pair: Pair, mode: str, gradients: str) -> float:
    """The largest relative change of anything observed when each weight changes its last bit."""
    student = duplicate(pair.student).train(mode == "train")
    expected = observe(student, pair.inputs, pair.seed, gradients)
    student = duplicate(pair.student).train(mode == "train")
    with torch.no_grad():
        for p in student.parameters():
            if p.is_floating_point():
                p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape).to(p))
    got = observe(student, pair.inputs, pair.seed, gradients)
    return max(errors_of(expected, got, pair.inputs).values())

"""One visit: student and teacher called beside each other, and everything observed of both."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.gather import gather
from ..calls import progress, tree
from ..calls.held import has_gradient
from ..errors import InputError, LossyError
from ..passes.capture.modes import EVAL, enter
from ..passes.program import duplicate, source_line
from .facts import Errors, Fact, Inputs, Law, Observed, errors_of, floating, scales_of
from .observe import GRADIENTS, observe
from .streaming import StreamingTeacher

BUG = "this is a bug in gpdfx: please report it with the network"


Turns = tuple[tuple[int, str], ...]
"""Number and mode of calls."""


class WrittenError(Exception):
    """A student writes to its own parameters."""


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
        return duplicate(self.student, shared, ours=True)

    def enter(self, student: nn.Module, mode: str) -> nn.Module:
        """Bring a copy into a mode."""
        return enter(student, mode, self.teacher._modes.captured)

    def copy_in(self, mode: str) -> nn.Module:
        """``copy``, in a mode."""
        return self.enter(self.copy(), mode)

    def digest(self) -> list[Any]:
        """Another one after a copy has written to what it borrows."""
        borrowed = self.student.parameters() if self.borrow else ()
        return [p.detach().sum().item() for p in borrowed if p.layout is torch.strided]

    def load(self) -> None:
        """Give the teacher the student's parameters and buffers."""
        self.teacher.load_student(self.student)

    def reload(self) -> None:
        """Undo what calls of the teacher changed."""
        self.teacher.forget_calls()
        if self.borrow:
            self.teacher._load_buffers(self.student)
        else:  # the call wrote to its parameters, too
            self.load()


@dataclass(frozen=True)
class Visit:
    """What one mode shows. ``errors``: relative, of everything observed; ``moved``: parameters
    that moved an output; ``vacuous``: outputs that are zero, or in part not numbers; ``silent``:
    no output is anything else; ``gradients``: which of ``GRADIENTS`` the student has; ``turns``:
    the calls that it took after the first; ``expected``: what the student showed."""

    errors: Errors
    moved: frozenset[str]
    vacuous: tuple[Fact, ...]
    silent: bool
    gradients: str
    turns: Turns
    expected: Observed

    def without(self, facts: Collection[Fact]) -> Visit:
        """The same, but for some facts."""
        return replace(self, errors={f: x for f, x in self.errors.items() if f not in facts})

    @property
    def worst(self) -> tuple[Fact | None, float]:
        """What differs most, and by how much."""
        return max(self.errors.items(), key=itemgetter(1), default=(None, 0.0))


def visit(pair: Pair, mode: str, *, differentiate: bool, calls: int = 1) -> Visit:
    """Call both in one mode, several times in a row, the first time with gradients; after several
    once more in eval mode, on what these have left. Raises ``WrittenError`` if
    borrowed parameters are written to."""
    pair.reload()
    teacher = pair.teacher
    teacher._enter(mode)
    before, run = pair.digest(), pair.copy()
    levels = tuple(GRADIENTS) if differentiate else ("none",)
    turns = tuple((k, mode) for k in range(1, calls))
    turns += ((calls, EVAL),) if calls > 1 else ()
    progress.of("the student")
    run, expected, gradients, turns = _run_student(pair, run, mode, levels, turns)
    if pair.digest() != before:
        raise WrittenError
    progress.of("the teacher")
    try:
        with teacher.saving():
            got = _run_teacher(pair, gradients, expected, turns)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever torch raises when widths do not fit
        text = f"the teacher fails where the student runs: {error}"
        apart = "" if teacher._code.shell is None else None
        raise LossyError(text, remedy=BUG, apart=apart) from error
    _drop_missing(expected, got)
    parameters = dict(run.named_parameters())
    errors = errors_of(expected, got, scales_of(expected, pair.inputs, parameters))
    asked = {f: x for f, x in expected.items() if f.law is Law.PARAMETERS}
    moved = {str(f.which) for f, x in asked.items() if bool(x.any())}
    if gradients == "none":  # unknown
        moved = set(parameters)
    shown = {f: x for f, x in expected.items() if _shows(f, x)}
    blank = [f for f, x in shown.items() if floating(x) and not x[x.isfinite()].any()]
    in_part = [f for f, x in shown.items() if f not in blank and x.isnan().any()]
    silent = len(blank) == len(shown)
    return Visit(errors, frozenset(moved), (*blank, *in_part), silent, gradients, turns, expected)


def _shows(fact: Fact, x: Tensor) -> bool:
    """True for an output of the first call that is a tensor with elements."""
    numbered = isinstance(fact.which, int) and not fact.call
    return fact.law is Law.OUTPUTS and numbered and bool(x.numel())


# --------------------------------------------------------------------------- both sides
def _run_student(
    pair: Pair, run: nn.Module, mode: str, levels: Sequence[str], turns: Turns
) -> tuple[nn.Module, Observed, str, Turns]:
    """A copy that ran, what it showed, which of ``GRADIENTS`` it has, and the turns it took."""
    for level in levels:
        pair.enter(run, mode)
        parts = pair.teacher._code.parts_in(run)
        asked = {n: p for n, p in run.named_parameters() if has_gradient(p)}
        try:
            for p in asked.values():
                p.requires_grad_(level != "none")
            seen = observe(run, pair.inputs, pair.seed, level, parameters=asked, parts=parts)
            break
        except Exception as error:  # whatever the user's code raises, in its backward too
            if level == levels[-1]:
                remedy = "mend the model, or pass verify=False if it is never used in this mode"
                text = f"the model itself fails in {mode} mode: {type(error).__name__}: {error}"
                trace = "".join(traceback.format_exception(error))
                source = source_line(trace) or None
                raise InputError(text, source=source, remedy=remedy) from error
            run = pair.copy()
        finally:
            for p in asked.values():  # a backward that failed may have left some
                p.requires_grad_(False).grad = None
    seen |= _student_buffers(pair, run, 0)
    for place, (k, then) in enumerate(turns):
        pair.enter(run, then)
        try:
            inputs = other_inputs(pair.inputs, k)
            more = observe(run, inputs, pair.seed + k, parts=parts, number=k)
        except Exception:  # not every other input is one of the model's
            return run, seen, level, turns[:place]
        seen |= more | _student_buffers(pair, run, k)
    return run, seen, level, turns


def _run_teacher(pair: Pair, gradients: str, expected: Observed, turns: Turns) -> Observed:
    teacher = pair.teacher
    parts = teacher._code.parts_in(teacher._code.shell)
    look = partial(observe, teacher, parts=parts, given=expected, copy=tree.copied)
    seen = look(pair.inputs, pair.seed, gradients, parameters=teacher.sources)
    for fact in [f for f in seen if f.law is Law.PARAMETERS]:
        own = teacher.own_gradient(str(fact.which), seen[fact])
        seen[fact] = own
    seen |= _teacher_buffers(teacher, expected, 0)
    for k, mode in turns:
        teacher._enter(mode)
        seen |= look(other_inputs(pair.inputs, k), pair.seed + k, number=k)
        seen |= _teacher_buffers(teacher, expected, k)
    return seen


def _student_buffers(pair: Pair, run: nn.Module, call: int) -> Observed:
    """Those of a student that ran, at the teacher's indices. One that was registered in forward,
    or replaced by one of another shape, is a cache. One in float64, as the check has it, that
    forward replaces by what it makes in a narrower type is what the teacher's holds exactly."""
    facts, seen = pair.teacher._facts, Observed()
    double = {n for n, b in pair.student.named_buffers() if b.dtype is torch.float64}
    for name, buffer in run.named_buffers():
        maps = facts.maps.get(facts.alias.get(name, name))
        if maps is not None and tuple(m.student for m in maps) == buffer.shape:
            own = buffer.detach()
            own = own.double() if name in double and own.is_floating_point() else own
            wide = gather(own, maps)
            seen[Fact(Law.BUFFERS, name, call=call)] = wide.clone() if wide is own else wide
    return seen


def _teacher_buffers(teacher: StreamingTeacher, expected: Observed, call: int) -> Observed:
    buffers = dict(teacher.named_buffers())
    asked = [f for f in expected if f.law is Law.BUFFERS and f.call == call]
    return {fact: buffers[str(fact.which)].detach().clone() for fact in asked}


def other_inputs(inputs: Inputs, k: int) -> Inputs:
    """Other ones of the same kind: samples in turn, floating numbers a little smaller."""
    leaves = [x for x in tree.leaves(inputs) if isinstance(x, Tensor)]
    batch = next((len(x) for x in leaves if x.ndim), 0)

    def other(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        x = x.roll(k, 0) if x.ndim and len(x) == batch else x
        return x * (1 - 0.1 * k) if x.is_floating_point() else x

    made: Inputs = tree.map_leaves(other, inputs)
    return made


def _drop_missing(expected: Observed, got: Observed) -> None:
    """Leave out the gradients that the student itself does not have: a root at zero, say, of the
    distance between boxes. The teacher must lack the same ones."""
    for fact in expected.keys() & got.keys():
        x, y = expected[fact], got[fact]
        if fact.law in (Law.INPUTS, Law.PARAMETERS) and x.shape == y.shape:
            missing = ~x.isfinite()
            if missing.any() and torch.equal(missing, ~y.isfinite()):
                expected[fact], got[fact] = x.masked_fill(missing, 0), y.masked_fill(missing, 0)


def rounding(pair: Pair, mode: str, seen: Visit) -> Errors:
    """The relative change of all that is observed when each weight changes its last bit."""
    student = nudged(pair.student, pair.seed)
    _, got, _, _ = _run_student(pair, student, mode, (seen.gradients,), seen.turns)
    _drop_missing(seen.expected, got)
    parameters = dict(student.named_parameters())
    return errors_of(seen.expected, got, scales_of(seen.expected, pair.inputs, parameters))


@torch.no_grad()
def nudged(module: nn.Module, seed: int) -> nn.Module:
    """A copy, whose weights differ in their last bits."""
    module, draw = duplicate(module, ours=True), torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.is_floating_point():
            step = torch.randint(-1, 2, p.shape, generator=draw)
            p.mul_(1 + torch.finfo(p.dtype).eps * step.to(p))
    return module

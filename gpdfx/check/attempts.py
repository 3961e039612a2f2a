"""In which ways the laws are tried: on which inputs, probe and precision, until one decides."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import LossyError
from ..kernels.quantize import SINGLE
from ..passes.capture.modes import enter
from ..passes.follow import bakes_constants, casts_on_purpose
from ..passes.program import Program, duplicate
from ..passes.widen import Widened
from .facts import Inputs
from .observe import observe
from .probe import Precision, precisions, randomize, settle_statistics
from .streaming import StreamingTeacher
from .visit import WrittenError

PROBES = 3
SMALL, SAMPLES, LARGE = (64, 96, 128), (4, 2), 2**20
"""Free sizes are cut to one of these, the batch to so many: the fewer, the sooner the check is
over; fewer samples leave batch norm too few values, but of inputs with as many numbers as a
video."""


class StaleError(LossyError):
    """The student does not see new parameters."""


class UndecidedError(LossyError):
    """A probe that says nothing: rounding alone makes as large a difference, or all is zero."""


@dataclass(frozen=True)
class Attempt:
    """How the laws are tried: on which probe (``settled``: with its batch's own statistics), in
    which precision, with float32's tolerance or not (``loose``), on inputs that were ``cut`` or
    not, and whether copies of the student may ``borrow`` its parameters."""

    seed: int
    precision: Precision
    settled: bool
    loose: bool
    cut: bool = False
    borrow: bool = True

    def student(self, original: nn.Module, *, probe: bool) -> nn.Module:
        """A copy of the student, with the weights of the probe or its own."""
        student = duplicate(original, ours=True)
        if probe:
            randomize(student, self.seed)
        self.precision.convert(student).requires_grad_(False)
        if probe and self.settled:
            settle_statistics(student, self.precision.inputs)
        return student


def attempts(
    program: Program, inputs: Sequence[Inputs], seed: int, *, borrow: bool = True
) -> Generator[Attempt, Exception]:
    """Every attempt is answered by the error that it ended with; if no other attempt can follow it,
    the first is raised that decided anything. A student that writes to its parameters gets copies;
    where a lifted cast makes a difference (baked constants of a dtype do not follow it), and none
    between the graphs of student and teacher, casts stay what they are; what a small size shows has
    to show at the example's; what a probe leaves undecided, another one may decide."""
    single = casts_on_purpose(program)
    lift = bakes_constants(program) or bool(program.apart)
    rounds = any(node.target in SINGLE for _, node in program.each())
    errors: list[Exception] = []
    for probe in range(PROBES):
        for given in inputs:
            tried: list[Exception] = []
            for precision in precisions(
                program.student, given, lift=lift or rounds, casts=single or rounds
            ):
                loose = precision.dtype is None or (single and not precision.lifted)
                cut = given is not inputs[-1]
                attempt = Attempt(seed + probe, precision, probe > 0, loose, cut, borrow)
                error = yield attempt
                if isinstance(error, WrittenError):
                    error = yield replace(attempt, borrow=False)
                tried.append(error)
                if not precision.lifted or _is_no_casts(error):
                    break
            errors.append(tried[-1] if isinstance(tried[-1], UndecidedError) else tried[0])
        if not isinstance(errors[-1], UndecidedError):
            break
    decided = [e for e in errors if not isinstance(e, UndecidedError)]
    raise (decided or errors)[0]


def _is_no_casts(error: Exception) -> bool:
    """True for an error that a cast which was lifted cannot have made: student and teacher differ
    from one node of the graph on, which both have lifted, or the student sees no new weights."""
    return isinstance(error, StaleError) or (isinstance(error, LossyError) and bool(error.node))


# --------------------------------------------------------------------------- inputs
def trial_inputs(program: Widened, teacher: StreamingTeacher, example: Inputs) -> list[Inputs]:
    """What the laws are looked at with: the example cut to a small size if capture left sizes
    free and the model runs there; the example itself."""
    small = _smaller(program, teacher, example) if program.parts == [""] else None
    return [example] if small is None else [small, example]


def _smaller(program: Widened, teacher: StreamingTeacher, example: Inputs) -> Inputs | None:
    sections = list(teacher.sections.values())
    call = sections[0].call
    flat = call.flatten(*example)
    for size in SMALL:
        for samples in SAMPLES:
            cut = [section.sizes.smaller(flat, size, samples, call.names) for section in sections]
            if all(x.numel() < LARGE for x in cut[0] or ()):
                break
        if cut[0] is None or any(moved is None for moved in cut):
            continue
        shapes = [[x.shape for x in moved or ()] for moved in (flat, *cut)]
        if shapes[0] == shapes[1]:
            return None
        inputs: Inputs = call.unflatten(cut[0])
        runs = (_runs(program, inputs, mode) for mode in program.flags)
        if all(shape == shapes[1] for shape in shapes[2:]) and all(runs):
            return inputs
    return None


def _runs(program: Program, inputs: Inputs, mode: str) -> bool:
    try:
        observe(enter(duplicate(program.student, ours=True), mode, program.flags), inputs, 0)
    except Exception:  # not one of the model's sizes
        return False
    return True

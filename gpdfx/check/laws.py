"""The one equality check: do two networks compute the same function?

Observed are outputs of any structure, the gradient with respect to every floating input, and all
buffers after the call, in eval and in train mode, with equal seeds. A check on fresh weights is
often vacuous (a zero-initialised last norm hides what stands before it), so ``verify`` runs on a
*probe*: a copy with generic parameters, in float64; then once more on the real weights.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..algebra.gather import gather
from ..errors import LossyError
from ..passes.follow import casts_on_purpose
from ..passes.program import duplicate
from ..passes.widen import Widened
from ..teacher.collapse import filled
from ..teacher.compiled import Compiled
from ..teacher.module import Teacher
from .compare import BUG, Comparison, Pair, WrittenError, compare, rounding
from .free_sizes import free_levels
from .locate import first_difference
from .observe import GRADIENTS, Inputs, difference, identical, keep_rng, observe
from .probe import Precision, precisions, randomize, settle_statistics
from .streaming import StreamingTeacher

TOLERANCE = 1e-10
CEILING = 1e-7  # where rounding itself is amplified
PROBES = 3
SINGLE = 1e-5  # where the network computes in float32 whatever its parameters are
_NOISY = (
    "rounding alone changes this network's result as much on this example (batch norm over very "
    "few values, as a rule): pass example_inputs with a larger batch or a larger image"
)
_ZERO = (
    "with random weights this network answers nothing on this example: pass example_inputs that "
    "reach its output, or verify=False"
)


@dataclass(frozen=True)
class Check:
    """A passed comparison. ``error``: ``{"probe/eval": 1e-15, ...}``, relative, the largest over
    everything observed; ``vacuous``: outputs that are zero, or in part not numbers; ``dead``:
    parameters that move no output; ``tolerance``: the largest that was used; ``free``: the input
    sizes, part by part (a level of ``LEVELS``), that were seen to hold at other values than the
    example's; ``unseen``: mode -> which gradients the student itself does not have."""

    error: dict[str, float]
    tolerance: float
    dead: tuple[str, ...]
    vacuous: tuple[str, ...]
    dtype: torch.dtype
    free: dict[str, str]
    unseen: dict[str, str]


class _StaleError(LossyError):
    """The student does not see new parameters."""


class _UndecidedError(LossyError):
    """A probe that says nothing: rounding alone makes as large a difference, or all is zero."""


def verify(compiled: Compiled, *, seed: int = 0) -> Check:
    """Raise ``LossyError``, naming the first node that differs, unless student and teacher agree
    on a probe and on the real weights, in eval and train mode.

    The tolerance is 1e-10 in float64. Where rounding itself is amplified it is 50 times the
    change that a change in the last bit of the weights makes, never above 1e-7. Casts to a narrow
    dtype are lifted to float64, too; for networks that do not run so and cast on purpose, or do not
    run in float64 at all, it is 1e-5. A probe on which rounding alone
    makes more of a difference (an activation that lies at zero), or every output is zero, decides
    nothing: another one is drawn, with settled statistics, up to ``PROBES``.
    """
    program, teacher = compiled.program, StreamingTeacher(compiled)
    single = casts_on_purpose(program)
    attempts = _attempts(program.student, compiled.example, seed, single)
    attempt = next(attempts)
    while True:
        try:
            with attempt.precision():
                return _check(program, teacher, attempt)
        except (LossyError, WrittenError) as error:
            attempt = attempts.send(error)
            traceback.clear_frames(error.__traceback__)  # they hold the student that was tried


# --------------------------------------------------------------------------- attempts
@dataclass(frozen=True)
class Attempt:
    """How the laws are tried: on which probe (``settled``: with its batch's own statistics), in
    which precision, with float32's tolerance or not (``loose``), and whether copies of the student
    may ``borrow`` its parameters."""

    seed: int
    precision: Precision
    settled: bool
    loose: bool
    borrow: bool = True

    def student(self, original: nn.Module, *, probe: bool) -> nn.Module:
        """A copy of the student, with the weights of the probe or its own."""
        student = duplicate(original)
        if probe:
            randomize(student, self.seed)
        self.precision.convert(student).requires_grad_(False)
        if probe and self.settled:
            settle_statistics(student, self.precision.inputs)
        return student


def _attempts(
    student: nn.Module, inputs: Inputs, seed: int, single: bool
) -> Generator[Attempt, Exception]:
    """Every attempt is answered by the error that it ended with, which is raised if no other
    attempt can follow it. A student that writes to its parameters gets copies; where a lifted
    cast makes a difference (baked constants of a dtype do not follow it), casts stay what they are;
    what a probe leaves undecided, another one may decide."""
    for probe in range(PROBES):
        for precision in precisions(student, inputs):
            loose = precision.dtype is None or (single and not precision.lifted)
            attempt = Attempt(seed + probe, precision, settled=probe > 0, loose=loose)
            error = yield attempt
            if isinstance(error, WrittenError):
                error = yield replace(attempt, borrow=False)
            if not precision.lifted or isinstance(error, _StaleError):
                break
        if not isinstance(error, _UndecidedError):
            break
    raise error


def _check(program: Widened, teacher: StreamingTeacher, attempt: Attempt) -> Check:
    """Try all laws, on the probe and on the real weights."""
    precision, original = attempt.precision, program.student
    precision.convert(teacher).requires_grad_(False)
    teacher.noise = None
    tolerance, error, moved = TOLERANCE, dict[str, float](), set[str]()
    vacuous, unseen = list[str](), dict[str, str]()
    for weights in ("probe", "real"):
        teacher.forget_student()  # the last student is forgotten before the next is made
        student = attempt.student(original, probe=weights == "probe")
        pair = Pair(student, teacher, precision.inputs, attempt.seed, attempt.borrow)
        pair.load()
        with teacher._folded_once():
            for mode in ("eval", "train"):
                seen, used = _same_function(program, pair, attempt, weights, mode)
                tolerance = max(tolerance, used)
                error[f"{weights}/{mode}"] = seen.worst[1]
                zero = ("every output",) if seen.silent else seen.vacuous
                vacuous += [f"{weights}/{mode}: {fact}" for fact in zero]
                moved |= seen.moved
                if missing := GRADIENTS[seen.gradients]:
                    unseen[mode] = missing
            if weights == "probe":
                free = free_levels(pair, tolerance)
        del student, pair
    _student_follows(teacher, precision.inputs, attempt.seed, tolerance)
    parameters = original.named_parameters()
    dead = tuple(n for n, p in parameters if n not in moved and p.is_floating_point())
    dtype = precision.dtype or torch.get_default_dtype()
    return Check(error, tolerance, dead, tuple(vacuous), dtype, free, unseen)


# --------------------------------------------------------------------------- laws
def _same_function(
    program: Widened, pair: Pair, attempt: Attempt, weights: str, mode: str
) -> tuple[Comparison, float]:
    """All that is observed in a mode is the same, up to a tolerance, which is returned, too."""
    seen = compare(pair, mode, dead=weights == "probe")
    pair.reload()
    fact, error = seen.worst
    limit, noise = TOLERANCE, 0.0
    if error > limit:
        noise = 50 * rounding(pair, mode, seen.gradients)
        limit = max(limit, min(noise, CEILING), SINGLE if attempt.loose else 0.0)
    if seen.silent and weights == "probe":
        raise _UndecidedError(f"every output is zero or nan in {mode} mode", remedy=_ZERO)
    if not error <= limit:
        where = first_difference(program, pair, mode)
        text = f"{weights}, {mode} mode: {fact} differs by {error:.2e} (allowed {limit:.0e})"
        if math.isfinite(error) and error <= noise:
            raise _UndecidedError(text, remedy=_NOISY, **where)
        raise LossyError(text, remedy=BUG, **where)
    return seen, limit


def _student_follows(teacher: StreamingTeacher, inputs: Inputs, seed: int, limit: float) -> None:
    """The student's view follows every derived parameter, as a fresh module does. Changes the
    teacher."""
    args, kwargs = inputs
    fresh = duplicate(teacher.eval()._student)  # before it caches anything
    with torch.no_grad(), keep_rng():
        teacher.student(*args, **kwargs)  # whatever it caches, it caches now
        _perturb(teacher, seed)
        got = observe(teacher.student, inputs, seed)
        expected = observe(filled(teacher, fresh), inputs, seed)
    for fact, x in expected.items():
        if not difference(x, got.get(fact)) <= limit:
            raise _StaleError(
                f"teacher.student ignores a changed parameter: {fact} is not the collapsed one's",
                remedy="the model caches tensors outside its parameters; clear the cache in "
                "forward, or in train()",
            )


def _perturb(teacher: StreamingTeacher, seed: int) -> None:
    """Change every parameter by at most a tenth, its copies by different numbers."""
    teacher.noise = seed
    draw = torch.Generator().manual_seed(seed)
    for p in teacher.parameters():
        if p.is_floating_point() and not p.is_meta:
            noise = torch.rand(p.shape[-1:], generator=draw, dtype=torch.float64)
            p.mul_(1 + 0.1 * noise.to(p))


def check_values(program: Widened, teacher: Teacher) -> None:
    """Raise ``LossyError`` unless the parameters and buffers of the teacher are the student's at
    the teacher's indices, bit for bit: ``verify`` gathers them anew and sees no stored ones."""
    for name, tensor in program.tensors.items():
        if not identical(teacher._tensor(name), gather(tensor.detach(), program.maps[name])):
            raise LossyError(f"the teacher's {name} is not the student's", remedy=BUG)

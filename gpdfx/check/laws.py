"""The one equality check: do two networks compute the same function?

Observed are outputs of any structure, the gradient with respect to every floating input, and all
buffers after the call, in eval and in train mode, with equal seeds. A check on fresh weights is
often vacuous (a zero-initialised last norm hides what stands before it), so ``verify`` runs on a
*probe*: a copy with generic parameters, in float64; then once more on the real weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..algebra.gather import gather
from ..errors import LossyError
from ..passes.capture.limits import LEVELS
from ..passes.follow import casts_on_purpose
from ..passes.program import duplicate
from ..passes.widen import Widened
from ..teacher.collapse import filled
from ..teacher.compiled import Compiled
from ..teacher.module import Teacher
from .compare import BUG, EVERY, WrittenError, compare, copy_of, floor_of
from .free_sizes import free_levels
from .locate import first_difference
from .observe import difference, identical, keep_rng, observe
from .probe import Precision, convert, precisions, randomize, settle_statistics
from .streaming import StreamingTeacher

TOLERANCE = 1e-10
CEILING = 1e-7  # where rounding itself is amplified
PROBES = 3
SINGLE = 1e-5  # where the network computes in float32 whatever its parameters are
_MODES = (("eval", False), ("train", True))
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
    single, inputs = casts_on_purpose(program), compiled.example
    for last in range(PROBES):
        try:
            return _verify(program, teacher, inputs, seed + last, single, settled=last > 0)
        except _UndecidedError:
            if last == PROBES - 1:
                raise
    raise AssertionError


class _StaleError(LossyError):
    """The student does not see new parameters."""


class _UndecidedError(LossyError):
    """A probe that says nothing: rounding alone makes as large a difference, or all is zero."""


def _verify(
    widened: Widened,
    teacher: StreamingTeacher,
    inputs: tuple[Any, Any],
    seed: int,
    single: bool,
    *,
    settled: bool,
) -> Check:
    student = widened.student
    refused = LossyError("the student does not run")
    for precision in precisions(student, inputs):
        loose = precision.dtype is None or (single and not precision.lifted)
        try:
            with precision():
                try:
                    return _verify_in(widened, teacher, precision, seed, loose, settled=settled)
                except WrittenError:
                    return _verify_in(
                        widened, teacher, precision, seed, loose, settled=settled, borrow=False
                    )
        except LossyError as error:
            if not precision.lifted or isinstance(error, _StaleError):
                raise
            refused = error  # baked constants of a dtype do not follow a lifted cast
    raise refused


def _verify_in(
    widened: Widened,
    teacher: StreamingTeacher,
    precision: Precision,
    seed: int,
    single: bool,
    *,
    settled: bool,
    borrow: bool = True,
) -> Check:
    original, inputs, dtype = widened.student, precision.inputs, precision.dtype
    twin: StreamingTeacher = convert(teacher, dtype).requires_grad_(False)
    twin.noise = None
    error: dict[str, float] = {}
    moved: set[str] = set()
    vacuous: list[str] = []
    unseen: dict[str, str] = {}
    used, free = TOLERANCE, dict.fromkeys(twin._parts, LEVELS[-1])
    for which in ("probe", "real"):
        student = None
        twin.forget_student()  # the last student is forgotten before the next is made
        student = duplicate(original)
        probe = which == "probe"
        student = convert(randomize(student, seed) if probe else student, dtype)
        if probe and settled:
            settle_statistics(student, inputs)
        twin.load_student(student)
        with twin._folded_once():
            for mode, training in _MODES:
                errors, reached, zero, gradients = compare(
                    student, twin, inputs, training, seed, dead=probe, borrow=borrow
                )
                if borrow:
                    twin._load_buffers(student)
                else:  # the call wrote to its parameters, too
                    twin.load_student(student)
                moved |= reached
                if gradients != "all":
                    unseen[mode] = "of inputs" if gradients == "parameters" else "of anything"
                vacuous += [f"{which}/{mode}: {z}" for z in zero]
                worst = max(errors, key=lambda k: errors[k], default="")
                limit, noise = TOLERANCE, 0.0
                if worst and errors[worst] > limit:
                    noise = 50 * _sensitivity(student, inputs, training, seed, gradients)
                    limit = max(limit, min(noise, CEILING))
                    limit = max(limit, SINGLE) if single else limit
                if zero == EVERY and probe:
                    text = f"every output is zero or nan in {mode} mode"
                    raise _UndecidedError(text, remedy=_ZERO)
                if worst and not errors[worst] <= limit:
                    where = first_difference(widened, student, twin, inputs, mode, seed)
                    noisy = math.isfinite(errors[worst]) and errors[worst] <= noise
                    raise (_UndecidedError if noisy else LossyError)(
                        f"{which}, {mode} mode: {worst} differs by {errors[worst]:.2e} "
                        f"(allowed {limit:.0e})",
                        remedy=_NOISY if noisy else BUG,
                        **where,
                    )
                used = max(used, limit)
                error[f"{which}/{mode}"] = errors.get(worst, 0.0)
            if probe:
                free = free_levels(copy_of(student, borrow), twin, inputs, seed, used)
    _check_student(twin, inputs, seed, used)
    named = dict(original.named_parameters())
    dead = tuple(n for n, p in named.items() if n not in moved and p.is_floating_point())
    dtype = dtype or torch.get_default_dtype()
    return Check(error, used, dead, tuple(vacuous), dtype, free, unseen)


def _sensitivity(
    student: nn.Module, inputs: tuple[Any, Any], training: bool, seed: int, gradients: str
) -> float:
    """The largest relative change of anything observed when each weight changes its last bit."""
    results = []
    for bump in (False, True):
        twin = duplicate(student).train(training)
        with torch.no_grad():
            for p in twin.parameters() if bump else ():
                if p.is_floating_point():
                    p.mul_(1 + torch.finfo(p.dtype).eps * torch.randint(-1, 2, p.shape).to(p))
        results.append(observe(twin, *inputs, seed, gradients=gradients))
    first, second = results
    floors = {n: floor_of(n, first, inputs) for n in first}
    return max(difference(x, second.get(n), floors[n]) for n, x in first.items())


def _check_student(
    twin: StreamingTeacher, inputs: tuple[Any, Any], seed: int, limit: float
) -> None:
    """The student's view must follow every derived parameter: compare with a fresh module.
    Changes the teacher."""
    args, kwargs = inputs
    twin.eval()
    fresh = duplicate(twin._student)  # before it caches anything
    with torch.no_grad(), keep_rng():
        twin.student(*args, **kwargs)  # whatever it caches, it caches now
        _perturb(twin, seed)
        got = observe(twin.student, args, kwargs, seed)
        want = observe(filled(twin, fresh), args, kwargs, seed)
    for name, x in want.items():
        if name.startswith("output") and not difference(x, got.get(name)) <= limit:
            raise _StaleError(
                f"teacher.student ignores a changed parameter: {name} is not the collapsed one's",
                remedy="the model caches tensors outside its parameters; clear the cache in "
                "forward, or in train()",
            )


def _perturb(twin: StreamingTeacher, seed: int) -> None:
    """Change every parameter by at most a tenth, its copies by different numbers."""
    twin.noise = seed
    draw = torch.Generator().manual_seed(seed)
    for p in twin.parameters():
        if p.is_floating_point() and not p.is_meta:
            noise = torch.rand(p.shape[-1:], generator=draw, dtype=torch.float64)
            p.mul_(1 + 0.1 * noise.to(p))


def check_values(widened: Widened, teacher: Teacher) -> None:
    """Raise ``LossyError`` unless the parameters and buffers of the teacher are the student's at
    the teacher's indices, bit for bit: ``verify`` gathers them anew and sees no stored ones."""
    for name, own in widened.tensors.items():
        stored = teacher._tensor(name)
        if not identical(stored, gather(own.detach(), widened.maps[name])):
            raise LossyError(f"the teacher's {name} is not the student's", remedy=BUG)

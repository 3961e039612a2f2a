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
from torch import Tensor, nn

from . import tree
from .errors import InputError, LossyError
from .observe import GRADIENTS, HUGE, difference, floating, keep_rng, observe
from .part import Section
from .passes.capture import LEVELS
from .passes.program import duplicate
from .passes.widen import Widened, gather
from .place import call_of, calls_of, first_difference
from .probe import Way, convert, randomize, settle, ways
from .teacher import Teacher, collapse

TOLERANCE = 1e-10
CEILING = 1e-7  # where rounding itself is amplified
PROBES = 3
SINGLE = 1e-5  # where the network computes in float32 whatever its parameters are
_MODES = (("eval", False), ("train", True))
_BUG = "this is a bug in gpdfx: please report it with the network"
_NOISY = (
    "rounding alone changes this network's result as much on this example (batch norm over very "
    "few values, as a rule): pass example_inputs with a larger batch or a larger image"
)


@dataclass(frozen=True)
class Check:
    """A passed comparison. ``error``: ``{"probe/eval": 1e-15, ...}``, relative, the largest over
    everything observed; ``vacuous``: outputs that are zero on the real weights; ``dead``:
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


# --------------------------------------------------------------------------- comparing
def compare(
    student: nn.Module,
    teacher: Teacher,
    inputs: tuple[Any, Any],
    training: bool,
    seed: int,
    *,
    dead: bool = True,
) -> tuple[dict[str, float], set[str], tuple[str, ...], str]:
    """Errors of everything observed in one mode; parameters that moved an output (only with
    ``dead``: their gradients are most of the cost); zero outputs; which of ``GRADIENTS`` the
    student has."""
    teacher.train(training)
    mode = "train" if training else "eval"
    for gradients in GRADIENTS:
        run = duplicate(student).train(training)
        named = run.named_parameters()
        wrt = {n: p.requires_grad_(dead) for n, p in named if p.is_floating_point()}
        wrt = wrt if dead else {}
        try:
            mine = observe(run, *inputs, seed, wrt, teacher.parts_of(run), gradients=gradients)
            break
        except RuntimeError as error:
            if gradients == GRADIENTS[-1]:
                raise InputError(
                    f"the model itself fails in {mode} mode: {error}",
                    remedy="mend the model, or pass verify=False if it is never used in this mode",
                ) from error
    student = run
    try:
        between = teacher.parts_of(teacher._between)
        theirs = observe(teacher, *inputs, seed, parts=between, given=mine, gradients=gradients)
    except Exception as error:  # whatever torch raises when widths do not fit
        raise LossyError(
            f"the teacher fails where the student runs: {error}",
            remedy=_BUG,
        ) from error
    moved = {n for n in wrt if _moved(mine.pop(f"gradient of {n}", None))}
    moved |= set(wrt) if gradients == "none" else set()  # unknown
    wide = dict(teacher.named_buffers())
    for name, buffer in student.named_buffers():
        maps = teacher._maps[teacher._alias.get(name, name)]
        if tuple(m.student for m in maps) != buffer.shape:
            continue  # replaced in forward by one of another shape: a cache (ConViT's positions)
        mine[f"buffer {name}"] = gather(buffer, maps)
        theirs[f"buffer {name}"] = wide[name]
    for n in [n for n in mine if n.startswith("gradient") and n in theirs]:
        mine[n], theirs[n] = _where_finite(mine[n], theirs[n])
    errors = {n: difference(x, theirs.get(n), _floor(n, mine, inputs)) for n, x in mine.items()}
    extra = {name: math.inf for name in theirs if name not in mine}
    shown = {n: x for n, x in mine.items() if n.startswith("output") and x.numel()}
    zero = tuple(n for n, x in shown.items() if floating(x) and not x.any())
    zero = zero if shown else ("every output",)
    return errors | extra, moved, zero, gradients


def _where_finite(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Without the gradients that the student itself does not have: a root at zero, say, of the
    distance between boxes. The teacher must lack the same ones."""
    missing = ~mine.isfinite()
    if mine.shape != theirs.shape or not torch.equal(missing, ~theirs.isfinite()):
        return mine, theirs
    return mine.masked_fill(missing, 0), theirs.masked_fill(missing, 0)


def _floor(name: str, seen: dict[str, Tensor], inputs: tuple[Any, Any]) -> float:
    """Below what size a value is zero but for rounding: a mean is measured by the standard
    deviation, a gradient by 1e-6 of output over input (instance norm has a gradient of zero)."""
    variance = seen.get(name.removesuffix("mean") + "var") if name.endswith("_mean") else None
    if variance is not None:
        return math.sqrt(float(variance.max()))
    if name.startswith("gradient of input"):
        outputs = [x for n, x in seen.items() if n.startswith("output") and floating(x)]
        x = tree.leaves(inputs)[int(name.rsplit(" ", 1)[1])]
        size = float(x.abs().max()) if x.numel() else 0.0
        finite = (y.abs()[y.abs() < HUGE] for y in outputs)
        largest = max((float(y.max()) for y in finite if y.numel()), default=0.0)
        return 1e-6 * largest / size if size else 0.0
    return 0.0


def _moved(grad: Tensor | None) -> bool:
    return grad is not None and bool((grad != 0).any())


def verify(
    widened: Widened,
    teacher: Teacher,
    inputs: tuple[Any, Any],
    *,
    seed: int = 0,
    single: bool = False,
) -> Check:
    """Raise ``LossyError``, naming the first node that differs, unless student and teacher agree
    on a probe and on the real weights, in eval and train mode. The teacher is used up: its dtype
    and its weights are others afterwards.

    The tolerance is 1e-10 in float64. Where rounding itself is amplified it is 50 times the
    change that a change in the last bit of the weights makes, never above 1e-7. Casts to a narrow
    dtype are lifted to float64, too; for networks that do not run so and cast on purpose
    (``single``), or do not run in float64 at all, it is 1e-5. A probe on which rounding alone
    makes more of a difference (an activation that lies at zero) decides nothing: another one is
    drawn, with settled statistics, up to ``PROBES``.
    """
    for last in range(PROBES):
        try:
            return _verify(widened, teacher, inputs, seed + last, single, settled=last > 0)
        except _AmplifiedError:
            if last == PROBES - 1:
                raise
    raise AssertionError


class _StaleError(LossyError):
    """The student does not see new parameters."""


class _AmplifiedError(LossyError):
    """The difference is as large as what rounding alone makes."""


def _verify(
    widened: Widened,
    teacher: Teacher,
    inputs: tuple[Any, Any],
    seed: int,
    single: bool,
    *,
    settled: bool,
) -> Check:
    student = widened.program.student
    refused = LossyError("the student does not run")
    for way in ways(student, inputs):
        loose = way.dtype is None or (single and not way.lifted)
        try:
            with way():
                return _verify_in(widened, teacher, way, seed, loose, settled=settled)
        except LossyError as error:
            if not way.lifted or isinstance(error, _StaleError):
                raise
            refused = error  # baked constants of a dtype do not follow a lifted cast
    raise refused


def _verify_in(
    widened: Widened, teacher: Teacher, way: Way, seed: int, single: bool, *, settled: bool
) -> Check:
    original, inputs, dtype = widened.program.student, way.inputs, way.dtype
    twin = convert(teacher, dtype).requires_grad_(False)
    error: dict[str, float] = {}
    moved: set[str] = set()
    vacuous: list[str] = []
    unseen: dict[str, str] = {}
    used, free = TOLERANCE, dict.fromkeys(twin._parts, LEVELS[-1])
    for which in ("probe", "real"):
        student = duplicate(original)
        probe = which == "probe"
        student = convert(randomize(student, seed) if probe else student, dtype)
        if probe and settled:
            settle(student, inputs)
        twin.load_student(student)
        with twin.folded_once():
            for mode, training in _MODES:
                errors, reached, zero, gradients = compare(
                    student, twin, inputs, training, seed, dead=probe
                )
                twin.load_buffers(student)
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
                if (worst and not errors[worst] <= limit) or (zero and probe):
                    where = first_difference(widened, student, twin, inputs, mode, seed)
                    noisy = math.isfinite(errors[worst]) and errors[worst] <= noise
                    raise (_AmplifiedError if noisy else LossyError)(
                        f"{which}, {mode} mode: {worst} differs by {errors[worst]:.2e} "
                        f"(allowed {limit:.0e})" + (f"; {zero[0]} is zero" if zero else ""),
                        remedy=_NOISY if noisy else _BUG,
                        **where,
                    )
                used = max(used, limit)
                error[f"{which}/{mode}"] = errors.get(worst, 0.0)
            if probe:
                free = _free(duplicate(student), twin, inputs, seed, used)
    _check_student(twin, inputs, seed, used)
    named = dict(original.named_parameters())
    dead = tuple(n for n, p in named.items() if n not in moved and p.is_floating_point())
    dtype = dtype or torch.get_default_dtype()
    return Check(error, used, dead, tuple(vacuous), dtype, free, unseen)


def _free(
    student: nn.Module, twin: Teacher, inputs: tuple[Any, Any], seed: int, limit: float
) -> dict[str, str]:
    """At which level the parts of the teacher, in eval mode, follow the student to other sizes."""
    student.eval()
    twin.eval()
    found = {}
    calls = calls_of(student, list(twin._parts), inputs)
    for path, part in twin._parts.items():
        sections = [s for s in part.sections if not s.training] or part.sections
        levels = [
            _free_section(student.get_submodule(path), section, twin, call, seed, limit)
            for section, call in ((s, call_of(s, calls.get(path, []))) for s in sections)
        ]
        found[path] = max(levels, key=LEVELS.index)
    return found


def _free_section(
    module: nn.Module, section: Section, twin: Teacher, flat: Any, seed: int, limit: float
) -> str:
    def run(*args: Any, **kwargs: Any) -> Any:
        return section(twin._net, twin.fold(), section.flatten(args, kwargs))

    sizes = section.sizes
    for level in LEVELS[:-1] if flat else ():
        for moved in sizes.elsewhere(flat, level, section.call.names):
            args, kwargs = section.call.unflatten(moved)
            with torch.no_grad(), keep_rng():
                try:
                    mine = observe(module, args, kwargs, seed)
                except Exception:  # a size that the student cannot have: try another
                    continue
                try:
                    theirs = observe(run, args, kwargs, seed)
                except Exception:  # the graph is not free in this size, whatever capture said
                    break
            if all(difference(x, theirs.get(n)) <= 100 * limit for n, x in mine.items()):
                return level
            break
    return LEVELS[-1]


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
    floors = {n: _floor(n, first, inputs) for n in first}
    return max(difference(x, second.get(n), floors[n]) for n, x in first.items())


def _check_student(twin: Teacher, inputs: tuple[Any, Any], seed: int, limit: float) -> None:
    """The student's view must follow every derived parameter: compare with a fresh module.
    Changes the teacher."""
    args, kwargs = inputs
    twin.eval()
    plain = collapse(twin)
    with torch.no_grad(), keep_rng():
        twin.student(*args, **kwargs)  # whatever it caches, it caches now
        draw = torch.Generator().manual_seed(seed)
        for p in twin.parameters():
            if p.is_floating_point():
                noise = torch.rand(p.shape[-1:], generator=draw, dtype=torch.float64)
                p.mul_(1 + 0.1 * noise.to(p))
        fresh = dict(plain.named_parameters())
        for name, derived in twin.student_parameters():
            fresh[name].copy_(derived)
        got = observe(twin.student, args, kwargs, seed)
        want = observe(plain, args, kwargs, seed)
    for name, x in want.items():
        if name.startswith("output") and not difference(x, got.get(name)) <= limit:
            raise _StaleError(
                f"teacher.student ignores a changed parameter: {name} is not the collapsed one's",
                remedy="the model caches tensors outside its parameters; clear the cache in "
                "forward, or in train()",
            )

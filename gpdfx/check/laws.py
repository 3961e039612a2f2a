"""The one equality check: do two networks compute the same function, and train alike?

The laws are those of ``facts.Law``, and that they hold call after call, at other sizes
(``free_sizes``), and for what branches fold to (``folds``). Each is looked at in eval and in train
mode, on a *probe* (a copy with generic parameters, in float64: fresh weights hide much, a
zero-initialised last norm all that stands before it) and on the real weights; outputs once more in
the dtype that the user has.
"""

from __future__ import annotations

import math
import traceback
from dataclasses import replace

import torch

from ..access.collapse import filled
from ..algebra.gather import gather
from ..calls import progress, tree
from ..calls.held import cast
from ..errors import InputError, LossyError
from ..passes.capture.modes import EVAL, GIVEN, TRAIN
from ..passes.follow import asked
from ..passes.program import duplicate
from ..passes.widen import Widened
from ..teacher.compiled import Compiled
from ..teacher.module import Teacher
from .attempts import Attempt, StaleError, UndecidedError, attempts, trial_inputs
from .certificate import TOLERANCE, Check, Finding, lossy, worst
from .facts import Errors, Fact, Inputs, Law, difference, identical
from .faults.blame import blame
from .faults.locate import first_difference, guilty_part
from .folds import branch_errors, fold_errors
from .free_sizes import FAR, free_sizes
from .observe import GRADIENTS, keep_rng, observe
from .streaming import StreamingTeacher
from .visit import BUG, Pair, Visit, WrittenError, other_inputs, rounding, visit

CEILING = 1e-7  # where rounding itself is amplified
SINGLE = 1e-5  # where the network computes in float32 whatever its parameters are
NARROW = 100  # of the user's own dtype: how many of its last bits outputs may differ by
MODES = (EVAL, TRAIN, GIVEN)
"""In the order in which they are looked at."""
JUMPS = 5
"""Inputs on which outputs in the user's own dtype may differ before they do: where the network
rounds or compares, a value may fall on the other side. A fault shows on each."""
CALLS = 3
"""In a row, not in eval mode, on different inputs; one more, in eval mode, follows."""
_NOISY = (
    "rounding alone changes this network's result as much on this example (batch norm over very "
    "few values, as a rule): pass example_inputs with a larger batch or a larger image"
)
_ZERO = (
    "with random weights this network answers nothing on this example: pass example_inputs that "
    "reach its output, or verify=False"
)
_UNSTEADY = (
    "what forward keeps in a global, in its class or in a default argument belongs to no copy of "
    "the model: keep it in an attribute of the module; and let it draw from what can be seeded"
)
SEQUENCE = "sequence of calls"
_SIZES = "other sizes, one sample, across conditions"


def verify(compiled: Compiled, *, seed: int = 0) -> Check:
    """Raise ``LossyError``, naming the first node that differs, unless student and teacher agree
    under all laws.

    The tolerance is 1e-10 in float64. Where rounding itself is amplified it is 50 times the
    change that a change in the last bit of the weights makes, never above 1e-7. Casts to a narrow
    dtype are lifted to float64, too; for networks that do not run so and cast on purpose, or do not
    run in float64 at all (whose rounding may be amplified as much), it is 1e-5. A probe on which
    rounding alone makes more of a difference (an activation that lies at zero), or every output is
    zero, decides nothing: another one is drawn, with settled statistics, up to ``PROBES``.
    """
    with keep_rng():
        try:
            return _verify(compiled, seed)
        except LossyError as error:
            found = blame(compiled.program.student, compiled.example, seed)
            if found is None:
                raise
            text = f"{found}, which no graph does: {str(error).splitlines()[0]}"
            raise LossyError(text, remedy=_UNSTEADY, apart="") from error


def _verify(compiled: Compiled, seed: int) -> Check:
    program, teacher = compiled.program, StreamingTeacher(compiled)
    casts = _same_casts(program)
    narrow, left_out = _in_own_dtype(compiled, teacher, seed)
    inputs = trial_inputs(program, teacher, compiled.example)
    tries = attempts(program, inputs, seed, borrow=not compiled.python.written)
    attempt = next(tries)
    while True:
        try:
            with attempt.precision():
                check = _check(program, teacher, attempt)
            break
        except (LossyError, WrittenError) as error:
            attempt = tries.send(error)
            traceback.clear_frames(error.__traceback__)  # they hold the student that was tried
    for finding in narrow:
        if not finding.holds:
            raise lossy(finding)
    findings = (*check.findings, *narrow, casts)
    return replace(check, findings=findings, left_out=(*check.left_out, *left_out))


def _check(program: Widened, teacher: StreamingTeacher, attempt: Attempt) -> Check:
    """Look at all laws, on the probe and on the real weights."""
    precision = attempt.precision
    if precision.dtype:
        cast(teacher, precision.dtype)
    teacher.noise = None
    findings, moved = list[Finding](), set[str]()
    vacuous, unseen = list[str](), dict[str, str]()
    left_out: dict[str, None] = {}
    modes = sorted(program.flags, key=MODES.index)
    for weights in ("probe", "real"):
        teacher.forget_student()  # the last student is forgotten before the next is made
        student = attempt.student(program.student, probe=weights == "probe")
        pair = Pair(student, teacher, precision.inputs, attempt.seed, attempt.borrow)
        pair.load()
        with teacher._folded_once():
            if weights == "probe":
                progress.at(what="input sizes")
                free = free_sizes(pair, _floor(attempt))
                if attempt.cut and any(free[k][1] != m.level for k, m in program.modes.items()):
                    raise UndecidedError("it is not free in its sizes")
            for mode in modes:
                progress.at(what=f"{weights} weights in {mode} mode")
                seen, found, noisy = _same_function(program, pair, attempt, weights, mode)
                findings += found
                left_out |= dict.fromkeys(noisy)
                zero = ("every output",) if seen.silent else seen.vacuous
                vacuous += [f"{weights}/{mode}: {fact}" for fact in zero]
                moved |= seen.moved
                if missing := GRADIENTS[seen.gradients]:
                    unseen[mode] = missing
                if mode != EVAL and len(seen.turns) < CALLS:
                    told = f"{SEQUENCE}: the model takes {1 + len(seen.turns)} in a row"
                    left_out[told] = None
        if weights == "probe":
            errors = branch_errors(program) | fold_errors(teacher, attempt.seed)
            findings.append(worst("fold", errors, Law.FOLD.title, _floor(attempt)))
            if not findings[-1].holds:
                raise lossy(findings[-1])
        del student, pair
    findings.append(_student_follows(teacher, precision.inputs, attempt.seed))
    findings.append(Finding(_SIZES, ", ".join(modes), 0.0, "", FAR))
    parameters = program.student.named_parameters()
    dead = tuple(n for n, p in parameters if n not in moved and p.is_floating_point())
    dtype = precision.dtype or torch.get_default_dtype()
    sizes = {key: found for key, (found, _) in free.items()}
    return Check(tuple(findings), tuple(left_out), dead, tuple(vacuous), dtype, sizes, unseen)


# --------------------------------------------------------------------------- laws
def _floor(attempt: Attempt) -> float:
    """What rounding may make without being amplified."""
    return SINGLE if attempt.loose else TOLERANCE


def _same_function(
    program: Widened, pair: Pair, attempt: Attempt, weights: str, mode: str
) -> tuple[Visit, list[Finding], list[str]]:
    """All that is observed in a mode is the same, call after call; what rounding decides on the
    real weights is left out."""
    calls = 1 if mode == EVAL else CALLS
    seen = visit(pair, mode, differentiate=True, calls=calls)
    where = f"{weights}/{mode}"
    if seen.silent and weights == "probe":
        raise UndecidedError(f"every output is zero or nan in {mode} mode", remedy=_ZERO)
    noise: Errors = {}
    floor = _floor(attempt)
    if not seen.worst[1] <= floor:
        noise = {f: 50 * x for f, x in rounding(pair, mode, seen).items()}
    moved = {f for f, x in seen.errors.items() if f.law is Law.GENERATORS and x}
    unsteady = {f for f in moved if not math.isfinite(noise.get(f, 0.0))}
    for _ in range(JUMPS if moved - unsteady else 0):  # a fault draws whenever it is looked at
        again = visit(pair, mode, differentiate=False, calls=calls)
        unsteady |= {f for f in moved if again.errors.get(f) == 0}
    seen = seen.without(unsteady)  # another thread draws, say
    left_out = [f"{where}: {f} is another after two equal calls" for f in unsteady]
    ceiling = CEILING * floor / TOLERANCE if attempt.precision.dtype is None else CEILING
    amplified = {
        f: min(noise.get(f, 0.0), ceiling) for f, x in seen.errors.items() if not x <= floor
    }
    allowed = {f: max(floor, amplified.get(f, 0.0)) for f in seen.errors}
    over = {f: x / allowed[f] for f, x in seen.errors.items() if not x <= allowed[f]}
    noisy = [f for f in over if seen.errors[f] <= noise.get(f, 0.0) < math.inf]
    findings = []
    for law in dict.fromkeys(map(_law, seen.errors)):
        of = {f: x for f, x in seen.errors.items() if _law(f) == law and f not in noisy}
        findings.append(worst(where, of, law, allowed))
    if noisy and len(noisy) == len(over):
        text = (
            f"{where}: {noisy[0]} differs by {seen.errors[noisy[0]]:.2e}, rounding alone by as much"
        )
        if weights == "probe":
            raise UndecidedError(text, remedy=_NOISY)
        return seen, findings, [*left_out, text]
    if not over:
        return seen, findings, left_out
    fact = max(over, key=lambda f: over[f])
    place = first_difference(program, pair, mode)
    error = lossy(Finding("", where, seen.errors[fact], str(fact), allowed[fact]), **place)
    error.apart = fact.part or (
        "" if program.parts == [""] else guilty_part(pair, mode, allowed[fact])
    )
    raise error


def _law(fact: Fact) -> str:
    return SEQUENCE if fact.call else fact.law.title


def _student_follows(teacher: StreamingTeacher, inputs: Inputs, seed: int) -> Finding:
    """The student's view follows every derived parameter, as a fresh module does. Changes the
    teacher."""
    args, kwargs = tree.fresh(inputs)
    fresh = duplicate(teacher.eval()._student)  # before it caches anything
    with torch.no_grad(), teacher._folded_once():
        teacher.student(*args, **kwargs)  # whatever it caches, it caches now
        teacher.perturb(seed)
        plain = filled(teacher, fresh)
        teacher.give_python_state(plain)  # kept on purpose: no cache
        expected = observe(plain, inputs, seed)
        got = observe(teacher.student, inputs, seed)
    shown = {f: x for f, x in expected.items() if f.law is not Law.GENERATORS}
    errors = {f: difference(x, got.get(f)) for f, x in shown.items()}
    finding = worst("eval", errors, Law.STUDENT.title, SINGLE)
    if not finding.holds:
        raise StaleError(
            f"teacher.student ignores a changed parameter: {finding.fact} is not the collapsed "
            "one's",
            remedy="the model caches tensors outside its parameters; clear the cache in "
            "forward, or in train()",
        )
    return finding


# --------------------------------------------------------------------------- dtypes
def _same_casts(program: Widened) -> Finding:
    """A node of the teacher that asks for a dtype is written for one of the student's that asks for
    the same, and none of these is lost: where casts are lifted, values show neither."""
    for key, mode in program.modes.items():
        own = {n.name: asked(n) for n in mode.nodes if asked(n)}
        made: dict[str, set[torch.dtype]] = {}
        for node in filter(asked, program.graphs[key].nodes):
            made.setdefault(node.meta.get("of", node.name), set()).update(asked(node))
        for name in own.keys() | made.keys():
            if own.get(name) != made.get(name):
                text = f"{mode.site.mode} mode: the teacher asks for another dtype at {name}"
                raise LossyError(text, node=name, remedy=BUG)
    return Finding(Law.CASTS.title, "graph", 0.0, "", TOLERANCE)


def _in_own_dtype(
    compiled: Compiled, teacher: StreamingTeacher, seed: int
) -> tuple[list[Finding], list[str]]:
    """Outputs and buffers on the example, in the dtypes that the user has, or asks for on the way.
    What the student or rounding makes of them there is left out."""
    findings, left_out = list[Finding](), list[str]()
    student = duplicate(compiled.program.student, ours=True)
    floats = [x for x in tree.leaves(compiled.example) if isinstance(x, torch.Tensor)]
    kinds = {t.dtype for t in (*student.parameters(), *floats) if t.is_floating_point()}
    kinds = kinds.union(*(asked(node) for _, node in compiled.program.each()))
    exact = NARROW * max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    pair = Pair(student.requires_grad_(False), teacher, compiled.example, seed, borrow=False)
    for mode in sorted(compiled.program.flags, key=MODES.index):
        for k in range(JUMPS):
            inputs = other_inputs(compiled.example, k) if k else compiled.example
            found, told = _in_own_mode(replace(pair, inputs=inputs), mode, exact)
            if all(finding.holds for finding in found):
                break
        findings, left_out = findings + found, left_out + told
    teacher.forget_student()
    return findings, left_out


def _in_own_mode(pair: Pair, mode: str, exact: float) -> tuple[list[Finding], list[str]]:
    where = f"own/{mode}"
    try:
        pair.load()
        with pair.teacher._folded_once():
            seen = visit(pair, mode, differentiate=False)
            errors = {f: x for f, x in seen.errors.items() if f.law in (Law.OUTPUTS, Law.BUFFERS)}
            noise: Errors = {}
            if not max(errors.values(), default=0.0) <= exact:
                noise = rounding(pair, mode, seen)
    except InputError as error:
        return [], [f"{where}: {str(error).splitlines()[0]}"]
    chaotic = [f for f in errors if not math.isfinite(noise.get(f, 0.0))]
    left_out = [f"{where}: {fact} depends on rounding" for fact in chaotic[:1]]
    steady = {f: x for f, x in errors.items() if f not in chaotic}
    allowed = max(exact, 50 * max((noise.get(f, 0.0) for f in steady), default=0.0))
    laws = dict.fromkeys(f.law for f in steady)
    by_law = {law: {f: x for f, x in steady.items() if f.law is law} for law in laws}
    return [worst(where, of, law.title, allowed) for law, of in by_law.items()], left_out


def check_values(program: Widened, teacher: Teacher) -> None:
    """Raise ``LossyError`` unless the parameters and buffers of the teacher are the student's at
    the teacher's indices, bit for bit: ``verify`` gathers them anew and sees no stored ones."""
    for name, tensor in program.tensors.items():
        if not identical(teacher._tensor(name), gather(tensor.detach(), program.maps[name])):
            raise LossyError(f"the teacher's {name} is not the student's", remedy=BUG)

"""The one equality check: do two networks compute the same function?

Observed are outputs of any structure, the gradient with respect to every floating input, and all
buffers after the call, in eval and in train mode, with equal seeds. A check on fresh weights is
often vacuous (a zero-initialised last norm hides what stands before it), so ``verify`` runs on a
*probe*: a copy with generic parameters, in float64; then once more on the real weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from . import tree
from .errors import InputError, LossyError
from .part import Section
from .passes.capture import LEVELS
from .passes.infer import Inference
from .passes.parts import Calls, recording
from .passes.program import Program, Site, duplicate, module_path, source
from .passes.widen import Widened, gather
from .teacher import Teacher, _attach, collapse

TOLERANCE = 1e-10
CEILING = 1e-7  # where rounding itself is amplified
NOTICED = 1e-9  # where student and teacher part
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


GRADIENTS = ("all", "parameters", "none")
"""What a student can be differentiated by; some forbid inputs that take gradients, or overwrite in
eval mode what a gradient would need."""


# --------------------------------------------------------------------------- observing
def observe(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    seed: int,
    wrt: dict[str, Tensor] | None = None,
    parts: dict[str, nn.Module] | None = None,
    given: dict[str, Tensor] | None = None,
    gradients: str = "all",
) -> dict[str, Tensor]:
    """Run ``call`` with a seeded RNG; its outputs, those of ``parts`` on the way, and the
    gradients of a random projection of them with respect to the floating inputs and to ``wrt``.
    ``given``: what the parts of another run returned; the user's Python goes on with these."""
    leaves, spec = tree.flatten((args, kwargs))
    leaves = [
        x.detach().clone().requires_grad_(x.is_floating_point() and gradients == "all")
        if isinstance(x, Tensor)
        else x
        for x in leaves
    ]
    torch.manual_seed(seed)
    again_args, again_kwargs = tree.unflatten(leaves, spec)
    differentiable = torch.is_grad_enabled() and gradients != "none"
    with _watching(parts or {}, given) as seen, torch.set_grad_enabled(differentiable):
        outputs = tree.leaves(call(*again_args, **again_kwargs))
    seen |= {f"output {k}": y for k, y in enumerate(outputs) if isinstance(y, Tensor)}
    draw = torch.Generator().manual_seed(seed + 1)
    total = torch.zeros((), dtype=torch.float64)
    for y in seen.values():  # drawn for all: only some may depend on what takes gradients
        cotangent = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.device)
        if y.requires_grad:
            total = total + (y.real.double() * cotangent).sum().cpu()
    sources = {f"input {k}": x for k, x in enumerate(leaves) if _floating(x)}
    sources = (sources if gradients == "all" else {}) | (wrt or {})
    if total.requires_grad and sources:
        grads = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
        for name, grad in zip(sources, grads, strict=True):
            if grad is not None:
                seen[f"gradient of {name}"] = grad
    return {name: y.detach() for name, y in seen.items()}


@contextmanager
def _watching(
    parts: dict[str, nn.Module], given: dict[str, Tensor] | None
) -> Iterator[dict[str, Tensor]]:
    """Gather what modules return while they run. What follows them may hide it (a choice of
    boxes), and may make much of a difference in the last bit (their order): so a second run goes on
    with what the first was ``given``."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., Any]:
        def write(_: nn.Module, __: Any, result: Any) -> Any:
            def leaf(y: Any) -> Any:
                if not isinstance(y, Tensor):
                    return y
                name = f"output {len(seen)} ({path})"
                seen[name] = y.clone()  # a copy: it may be overwritten
                other = given.get(name) if given else None
                same = other is not None and other.shape == y.shape
                return _Forced.apply(y, other) if same else y

            return tree.map_leaves(leaf, result)

        return write

    handles = [m.register_forward_hook(hook(path)) for path, m in parts.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Forced(torch.autograd.Function):
    """The second tensor's values with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, given: Tensor) -> Tensor:
        return given.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


HUGE = 1e30
"""Larger values stand for infinity (masked logits); each is compared with itself."""


def difference(reference: Tensor, other: Tensor | None, floor: float = 0.0) -> float:
    """``max |a - b| / max(max |a|, floor)``; infinite if shapes differ or values are not finite."""
    if other is None or reference.shape != other.shape:
        return math.inf
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, other) else math.inf
    if reference.numel() == 0:
        return 0.0
    size = reference.abs()
    huge = size > HUGE
    if huge.any():
        ratio = other[huge] / reference[huge] - 1
        rest = difference(reference[~huge], other[~huge], floor)
        return max(rest, difference(torch.ones_like(ratio), 1 + ratio))
    scale = max(float(size.max()), floor)
    gap = float((reference - other).abs().max())
    if not math.isfinite(gap) or not math.isfinite(scale):
        return math.inf
    return gap / scale if scale else (0.0 if gap == 0 else math.inf)


# --------------------------------------------------------------------------- the probe
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Generic parameters and statistics, in place: no zeros, nothing equal, well scaled."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(t.shape, generator=draw, dtype=torch.float64) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if not p.is_floating_point():
                    continue
                if p.ndim < 2:
                    norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
                    low = 0.5 if (norm and name == "weight") or p.ndim == 0 else 0.05
                    new = uniform(p, low, low + 1.0 if low == 0.5 else 0.5)
                    if low == 0.05:
                        new = new * (torch.randint(0, 2, p.shape, generator=draw) * 2 - 1)
                else:
                    fan = max(p.numel() // p.shape[0], 1)
                    new = torch.randn(p.shape, generator=draw, dtype=torch.float64) / fan**0.5
                p.copy_(new.to(p.device, p.dtype))
            for name, b in module.named_buffers(recurse=False):
                if name == "running_mean":
                    b.copy_(uniform(b, -0.5, 0.5).to(b.device, b.dtype))
                elif name == "running_var":
                    b.copy_(uniform(b, 0.5, 1.5).to(b.device, b.dtype))
    return model


class _Lifted(TorchFunctionMode):
    """Casts to a narrow floating dtype go to float64: they must not hide a difference by their
    rounding, nor make one."""

    _METHODS: ClassVar = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(map(self._lift, args))
        kwargs = {k: self._lift(v) for k, v in (kwargs or {}).items()}
        return self._METHODS.get(func, func)(*args, **kwargs)

    @staticmethod
    def _lift(x: Any) -> Any:
        return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


@contextmanager
def _lifted() -> Iterator[None]:
    """Compute in float64 whatever a network asks for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


def _cast(structure: Any, dtype: torch.dtype | None) -> Any:
    return tree.map_leaves(lambda x: x.to(dtype) if dtype and _floating(x) else x, structure)


def _convert(module: Any, dtype: torch.dtype | None) -> Any:
    return module.to(dtype) if dtype else module


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
    zero = tuple(n for n, x in shown.items() if _floating(x) and not x.any())
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
        outputs = [x for n, x in seen.items() if n.startswith("output") and _floating(x)]
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


class _AmplifiedError(LossyError):
    """The difference is as large as what rounding alone makes."""


def _settle(student: nn.Module, inputs: tuple[Any, Any]) -> None:
    """Let batch norm have the statistics of this batch: with random ones a deep network multiplies
    every difference, that of rounding too."""
    norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    with torch.no_grad(), keep_rng():
        student.train()(*inputs[0], **inputs[1])
    for m, before in zip(norms, momentum, strict=True):
        m.momentum = before


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
    for dtype, precision in _precisions(student, inputs):
        lifted = precision is _lifted
        loose = dtype is None or (single and not lifted)
        try:
            with precision():
                return _verify_in(widened, teacher, inputs, seed, loose, dtype, settled=settled)
        except LossyError as error:
            if not (lifted and single):
                raise
            refused = error  # baked limits of a dtype do not follow a lifted cast
    raise refused


Precision = Callable[[], contextlib.AbstractContextManager[None]]


def _precisions(
    student: nn.Module, inputs: tuple[Any, Any]
) -> Iterator[tuple[torch.dtype | None, Precision]]:
    """The ways in which a network runs, the most exact first: all of it in float64, its parameters
    in float64, or in its own dtype."""
    double = False
    for precision in (_lifted, contextlib.nullcontext):
        if _runs(student, *inputs, torch.float64, precision):
            double = True
            yield torch.float64, precision
    if not double:
        yield None, contextlib.nullcontext


def _verify_in(
    widened: Widened,
    teacher: Teacher,
    inputs: tuple[Any, Any],
    seed: int,
    single: bool,
    dtype: torch.dtype | None,
    *,
    settled: bool,
) -> Check:
    original = widened.program.student
    inputs = _cast(inputs, dtype)
    twin = _convert(teacher, dtype).requires_grad_(False)
    error: dict[str, float] = {}
    moved: set[str] = set()
    vacuous: list[str] = []
    unseen: dict[str, str] = {}
    used, free = TOLERANCE, dict.fromkeys(twin._parts, LEVELS[-1])
    for which in ("probe", "real"):
        student = duplicate(original)
        probe = which == "probe"
        student = _convert(randomize(student, seed) if probe else student, dtype)
        if probe and settled:
            _settle(student, inputs)
        twin.load_student(student)
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
    calls = _calls(student, list(twin._parts), inputs)
    for path, part in twin._parts.items():
        sections = [s for s in part.sections if not s.training] or part.sections
        levels = [
            _free_section(student.get_submodule(path), section, twin, call, seed, limit)
            for section, call in ((s, _call_of(s, calls.get(path, []))) for s in sections)
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


def _calls(student: nn.Module, paths: list[str], inputs: tuple[Any, Any]) -> Calls:
    """How modules are called when the student runs."""
    calls: Calls = {}
    with keep_rng(), contextlib.suppress(Exception), recording(student, calls, paths):
        student(*inputs[0], **inputs[1])
    return calls


def _call_of(section: Section, calls: list[Site]) -> Any:
    """The tensors of the first call that a section takes."""
    for site in calls:
        try:
            args, kwargs = site.call.unflatten(list(site.tensors))
            return section.flatten(args, kwargs)
        except InputError:
            continue
    return None


def _runs(
    student: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype, precision: Precision
) -> bool:
    """Some networks bake float32 tensors and do not run in float64, or not without overflow."""
    finite = []
    for to in (None, dtype):
        twin = _convert(duplicate(student), to).eval()
        some_args, some_kwargs = _cast((args, kwargs), to)
        try:
            with torch.no_grad(), keep_rng(), precision() if to else contextlib.nullcontext():
                outputs = tree.leaves(twin(*some_args, **some_kwargs))
        except Exception:  # whatever the user's code raises in a dtype it was not written for
            return False
        finite.append(all(bool(y.isfinite().all()) for y in outputs if _floating(y)))
    return finite[1] or not finite[0]


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
            raise LossyError(
                f"teacher.student ignores a changed parameter: {name} is not the collapsed one's",
                remedy="the model caches tensors outside its parameters; clear the cache in "
                "forward, or in train()",
            )


@contextmanager
def keep_rng() -> Iterator[None]:
    """Leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


# --------------------------------------------------------------------------- finding the place
def first_difference(
    widened: Widened, student: nn.Module, teacher: Teacher, inputs: Any, mode: str, seed: int
) -> dict[str, Any]:
    """Node, module path and source line at which student and teacher part; empty if unknown."""
    program, inference = widened.program, widened.inference
    calls = _calls(student.train(mode == "train"), program.parts, inputs)
    for key, captured in program.modes.items():
        site = captured.site
        if site.mode != mode:
            continue
        try:
            section = Section(captured, captured.graph)
            flat = _call_of(section, calls.get(site.path, []))
            mine = _record(_root(program, student), captured.graph, flat, seed, "")
            teacher.load_student(student)
            folded = teacher.fold()
            fed = [*flat, *(folded[name] for name in widened.feeds.get(key, ()))]
            theirs = _record(teacher._net, widened.graphs[key], fed, seed, "student")
        except Exception as error:  # the message about the mismatch matters more than its place
            return {"source": f"(the first differing node is unknown: {type(error).__name__})"}
        for node in captured.graph.nodes:
            if (
                node.name in mine
                and node.name in theirs
                and _differ(widened, inference, node, mine, theirs)
            ):
                return {"node": node.name, "module_path": module_path(node), "source": source(node)}
    return {}


def _differ(
    widened: Widened,
    inference: Inference,
    node: fx.Node,
    mine: dict[str, Any],
    theirs: dict[str, Any],
) -> bool:
    x, y = mine[node.name], theirs[node.name]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    maps = tuple(widened.frozen(a) for a in inference.axes[node])
    wide = gather(x, maps)
    return wide.shape != y.shape or difference(wide, y) > NOTICED


def _root(program: Program, student: nn.Module) -> nn.Module:
    root = nn.Module()
    own = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, tensor in program.tensors.items():
        _attach(root, name, own.get(name, tensor), persistent=False)
    root._modules.update(program.children)
    return root


def _record(root: nn.Module, graph: fx.Graph, flat: Any, seed: int, key: str) -> dict[str, Any]:
    """Every value of a run, by the name of the student's node."""
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            name = n.meta.get(key) if key else n.name
            if name and isinstance(result, Tensor):
                found[name] = result.detach().clone()
            return result

    torch.manual_seed(seed)
    Recorder(root, graph=graph).run(*flat)
    return found

"""Is a mutant another function? A longer comparison than the check, which shares no code with it.

The mutant and the original teacher take over the same student, with generic parameters, in
float64; then both are called on fresh inputs, three in a row, in eval and in train mode, also with
another batch, a batch of one and other lengths. Compared are outputs, gradients of inputs, of the
student's parameters (the teacher's, summed over the copies) and of branches, the random state and
all buffers; and once everything in the network's own dtype, on its own weights.

The original is compared with the student first. A difference between mutant and original counts
from ``EXACT`` on, relative to each element or to the typical size of its tensor, and from 100
times of what rounding makes of the original and the student there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.mutation_networks import Call
from gpdfx.algebra.gather import gather
from gpdfx.calls import tree
from gpdfx.passes.program import duplicate
from gpdfx.passes.widen import Widened
from gpdfx.teacher.module import Teacher
from tests.helpers import facts, summed, teacher_of

EXACT, SINGLE = 1e-9, 1e-3
LIFTED = 6
"""So many calls are made a second time where casts of the network's own hide something."""
FAINT = 1e-2
"""Of the largest tensor of its kind: what is smaller than that is zero but for rounding (the
gradient of a bias in front of a norm)."""
Facts = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """A call to compare. ``begins``: fresh parameters are loaded first; if not, everything goes on
    as the last call left it. ``lifted``: what the network casts to float32 stays in float64."""

    seed: int
    call: Call
    training: bool
    begins: bool
    lifted: bool = False

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        """What it is computed under."""
        return Lifted() if self.lifted else contextlib.nullcontext()

    def __str__(self) -> str:
        shapes = [list(x.shape) for x in tree.leaves(self.call) if isinstance(x, Tensor)]
        return f"{'train' if self.training else 'eval'}, call {self.seed} {shapes}"


@dataclass(frozen=True)
class Expected:
    """What the original shows, how far from it one that is equal may be, and the student's
    buffers."""

    facts: Facts
    limits: dict[str, float]
    buffers: Facts


class Comparison:
    """Of mutants of one program, on ``draws`` fresh inputs. What the original shows is kept."""

    def __init__(self, program: Widened, example: Call, draws: int = 30) -> None:
        self.program, self.example = program, example
        self.original, self.student = teacher_of(program, example), duplicate(program.student)
        own = Point(0, example, True, False)
        self.known = [(own, self._expected(own, SINGLE))]
        self.rest = self._points(draws)

    def difference(self, mutant: Widened) -> str:
        """Where a mutant differs first; empty if it does not. What its branches learn depends on
        the shares and their classes, so that nothing is expected of them where these are others,
        but as right."""
        teacher, program = teacher_of(mutant, self.example), self.program
        own = mutant.shares is program.shares and mutant.constants is program.constants
        for point, expected in self._all():
            if point.begins:
                teacher = teacher_of(mutant, self.example).double()
                teacher.load_student(self._generic(point.seed))
            if found := _differs(teacher, point, expected, branches=own):
                return f"{point}: {found}"
        return ""

    def _all(self) -> Iterator[tuple[Point, Expected]]:
        """The own dtype first; others when they are needed. Where casts of the network's own hide
        what is smaller, once more with these lifted."""
        yield from self.known
        for point in self.rest:
            self.known.append((point, self._expected(point, EXACT)))
            yield self.known[-1]
            limits = self.known[-1][1].limits
            loose = any(x > EXACT for name, x in limits.items() if name.startswith("output"))
            if loose and point.seed < LIFTED:
                again = replace(point, begins=False, lifted=True)
                self.known.append((again, self._expected(again, EXACT)))
                yield self.known[-1]

    def _points(self, draws: int) -> Iterator[Point]:
        self.original.double()
        example = converted(self.example)
        others = [call for call in resized(example) if any(self._modes(call))]
        turns = (
            call for other in itertools.cycle(others or [example]) for call in (example, other)
        )
        for start, like in zip(range(0, draws, 3), turns, strict=False):
            self.student = self._generic(start)
            self.original = teacher_of(self.program, self.example).double()
            self.original.load_student(self.student)
            begins, modes = True, self._modes(like)
            calls = itertools.product(range(start, start + 3), (False, True))
            for seed, training in calls:
                if modes[training]:
                    yield Point(seed, refreshed(like, seed), training, begins)
                    begins = False

    def _generic(self, seed: int) -> nn.Module:
        """The student in float64, with generic parameters."""
        return randomize(duplicate(self.program.student).double(), seed)

    def _modes(self, call: Call) -> tuple[bool, bool]:
        """Whether the user's module runs on a call in eval and in train mode, and the original
        does not refuse it."""
        runs = []
        for training in (False, True):
            student, teacher = self._generic(0).train(training), duplicate(self.original)
            try:
                student(*call[0], **call[1])
                teacher.train(training)(*call[0], **call[1])
            except Exception:  # whatever the user's code raises, or a refusal by name
                runs.append(False)
            else:
                runs.append(True)
        return runs[0], runs[1]

    def _expected(self, point: Point, limit: float) -> Expected:
        student = self.student.train(point.training)
        mine = observe(student, point, dict(student.named_parameters()))
        theirs = shown(self.original, point)
        buffers = {name: b.detach().clone() for name, b in student.named_buffers()}
        rounding = distances(mine | wide(self.original, buffers), theirs)
        limits = {name: max(limit, 100 * gap) for name, gap in rounding.items()}
        if any(x > EXACT for name, x in limits.items() if name.startswith("output")):
            limits = dict.fromkeys(limits, max(limits.values()))  # it casts: so do its gradients
        return Expected(theirs, dict.fromkeys(theirs, limit) | limits, buffers)


def _differs(teacher: Teacher, point: Point, expected: Expected, *, branches: bool) -> str:
    """The fact that differs most of those that are too far from what is expected."""
    try:
        got = shown(teacher, point)
    except Exception as error:  # whatever torch raises when widths do not fit
        return f"fails: {type(error).__name__}: {error}".splitlines()[0]
    theirs = {n: x for n, x in expected.facts.items() if branches or "_branches." not in n}
    gaps = distances(theirs | wide(teacher, expected.buffers), got)
    over = {name: gap for name, gap in gaps.items() if gap > expected.limits[name]}
    name = max(over, key=over.__getitem__, default="")
    return name and f"{name} by {over[name]:.1e}"


# --------------------------------------------------------------------------- what a call shows
def observe(run: Callable[..., Any], point: Point, parameters: dict[str, Tensor]) -> Facts:
    """Outputs, gradients of a random projection of them, and the random state after."""
    flat, spec = tree.flatten(point.call)
    given = {f"gradient of input {k}": x.detach().clone().requires_grad_() for k, x in floats(flat)}
    fresh = [given.get(f"gradient of input {k}", x) for k, x in enumerate(flat)]
    args, kwargs = tree.unflatten([x.clone() if isinstance(x, Tensor) else x for x in fresh], spec)
    torch.manual_seed(point.seed)
    with point():
        outputs = tree.leaves(run(*args, **kwargs))
    found = {"random state": torch.get_rng_state()}
    draw = torch.Generator().manual_seed(point.seed)
    total = torch.zeros((), dtype=torch.float64)
    for k, y in enumerate(outputs):
        if isinstance(y, Tensor):
            found[f"output {k}"] = y.detach().clone()
            weight = torch.randn(y.shape, generator=draw, dtype=torch.float64)
            total = total + (y.double() * weight).sum() if y.requires_grad else total
    given |= {f"gradient of {name}": p for name, p in parameters.items() if p.requires_grad}
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(given.values()), allow_unused=True)
        for (name, x), grad in zip(given.items(), grads, strict=True):
            found[name] = torch.zeros_like(x.detach()) if grad is None else grad
    return found


def shown(teacher: Teacher, point: Point) -> Facts:
    """What a teacher shows: gradients as the student has them, buffers that the student has or
    that belong to branches; at a beginning, what its student returns."""
    teacher.train(point.training)
    known, parameters = facts(teacher), dict(teacher.named_parameters())
    found = observe(teacher, point, parameters)
    for name in parameters:
        maps, fact = known.maps.get(known.alias.get(name, name)), f"gradient of {name}"
        if maps is not None and fact in found:
            found[fact] = summed(found[fact], maps)
    for name, buffer in teacher.named_buffers():
        if known.alias.get(name, name) in known.maps or name.startswith("_branches."):
            found[f"buffer {name}"] = buffer.detach().clone()
    if point.begins:
        torch.manual_seed(point.seed)
        with torch.no_grad():
            read = tree.leaves(teacher.student(*point.call[0], **point.call[1]))
        for k, y in enumerate(read):
            if isinstance(y, Tensor):
                found[f"student's output {k}"] = y.clone()
    return found


def wide(teacher: Teacher, buffers: Facts) -> Facts:
    """The student's buffers as this teacher has to have them; one of another shape is a cache."""
    known, found = facts(teacher), {}
    for name, buffer in buffers.items():
        maps = known.maps.get(known.alias.get(name, name))
        if maps is not None and buffer.shape == tuple(axis.student for axis in maps):
            found[f"buffer {name}"] = gather(buffer, maps)
    return found


class Lifted(TorchFunctionMode):
    """Float64 in place of every narrower floating type that is asked for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def lift(x: Any) -> Any:
            return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

        func = Tensor.double if func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        return func(*map(lift, args), **{name: lift(x) for name, x in (kwargs or {}).items()})


# --------------------------------------------------------------------------- distances
def distances(reference: Facts, other: Facts) -> dict[str, float]:
    """How far apart each fact is."""
    largest: dict[str, float] = {}
    for name, x in reference.items():
        kind = name.split()[0]
        largest[kind] = max(largest.get(kind, 0.0), typical(x))
    return {
        name: distance(x, other.get(name), FAINT * largest[name.split()[0]])
        for name, x in reference.items()
    }


def distance(a: Tensor, b: Tensor | None, floor: float) -> float:
    """The largest difference of an element, relative to it or to the typical size of the tensor;
    infinite where one is finite or a number and the other is not."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    odd = ~(a.isfinite() & b.isfinite())
    if not torch.allclose(a[odd], b[odd], rtol=0, atol=0, equal_nan=True):
        return math.inf
    a, b = a[~odd], b[~odd]
    gap, size = (a - b).abs(), a.abs().clamp(min=max(typical(a), floor))
    return max((gap / size).nan_to_num(nan=0.0, posinf=math.inf).tolist(), default=0.0)


def typical(x: Tensor) -> float:
    """The median of what is neither zero nor infinite, so that no mask counts."""
    if not x.is_floating_point():
        return 0.0
    size = x.detach().abs()[x.isfinite() & (x != 0)]
    return float(size.median()) if size.numel() else 0.0


# --------------------------------------------------------------------------- calls and parameters
def floats(flat: list[Any]) -> Iterator[tuple[int, Tensor]]:
    """The floating tensors, and their places."""
    for k, x in enumerate(flat):
        if isinstance(x, Tensor) and x.is_floating_point():
            yield k, x


def converted(call: Call) -> Call:
    """In float64."""
    flat, spec = tree.flatten(call)
    for k, x in floats(flat):
        flat[k] = x.double()
    made: Call = tree.unflatten(flat, spec)
    return made


def refreshed(call: Call, seed: int) -> Call:
    """Other values of the same kind: normal ones; integers out of those that are there, and masks
    of ones as long as they like."""
    draw = torch.Generator().manual_seed(seed)

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.numel():
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, generator=draw, dtype=x.dtype)
        if x.ndim == 2 and x.max() <= 1:
            lengths = torch.randint(1, x.shape[1] + 1, (x.shape[0], 1), generator=draw)
            return (torch.arange(x.shape[1]) < lengths).to(x.dtype)
        return x.flatten()[torch.randint(x.numel(), x.shape, generator=draw)]

    made: Call = tree.map_leaves(fresh, call)
    return made


def resized(call: Call) -> Iterator[Call]:
    """A batch of one, one sample more; one of the lengths longer or shorter, wherever it stands."""
    shapes = [x.shape for x in tree.leaves(call) if isinstance(x, Tensor) and x.ndim]
    batch = shapes[0][0]
    lengths = sorted({n for shape in shapes for n in shape[1:]})
    steps = [(batch, 1), (batch, batch + 1)]
    steps += [(n, n + more) for more in (1, 2, -1, 8) for n in lengths if n + more]
    for number, (old, new) in enumerate(steps):

        def moved(x: Any, first: bool = number < 2, old: int = old, new: int = new) -> Any:
            for dim in range(x.ndim if isinstance(x, Tensor) else 0):
                of_batch = dim == 0 and x.shape[0] == batch
                if x.shape[dim] == old and of_batch == first:
                    x = x.index_select(dim, torch.arange(new) % old)
            return x

        yield tree.map_leaves(moved, call)


@torch.no_grad()
def randomize(student: nn.Module, seed: int) -> nn.Module:
    """Generic parameters and statistics, in place."""
    draw = torch.Generator().manual_seed(seed)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw, dtype=torch.float64)

    for p in student.parameters():
        if p.is_floating_point():
            fan = max(p.numel() // max(p.shape[0], 1), 1) if p.ndim > 1 else 0
            middle = float(p.double().nanmean().nan_to_num()) if p.numel() else 0.0
            p.copy_(normal(p) / fan**0.5 if fan else 0.3 * normal(p) + middle)
    for name, buffer in student.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * normal(buffer))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + normal(buffer).abs())
    return student

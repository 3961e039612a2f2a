"""The user's Python on tensors that are not its own: the student and, around captured parts, its
copy; what runs once more in the backward, on the tensors of its call (checkpoints, and functions
that call modules there, as reversible blocks do); placeholders, which have a shape and no values
yet; and moves of what the user moves."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..calls.held import HeldTensors, call_with, holds_modules, registered
from ..calls.tree import Pattern, pattern
from ..passes.capture.submodules import slow_attention
from ..passes.folded import Folded
from ..passes.program import duplicate
from ..torch_private import Checkpoints, checkpoints, functions, plain_apply
from .captured import Part
from .compiled import Python

Kind = TypeVar("Kind", bound=type)
Run = Callable[..., Any]
"""``run(tensors, folded, function, *args, **kwargs)``: call a function while the student's modules
have these tensors, and its parts these folded weights."""


class StudentCode:
    """The user's module, which every call gives its tensors: ``student``, and, where it was
    captured in parts, ``shell``, a copy of it whose parts run their graphs."""

    def __init__(self, student: nn.Module, facts: Python) -> None:
        self.student, self.late = student, facts.late
        self.shell: nn.Module | None = None
        self._caches = [
            (path, name, copy.copy(vars(student.get_submodule(path))[name]))
            for path, name in facts.caches
        ]
        self._parts: tuple[str, ...] = ()
        self._folded = ChainMap[str, Tensor]()  # what parts read while the shell runs
        self.find_held()

    @property
    def modules(self) -> list[nn.Module]:
        """Those that there are."""
        return [self.student, *([] if self.shell is None else [self.shell])]

    def parts_in(self, module: nn.Module | None) -> dict[str, nn.Module]:
        """The modules of a student that were captured one by one; none if it was in one piece."""
        return {} if module is None else {path: module.get_submodule(path) for path in self._parts}

    def begin_parts(self, parts: Mapping[str, Part], net: nn.Module) -> None:
        """A new ``shell``; what its parts compute is on the tensors of ``net``."""
        tensors = itertools.chain(self.student.parameters(), self.student.buffers())
        self.shell = duplicate(self.student, {id(t): t for t in tensors})
        slow_attention(self.shell)
        for path, part in parts.items():
            part.take_over(self.shell.get_submodule(path), net, self._folded)
        self._parts = tuple(parts)
        self.find_held()

    def find_held(self) -> None:
        """What the user's Python holds of its tensors beside the registries of modules."""
        taken = [part.forward for part in self.parts_in(self.shell).values()]
        self._held = [HeldTensors(module, taken) for module in self.modules]

    def run(
        self,
        module: nn.Module,
        tensors: dict[str, Tensor],
        args: Any,
        kwargs: dict[str, Any],
        folded: Folded | None = None,
    ) -> Any:
        """Run one of the modules on tensors; what it keeps of them is forgotten after, also a
        buffer that it registers, but what it replaces by another is written down. What it has
        under a checkpoint runs again on the same ones. ``folded``: what its parts read."""
        own = dict(tensors)
        held = [(part, dict(part._buffers)) for part in module.modules()]
        reading = self._folded.maps[:]
        self._folded.maps[:] = [folded or {}]  # type: ignore[list-item]
        within, also = partial(self._run_again, module), self._filled(module, tensors)
        try:
            with again(within, tensors, folded or {}, late=self.late), also:
                result = call_with(module, tensors, args, kwargs)
            with torch.no_grad():
                for name, given in own.items():
                    if tensors[name] is not given and tensors[name].shape == given.shape:
                        given.copy_(tensors[name])
            return result
        finally:
            self._folded.maps[:] = reading
            for part, before in held:
                for leaf in [k for k, b in part._buffers.items() if b is not before.get(k, b)]:
                    part._buffers[leaf] = before[leaf]
                for leaf in [k for k in part._buffers if k not in before]:
                    del part._buffers[leaf]
            for path, attribute, pristine in self._caches:
                kept = pristine if isinstance(pristine, Tensor) else copy.copy(pristine)
                module.get_submodule(path).__dict__[attribute] = kept
            if self._caches and any(held.places for held in self._held):  # maybe in these
                self.find_held()

    def _run_again(
        self,
        module: nn.Module,
        tensors: dict[str, Tensor],
        folded: Folded,
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``run`` for a function that belongs to the module."""
        own = {f"module.{name}": x for name, x in tensors.items()}
        with self._filled(module, tensors):
            return self.run(Within(module, function), own, args, kwargs, folded)

    def _filled(
        self, module: nn.Module, tensors: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """While it lasts, what the user's Python holds of its tensors are these."""
        if isinstance(module, Within):
            return nullcontext()
        return self._held[self.modules.index(module)].filled(tensors)

    def apply(self, fn: Callable[[Tensor], Tensor], **options: Any) -> None:
        """``nn.Module._apply`` of the modules, whose placeholders stay such."""
        for module, held in zip(self.modules, self._held, strict=True):
            module._apply(partial(apply_to, fn), **options)
            held.fill(registered(module))
        self.find_held()

    def __getstate__(self) -> dict[str, Any]:
        return {name: held for name, held in vars(self).items() if name != "_held"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.find_held()


# --------------------------------------------------------------------------- what runs again
@contextmanager
def again(
    run: Run, tensors: Mapping[str, Tensor], folded: Mapping[str, Tensor], *, late: bool
) -> Iterator[None]:
    """While a student runs: let what it runs again have the same tensors. ``late``: there are
    functions that call modules in their backward."""
    if torch.compiler.is_compiling():  # the compiler runs no Python again
        yield
        return
    with checkpoints(_Again(partial(run, tensors, folded))):
        if not late:
            yield
            return
        with functions(partial(_late, run, tensors, folded)):
            yield


class _Again(Checkpoints):
    """Checkpoints that run their function by ``run(function, ...)`` the second time."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self.run, function)


class Within(nn.Module):
    """A function that reads a module's tensors, as a module."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """One of the module's own."""
        return self.module.get_submodule(target)


# --------------------------------------------------------------------------- functions
def _late(
    run: Run,
    tensors: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    kind: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    arguments, given = pattern((args, kwargs), (Tensor,))
    if not (torch.is_grad_enabled() and holds_modules(arguments)):
        return kind.apply(*args, **kwargs)
    structure: list[Pattern] = []

    def call(*inputs: Tensor) -> list[Tensor]:
        args, kwargs = arguments.fill(inputs)
        out, results = pattern(plain_apply(kind, *args, **kwargs), (Tensor,))
        structure[:] = [out]
        return results

    def within(leaves: list[Tensor], function: Any, *args: Any) -> Any:
        rest = iter(leaves)
        own, others = ({name: next(rest) for name in names} for names in (tensors, folded))
        return run(own, others, function, *args)

    flat = (*tensors.values(), *folded.values())
    results = _Late.apply(within, call, len(flat), *flat, *given)
    return structure[0].fill(results)


class _Late(torch.autograd.Function):
    """Runs a function on leaves of its own, and so its backward: what that adds to the gradients
    of parameters goes on from there to what they were made of."""

    @staticmethod
    def forward(ctx: Any, within: Any, call: Any, count: int, *flat: Tensor) -> tuple[Tensor, ...]:
        made: dict[int, Tensor] = {}  # one that is given twice is one
        for x in flat:
            made.setdefault(id(x), x.detach().requires_grad_(x.requires_grad))
        leaves = [made[id(x)] for x in flat]
        with torch.enable_grad():
            results = within(leaves[:count], call, *leaves[count:])
        ctx.within, ctx.leaves, ctx.results, ctx.count = within, leaves, results, count
        return tuple(y.detach() for y in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = [(y, g) for y, g in zip(ctx.results, gradients, strict=True) if y.requires_grad]
        ys, grads = map(list, zip(*pairs, strict=True))
        ctx.within(ctx.leaves[: ctx.count], torch.autograd.backward, ys, grads)
        found = list[Tensor | None]()
        for x in ctx.leaves:
            found.append(x.grad)
            x.grad = None
        return (None, None, None, *found)


# --------------------------------------------------------------------------- placeholders
def missing(holder: Any, code: StudentCode | None, name: str) -> AttributeError:
    """Why what holds a student has not one of its methods, and what to do (``generate``)."""
    text = f"{type(holder).__name__!r} object has no attribute {name!r}"
    student = None if code is None else type(code.student)
    if callable(getattr(student, name, None)):
        text += (
            f": it is a method of the student's class, {student.__name__}. What to do: call "  # type: ignore[union-attr]
            f"gpdfx.collapse(...).{name}(...), which is of that class, with the student's weights; "
            "the teacher itself has forward alone (to generate, take teacher(ids).logits[:, -1] "
            "token by token; see gpdfx.plain_teacher for a wide network of its own)"
        )
    return AttributeError(text)


def placeholder(p: nn.Parameter) -> nn.Parameter:
    """A parameter without values; of one of a class of its own a copy."""
    if type(p) is not nn.Parameter:
        return copy.deepcopy(p)
    empty = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=p.requires_grad)


def apply_to(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """``fn``, which moves a module to a dtype or a device; a placeholder stays one."""
    if not t.is_meta:
        return fn(t)
    try:
        return fn(t)
    except NotImplementedError:  # to a device
        dtype = fn(torch.empty(0, dtype=t.dtype)).dtype
        return torch.empty_strided(t.size(), t.stride(), dtype=dtype, device="meta")


# --------------------------------------------------------------------------- moves
def _moves(name: str) -> Callable[..., Any]:
    """A method like ``to``: torch's, and then the student's own one, if it has one. Such a method
    moves tensors that are in no registry; what is, it finds moved already."""
    plain = getattr(nn.Module, name)

    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain(self, *args, **kwargs)
        device = next((p.device for p in self.parameters()), None)
        for module in self._code.modules:
            own = getattr(module, name)
            if getattr(own, "__func__", None) is not plain:
                holder, empty = nn.Module(), dict[str, Tensor]()
                for path, p in module.named_parameters(prefix="module"):
                    empty[path] = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
                holder.module, holder.forward = module, own
                call_with(holder, empty, args, kwargs)
        return self

    return functools.wraps(plain)(move)


def moves_its_student(kind: Kind) -> Kind:
    """A teacher whose methods that move it are these."""
    for name in ("to", "cuda", "cpu", "float", "double", "half", "bfloat16", "type"):
        setattr(kind, name, _moves(name))
    return kind

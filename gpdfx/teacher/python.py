"""The user's Python on tensors that are not its own: what runs once more in the backward, on the
tensors of its call (checkpoints, and functions that call modules there, as reversible blocks do);
placeholders, which have a shape and no values yet; and moves of what the user moves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calls.held import holds_modules
from ..calls.tree import Pattern, pattern
from ..torch_private import Checkpoints, checkpoints, functions, plain_apply

Kind = TypeVar("Kind", bound=type)
Run = Callable[..., Any]
"""``run(tensors, folded, function, *args, **kwargs)``: call a function while the student's modules
have these tensors, and its parts these folded weights."""


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
        for module in filter(None, (self._python_shell, self._student)):
            own = getattr(module, name)
            if getattr(own, "__func__", None) is not plain:
                holder, empty = nn.Module(), dict[str, Tensor]()
                for path, p in module.named_parameters(prefix="module"):
                    empty[path] = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
                holder.module, holder.forward = module, own
                functional_call(holder, empty, args, kwargs, tie_weights=True)
        return self

    return functools.wraps(plain)(move)


def moves_its_student(kind: Kind) -> Kind:
    """A teacher whose methods that move it are these."""
    for name in ("to", "cuda", "cpu", "float", "double", "half", "bfloat16", "type"):
        setattr(kind, name, _moves(name))
    return kind

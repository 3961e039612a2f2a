"""Parameters that are spread over processes, by ``fully_shard`` (FSDP2) or as DTensors.

``fully_shard`` gathers the parameters of a module in hooks around its forward, and averages their
gradients in hooks of the backward. The modules inside a teacher have no forward, and a teacher has
more calls than one: so ``run`` runs all of these hooks around a call. A parameter that none of them
gathers is gathered by itself; its gradient is the mean over processes, too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torch_private import in_sharded_forward, sharding_hooks


def run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    inside: nn.Module,
    callers: Sequence[nn.Module] = (),
    within: nn.Module | None = None,
) -> Any:
    """``function(*args, **kwargs)``, which reads the parameters inside a module, while they are
    whole. ``callers``: modules whose forward this is in place of, the outermost first; ``within``:
    the module that has the one in it, if that is known."""
    if not _spread():
        return function(*args, **kwargs)
    if within is not None:
        _AROUND[inside] = weakref.ref(within)
    elif (around := _around(inside)) is not None and not in_sharded_forward(around):
        around.reshard()  # or its own would take the gradients, and wait for a call of it
    if not _has_any(inside) and not any(m._forward_pre_hooks for m in callers):
        return function(*args, **kwargs)
    modules = [*callers, *(m for m in inside.modules() if m is not inside)]
    hooks = [(module, *sharding_hooks(module)) for module in modules]
    hooks = [(module, before, after) for module, before, after in hooks if before]
    if hooks and hooks[0][0] not in callers and not in_sharded_forward(hooks[0][0]):
        hooks = []  # they would take the first module that runs for the root of all
    for module, before, _ in hooks:
        for hook in before:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
    with whole(inside):
        result = function(*args, **kwargs)
    for module, _, after in reversed(hooks):
        for hook in after:
            given = hook(module, args, result)
            result = result if given is None else given
    return result


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """While it lasts, parameters in a module that are spread are whole; a collective."""
    made: dict[int, Tensor] = {}
    places: dict[str, Tensor] = {}
    for name, p in module.named_parameters(remove_duplicate=False) if _spread() else ():
        if is_sharded(p):
            if id(p) not in made:
                made[id(p)] = gathered(p)
            places[name] = made[id(p)]
    with holding(module, places):
        yield


@contextmanager
def holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, a module has these tensors in its registries, by all of their names."""
    places: list[tuple[dict[str, Any], str, Any, Tensor]] = []
    for path, part in module.named_modules() if tensors else ():
        for registry in (part._parameters, part._buffers):
            for leaf, x in registry.items():
                name = f"{path}.{leaf}" if path else leaf
                if name in tensors:
                    places.append((registry, leaf, x, tensors[name]))
    try:
        for registry, leaf, _, given in places:
            registry[leaf] = given
        yield
    finally:
        for registry, leaf, own, given in places:
            if registry[leaf] is given:
                registry[leaf] = own


def is_sharded(x: Any) -> bool:
    """Whether it is a DTensor."""
    if type(x) is nn.Parameter:  # the question below takes longer
        return False
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(x, kinds.DTensor)


def gathered(x: Tensor) -> Tensor:
    """All of a tensor, on every process: a collective, where it is spread. What processes find for
    its gradient is averaged."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Partial

    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    found: Tensor = x.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)  # type: ignore[attr-defined]
    return found


def is_first(x: Tensor) -> bool:
    """Whether this process is the first of those that a tensor is spread over."""
    return not is_sharded(x) or not any(x.device_mesh.get_coordinate())  # type: ignore[attr-defined]


def release(module: nn.Module) -> None:
    """Let go of what a forward gathered: it may be of another dtype, or older than the last step.
    The backward of that forward gathers it again."""
    if _spread():
        for part in filter(None, (_around(module), *module.modules())):
            if any(sharding_hooks(part)):
                part.reshard()


_REGISTRIES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of the modules in one, which takes time to walk: their parameters, and hooks."""


def _has_any(module: nn.Module) -> bool:
    """Whether there is a parameter in it that is spread, or a hook that may gather some."""
    if (found := _REGISTRIES.get(module)) is None:
        found = [(part._parameters, part._forward_pre_hooks) for part in module.modules()]
        _REGISTRIES[module] = found
    return any(hooks or any(map(is_sharded, own.values())) for own, hooks in found)


_AROUND: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""What was called inside another module -> a weak reference to that."""


def _around(module: nn.Module) -> Any:
    """The module of ``fully_shard`` that it was called in, if there is one."""
    found = _AROUND.get(module, lambda: None)()
    return found if found is not None and any(sharding_hooks(found)) else None


def _spread() -> bool:
    """Whether there can be such parameters here. A compiled call has what its module has."""
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return False
    return "torch.distributed.tensor" in sys.modules

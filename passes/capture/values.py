"""Values that Python reads of constants while a module is traced: ``torch.arange(1, 4).tolist()``.

A tensor that is traced has no values, also where it is made of plain numbers alone. Of these it is
written down how they were made; where Python reads one, it is made once more, outside the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...calls import tree
from ...torch_private import without_function_modes, without_modes

_MAKERS = frozenset(
    getattr(torch, name)
    for name in ("arange", "eye", "full", "linspace", "ones", "tensor", "zeros")
)
_READERS = frozenset(
    getattr(Tensor, name)
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
)
_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, slice, type(None))


class Constants(TorchFunctionMode):
    """While it lasts, Python reads values of what is made of plain numbers. An op that writes in
    place may write to one of them: what was made before it is forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self._made = dict[int, tuple[Tensor, Callable[[], Tensor]]]()  # by id, which they keep

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)
        if func in _READERS and id(args[0]) in self._made:
            with torch.random.fork_rng(devices=[]), without_function_modes(), without_modes():
                before = torch.get_rng_state()
                made = self._made[id(args[0])][1]()
                if torch.equal(before, torch.get_rng_state()):  # else it is drawn: no constant
                    return func(made)
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not (self._made or func in _MAKERS):
            return
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or name.startswith(("__set", "__i")):
            self._made.clear()
            return
        leaves, spec = tree.flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        known = all(id(x) in self._made if isinstance(x, Tensor) else _plain(x) for x in leaves)
        if not known or not (tensors or func in _MAKERS):
            return
        recipes = [self._made[id(x)][1] if isinstance(x, Tensor) else None for x in leaves]

        def again() -> Any:
            made = [x if of is None else of() for x, of in zip(leaves, recipes, strict=True)]
            own_args, own_kwargs = tree.unflatten(made, spec)
            return func(*own_args, **own_kwargs)

        if isinstance(result, Tensor):
            self._made[id(result)] = result, again
        elif isinstance(result, tuple | list):
            for k, x in enumerate(result):
                if isinstance(x, Tensor):
                    self._made[id(x)] = x, lambda k=k: again()[k]  # type: ignore[misc]


def _plain(x: Any) -> bool:
    return isinstance(x, _PLAIN) and not isinstance(x, torch.SymInt)

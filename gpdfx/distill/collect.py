"""What modules inside a network return: ``Features`` collects it by name while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, suggest


class Features:
    """Collects what modules return, by name, while it is open.

        with Features(model, ["layer1", "layer2"]) as seen:
            model(x)
        seen.tensors  # the two outputs

    Of a tuple or dict it takes the first tensor; of a module that is called twice, the last
    output. An inplace op that follows a module changes what was collected from it. It also sees
    calls by ``torch.func.functional_call``.

    Raises ``InputError`` for unknown names, for a module that returns no tensor, and, when
    ``tensors`` is read, for modules that were not called.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(names)
        known = dict(module.named_modules(remove_duplicate=False))
        for name in self.names:
            if name not in known:
                raise InputError(f"no module is called {name!r}", remedy=suggest(name, known))
        self._modules = {name: known[name] for name in self.names}
        self._outputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Features:
        self._outputs.clear()
        for name, module in self._modules.items():
            hook = partial(self._collect, name)
            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _collect(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None:
            raise InputError(f"module {name!r} returns no tensor", remedy="name another one")
        self._outputs[name] = tensor

    @property
    def tensors(self) -> list[Tensor]:
        """The outputs, in the order of the names."""
        missing = [name for name in self.names if name not in self._outputs]
        if missing:
            raise InputError(
                f"not called: {', '.join(map(repr, missing))}",
                remedy="run the network inside the with block, and name modules that it calls",
            )
        return [self._outputs[name] for name in self.names]


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        tensors = (_first_tensor(item) for item in output)
        return next((tensor for tensor in tensors if tensor is not None), None)
    return None


def run_with_features(
    module: nn.Module, names: Sequence[str], call: Callable[[], Any]
) -> tuple[Any, list[Tensor]]:
    """A call's result, and what some modules returned on the way."""
    if not names:
        return call(), []
    with Features(module, names) as features:
        result = call()
    return result, features.tensors

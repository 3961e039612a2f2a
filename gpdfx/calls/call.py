"""How a module is called: the structure of its arguments, and which of them are tensors."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import torch_private
from ..errors import InputError
from . import tree
from .given import of_call


class Call:
    """The structure of an example call of a module; flattens later calls of the same one.

    ``names``: what its tensors are called, ``targets[0]['boxes']``; ``shapes``: the example's.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.signature = inspect.signature(model.forward)
        normal = self._normal(args, kwargs)
        self.pattern, tensors = tree.pattern(normal)
        self._leaves = self._named(normal)
        self.names = [name for name, x in self._leaves.items() if x is tree.Slot]
        self.shapes = [tuple(x.shape) for x in tensors]

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call. Raises ``InputError`` if it differs from the example in
        structure, or in an argument that is no tensor."""
        if not kwargs and len(args) == 1 == len(self.pattern.slots) and isinstance(args[0], Tensor):
            return [args[0]]
        try:
            tensors = self.pattern.match(self._normal(args, kwargs))
        except TypeError as error:
            raise InputError(
                f"the call does not fit the model's forward: {error}",
                remedy=f"call it as the model is called: {self.signature}",
            ) from error
        if tensors is None:
            raise InputError(
                "the call differs in structure, or in an argument that is no tensor, from the "
                f"example that the model was expanded with ({', '.join(self.names)})"
                + self._difference(self._named(self._normal(args, kwargs))),
                remedy="expand the model with example_inputs and example_kwargs of this structure",
            )
        return tensors

    def _named(self, normal: Any) -> dict[str, Any]:
        """The leaves of a call by their names; ``Slot`` for tensors."""
        held = tree.pattern(normal)[0].held
        return {self._name(path): x for path, x in zip(tree.paths(normal), held, strict=True)}

    def _difference(self, given: dict[str, Any]) -> str:
        """In which arguments a call differs from the example."""
        own = self._leaves
        extra, missing, other = list[str](), list[str](), list[str]()
        for name in dict.fromkeys((*own, *given)):
            parameter = self.signature.parameters.get(name)
            default = _ABSENT if parameter is None else parameter.default
            a, b = own.get(name, _ABSENT), given.get(name, _ABSENT)
            if a is _ABSENT and (b is tree.Slot or default is _ABSENT):
                extra.append(name)
            elif b is _ABSENT and (a is tree.Slot or default is _ABSENT):
                missing.append(name)
            elif not tree.same(a, b):
                a, b = (_told(default if x is _ABSENT else x) for x in (a, b))
                other.append(f"{name}={b} is not the example's {a}")
        parts = [f"extra: {', '.join(extra)}"] if extra else []
        parts += [f"missing: {', '.join(missing)}"] if missing else []
        return "".join(f"; {part}" for part in (*parts, *other))

    def containers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The dicts and lists that a call is given, in the order of the example's."""
        return of_call(self._normal(args, kwargs))

    def unflatten(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these tensors, all else as in the example, but its own."""
        held = tuple(map(tree.own, self.pattern.held))
        args, kwargs = replace(self.pattern, held=held).fill(tensors)
        return args, kwargs

    def _normal(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that equal their defaults are left out, keywords that may be positional are."""
        bound = self.signature.bind(*args, **kwargs)
        for name, given in list(bound.arguments.items()):
            if given is self.signature.parameters[name].default:
                del bound.arguments[name]
        return bound.args, bound.kwargs

    def _name(self, path: tree.KeyPath) -> str:
        """``[0][1]['boxes']`` -> ``targets['boxes']``; ``[1]['mask']`` -> ``mask``."""
        positional, argument, rest = path[0].idx == 0, path[1], path[2:]
        if not positional:
            return f"{argument.key}{torch_private.key_text(rest)}"
        names = list[str]()
        for name, parameter in self.signature.parameters.items():
            many = parameter.kind is parameter.VAR_POSITIONAL
            names += [f"{name}[{k}]" for k in range(argument.idx + 1)] if many else [name]
        return f"{names[argument.idx]}{torch_private.key_text(rest)}"


_ABSENT = object()


def _told(x: Any) -> str:
    return "a tensor" if x is tree.Slot else repr(x)[:40]

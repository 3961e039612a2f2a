"""Values that follow from constants.

``torch.arange(1, x.ndim).tolist()`` is the same in every call; to ``torch.export`` it is a tensor
without data, of which nobody knows the numbers. So while a module is traced, what is computed of
numbers and of constant tensors alone is computed with values beside, and code that asks for a value
(``tolist``, ``int``, ``if``, a size) gets it. What follows from inputs, parameters, buffers, free
sizes or draws has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...torch_private import (
    enter_autocast,
    in_transform,
    is_fake,
    known_values,
    op_name,
    storage_key,
    tree_leaves,
    tree_map,
    version,
    without_function_modes,
    without_modes,
)
from ..program import draws, is_tensor, mutated
from ..program import value as fake

LARGEST = 2**14
"""Elements of a tensor from which on nobody is expected to ask for its values."""
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_WRITES = re.compile(
    r"(?!__)\w*[^_]_|__set(item)?__"
    r"|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__"
)
"""Names of functions that write to a tensor."""


def compute(graph: fx.Graph, tensors: dict[str, Tensor], lifted: set[str]) -> None:
    """What follows from floating tensors that export lifted alone is computed here, in the type
    that they have. The student's stay in it when its parameters are converted; a teacher's would
    not, and round otherwise. ``tensors`` gets what was computed."""
    if graph.find_nodes(op="call_function", target=enter_autocast):  # types are another matter
        return
    written = {x for node in graph.nodes for _, x in mutated(node)}
    for node in list(graph.nodes):
        given = node.all_input_nodes
        constant = all(x.op == "get_attr" and x.target in lifted for x in given)
        if not given or not constant or not _is_new(node) or not written.isdisjoint({node, *given}):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: tensors[str(x.target)])
        with torch.no_grad():
            found = node.target(*args, **kwargs)
        name = f"{given[0].target}_{node.name}"
        while name in tensors:
            name += "_"
        tensors[name] = found
        lifted.add(name)
        with graph.inserting_before(node):
            read = graph.get_attr(name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        graph.erase_node(node)


def _is_new(node: fx.Node) -> bool:
    """A small floating tensor that shares no memory with what it is computed of."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not is_tensor(node) or draws(node):
        return False
    small = fake(node).is_floating_point() and fake(node).numel() <= LARGEST
    return small and not any(x.alias_info for x in (*schema.arguments, *schema.returns))


class _UnknownError(Exception):
    """A result is not the same in every call."""


class _Ops(TorchDispatchMode):
    """Looks at the operators of a call. ``by_value``: one of them has a size, or a result, that no
    tensor without data can have."""

    by_value = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in op_name(func):
            raise _UnknownError
        self.by_value |= not _BY_VALUE.isdisjoint(func.tags)
        return func(*args, **(kwargs or {}))


def _outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, _Ops]:
    """A call that is no part of the trace, and what it looked like."""
    with without_function_modes(), without_modes(), _Ops() as ops:
        return function(*args, **kwargs), ops


class _Found(NamedTuple):
    """What a call gives on values; ``final``: that is its result, for it is no tensor, or one that
    has no size without values."""

    values: Any
    final: bool


class Constants(TorchFunctionMode):
    """While a trace lasts. ``closed``: tensors that have values and are no constants, those of
    modules beside the one that is traced."""

    def __init__(self, closed: Iterable[Tensor]) -> None:
        super().__init__()
        self._closed = set(map(storage_key, closed))
        self._known = dict[int, tuple[Tensor, Tensor]]()  # id -> without data, and with it

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling() or in_transform():
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        if _WRITES.fullmatch(getattr(func, "__name__", "")) or "out" in kwargs:
            self._closed |= {storage_key(x) for x in given if id(x) not in self._known}
        known = all(map(self._is_known, leaves))
        if known and func is Tensor.__iter__:
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        found = self._computed(func, args, kwargs) if known and given else None
        if found is not None and found.final:
            return found.values
        before = [version(x) for x in given]
        with known_values([] if known else self._scalars(given)):
            result = func(*self._by_position(func, args), **kwargs)
        if known and not given and isinstance(result, Tensor):
            found = self._computed(func, args, kwargs)
        if found is None:
            self._forget(x for x, old in zip(given, before, strict=True) if version(x) != old)
            return result
        for x, value in zip(tree_leaves(result), tree_leaves(found.values), strict=True):
            if is_fake(x) and value.numel() <= LARGEST:
                self._known[id(x)] = x, value
        return result

    def _is_known(self, x: Any) -> bool:
        if not isinstance(x, Tensor):
            return not isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)
        if id(x) in self._known:
            return True
        plain = type(x) is Tensor and x.layout == torch.strided and not x.requires_grad
        return plain and x.numel() <= LARGEST and storage_key(x) not in self._closed

    def _number(self, x: Any) -> Any:
        known = isinstance(x, Tensor) and self._is_known(x)
        return _outside(self._real(x).item)[0] if known else x

    def _scalars(self, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Those that may be integer arguments, with their values."""
        found = [self._known[id(x)] for x in given if id(x) in self._known]
        return [(x, _outside(value.clone)[0]) for x, value in found if value.numel() == 1]

    def _real(self, x: Any) -> Any:
        return self._known[id(x)][1] if id(x) in self._known else x

    def _computed(self, func: Callable[..., Any], args: Any, kwargs: Any) -> _Found | None:
        own_args, own_kwargs = tree_map(self._real, (args, kwargs))
        given = [x for x in tree_leaves((own_args, own_kwargs)) if isinstance(x, Tensor)]
        before = list(map(version, given))
        try:
            values, ops = _outside(func, *own_args, **own_kwargs)
        except Exception:  # a draw, or an error that the call itself will raise
            return None
        made = any(isinstance(x, Tensor) for x in tree_leaves(values))
        return _Found(values, ops.by_value or not (made or before != list(map(version, given))))

    def _by_position(self, func: Callable[..., Any], args: Any) -> Any:
        """An index by a mask, or a slice of tensors, makes a size that depends on values; one by
        numbers does not."""
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return args
        places = list[Any]()
        for x in args[1] if isinstance(args[1], tuple) else (args[1],):
            if isinstance(x, slice):
                places.append(slice(*map(self._number, (x.start, x.stop, x.step))))
            elif isinstance(x, Tensor) and x.dtype == torch.bool and self._is_known(x):
                places += _outside(self._real(x).nonzero, as_tuple=True)[0]
            else:
                places.append(x)
        return args[0], tuple(places), *args[2:]

    def _forget(self, written: Iterable[Tensor]) -> None:
        """Nothing is known of what shares memory with these."""
        places = set(map(storage_key, written))
        for key, (x, _) in list(self._known.items()) if places else ():
            if storage_key(x) in places:
                del self._known[key]

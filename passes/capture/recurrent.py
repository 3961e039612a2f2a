"""Recurrent layers in capture: their length stays free, and so do the lengths of packed sequences.

What torch traces for the shapes of ``aten.lstm`` and its like is a loop over time, which pins the
length; packed sequences it does not trace at all. While capture traces, each is one opaque operator
of the same arguments, whose shapes are said here; in the graph that comes of it torch's own stands
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import get_ctx, register_fake
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

_LIBRARY = torch.library.Library("gpdfx_capture", "DEF")
_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_TORCHS: dict[Any, Any] = {}
"""Ours -> the operator that it stands for."""


@lru_cache(maxsize=2 * len(_LAYERS) + 2)
def _opaque(op: Any) -> Any:
    """Ours of one of torch's. Made once it is called: torch's compiler must be imported before."""
    name = op.name().split("::")[1].replace(".", "_")
    schema = str(op._schema).replace(op.name(), name).replace("int total_length", "SymInt length")
    padding, count = op is aten._pad_packed_sequence.default, len(op._schema.arguments)
    _LIBRARY.define(schema.replace(")", ", SymInt sequences)", 1) if padding else schema)
    _LIBRARY.impl(name, lambda *given: op(*given[:count]), "CompositeExplicitAutograd")
    register_fake(f"gpdfx_capture::{name}", _SHAPES.get(op, _results), lib=_LIBRARY)
    ours = getattr(torch.ops.gpdfx_capture, name).default
    _TORCHS[ours] = op
    return ours


# --------------------------------------------------------------------------- results without values
def _results(x: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """At every time the hidden state of each direction; the states."""
    hx, *rest = given if isinstance(given[2], bool) else given[1:]  # packed: after the batch sizes
    states, bidirectional = hx if isinstance(hx, list | tuple) else [hx], rest[5]
    torch._check(x.shape[-1] == rest[0][0].shape[-1])  # what is packed no Python looked at
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    steps = _steps(x, (*x.shape[:-1], width), *rest[6:])
    return steps, *map(torch.empty_like, states)


def _steps(x: Tensor, sizes: Sequence[int], batch_first: bool = False) -> Tensor:
    """New; in memory time comes first."""
    if not batch_first:
        return x.new_empty(sizes)
    return x.new_empty((sizes[1], sizes[0], *sizes[2:])).transpose(0, 1)


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """All steps of all sequences; how many sequences have each step."""
    steps, times = get_ctx().new_dynamic_size(min=1), get_ctx().new_dynamic_size(min=1)
    torch._check(times <= x.shape[1 if batch_first else 0])
    return x.new_empty((steps, *x.shape[2:])), torch.empty(times, dtype=torch.int64)


def _padded(
    x: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int, sequences: int
) -> tuple[Tensor, Tensor]:
    """The sequences, and their lengths."""
    both = (sequences, length) if batch_first else (length, sequences)
    return _steps(x, (*both, *x.shape[1:]), batch_first), torch.empty(sequences, dtype=torch.int64)


_SHAPES: dict[Any, Callable[..., Any]] = {
    aten._pack_padded_sequence.default: _packed,
    aten._pad_packed_sequence.default: _padded,
}


class FreeLength(TorchFunctionMode):
    """While it lasts, recurrent layers and what packs sequences for them are opaque."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = dict[int, tuple[Tensor, Any]]()  # of sequences, by the ``id`` of batch sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if func is Tensor.__getitem__ and args[0].ndim == 1 and args[0].dtype == torch.int64:
            first = type(args[1]) is tuple and [*map(type, args[1])] == [int] and not args[1][0]
            return self._first(args[0]) if first else func(*args)
        torchs = func is getattr(torch, name, None)
        if kwargs or not torchs:
            return func(*args, **(kwargs or {}))
        if name in _LAYERS:
            layers = getattr(aten, name)
            return _opaque(layers.input if isinstance(args[3], bool) else layers.data)(*args)
        if name == "_pack_padded_sequence":
            data, sizes = _opaque(aten._pack_padded_sequence.default)(*args)
            self._counts[id(sizes)] = sizes, args[0].shape[0 if args[2] else 1]
            return data, sizes
        if name == "_pad_packed_sequence":
            count = self._first(args[1])
            count = count.item() if isinstance(count, Tensor) else count
            return _opaque(aten._pad_packed_sequence.default)(*args, count)
        return func(*args)

    def _first(self, sizes: Tensor) -> Any:
        """Of batch sizes the first, that is of how many sequences they are: every time the same."""
        if id(sizes) not in self._counts:
            self._counts[id(sizes)] = sizes, sizes[0]
        return self._counts[id(sizes)][1]


def put_back(graph: fx.Graph) -> None:
    """Torch's operators in the place of ours."""
    for node in graph.nodes:
        if op := _TORCHS.get(node.target):
            node.target, node.args = op, node.args[: len(op._schema.arguments)]

"""Recurrent layers in capture: their length stays free.

What torch traces for the shapes of ``aten.lstm`` and its like is a loop over time, which pins the
length. While capture traces, each is one opaque operator of the same arguments, whose shapes are
said here; in the graph that comes of it torch's own stands again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

_SCHEMA = (
    "{}(Tensor input, {} hx, Tensor[] params, bool has_biases, int num_layers, float dropout, "
    "bool train, bool bidirectional, bool batch_first) -> ({})"
)
_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
_LIBRARY = torch.library.Library("gpdfx_capture", "DEF")


@lru_cache(maxsize=len(_STATES))
def _opaque(name: str) -> Any:
    """Ours of a name. Made once it is called: torch's compiler must be imported before."""
    states = _STATES[name]
    hx, results = "Tensor[]" if states > 1 else "Tensor", ", ".join(["Tensor"] * (1 + states))
    _LIBRARY.define(_SCHEMA.format(name, hx, results))
    _LIBRARY.impl(name, getattr(torch.ops.aten, name).input, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _shapes, "Meta")
    return getattr(torch.ops.gpdfx_capture, name).default


def _shapes(x: Tensor, hx: Any, params: Any, *rest: Any) -> tuple[Tensor, ...]:
    """Results without values: at every time the hidden state of each direction; the states."""
    states, bidirectional = hx if isinstance(hx, list | tuple) else [hx], rest[4]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:-1], width)), *map(torch.empty_like, states)


class FreeLength(TorchFunctionMode):
    """While it lasts, recurrent layers of plain tensors are opaque."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        ours = name in _STATES and func is getattr(torch, name) and not kwargs
        if ours and isinstance(args[3], bool):  # not packed ones, which have batch sizes before it
            return _opaque(name)(*args)
        return func(*args, **(kwargs or {}))


def put_back(graph: fx.Graph) -> None:
    """Torch's operators in the place of ours."""
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") == "gpdfx_capture":
            node.target = getattr(torch.ops.aten, node.target.name().split("::")[1]).input

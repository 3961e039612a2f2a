"""Recurrent layers. Gates are pointwise; what contracts are the weights, which get shares:

weight_ih   (gates x hidden, inputs)        inputs: the features, then directions x hidden
weight_hh   (gates x hidden, hidden)
weight_hr   (projected, hidden)             LSTM with a projection: its state is the projected one
output      directions x hidden
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import fx

from ....algebra.axes import Axis, product
from ....kernels import copies
from ...program import shape, value
from ..op import Axes, Op
from ..signature import apply_share, rows
from ..writer import Rule, Writer, student_sizes

aten = torch.ops.aten


def _weights(op: Op, gates: int, x: Axis, state: Axis, cell: Axis, group: list[fx.Node]) -> None:
    """Unify the weights of one layer and direction; note by which axis each contracts."""
    rows = product(op.fixed(gates, "stacked"), cell)
    for weight in group:
        if len(axes := op.axes(weight)) == 1:
            op.unify(axes[0], rows)
            continue
        projects = weight is group[-1] and len(group) in (3, 5)
        source = cell if projects else x if weight is group[0] else state
        op.unify(axes[0], state if projects else rows)
        op.env[weight.name] = op.unify(axes[1], source)
        op.solver.mark(op.solver.contracted, op.env[weight.name])


def _states(op: Op) -> list[Any]:
    return list(op["hx"]) if isinstance(op["hx"], list | tuple) else [op["hx"]]


def _source(op: Op) -> str:
    """The argument with the features: of packed sequences, all steps of all of them."""
    return "data" if "data" in op.args else "input"


def _layers(op: Op, gates: int) -> list[Axes]:
    x, directions = op.axes(_source(op)), 2 if op["bidirectional"] else 1
    time = len(x) - 2 if op["batch_first"] else 0
    op.hold(op[_source(op)], time, "the op runs along it")
    groups, count = op["num_layers"] * directions, len(op["params"])
    state, cell = (op.free(shape(h)[-1]) for h in (_states(op)[0], _states(op)[-1]))
    cell = cell if count // groups in (3, 5) else state
    both = product(op.fixed(directions, "stacked"), state)
    for k in range(groups):
        group = op["params"][k * count // groups : (k + 1) * count // groups]
        _weights(op, gates, x[-1] if k < directions else both, state, cell, group)
    batch, held = [a for d, a in enumerate(x[:-1]) if d != time], 1
    if _source(op) == "data":  # what is in its batch is told by numbers
        op.hold(op["batch_sizes"], 0, "the op runs along it")
        batch, held = [op.fixed(shape(_states(op)[0])[1])], 2
    results = []
    for h, hidden in zip(_states(op), (state, cell), strict=False):
        axes = (op.fixed(groups, "stacked"), *batch, hidden)
        for d, (a, b) in enumerate(zip(op.axes(h), axes, strict=True)):
            op.hold(h, d, "layers") if d < held else op.unify(a, b)
        results.append(axes)
    out = [*x[:-1], both]
    out[time] = x[time] if op.solver.is_fixed(x[time]) else op.fixed(x[time].size)
    return [tuple(out), *results]


def _cell(op: Op, gates: int) -> Any:
    x, states = op.axes("input"), _states(op)
    hidden = op.free(shape(states[0])[-1])
    group = [op[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh") if op[n] is not None]
    _weights(op, gates, x[-1], hidden, hidden, group)
    for h in states:
        for a, b in zip(op.axes(h), (*x[:-1], hidden), strict=True):
            op.unify(a, b)
    result = (*x[:-1], hidden)
    return [result] * len(states) if len(states) > 1 else result


def _shared(w: Writer, weight: fx.Node) -> Any:
    """A weight, with shares where it contracts a widened axis."""
    axis = w.op.env.get(weight.name)
    if axis is None or not w.wide(axis):
        return w.map(weight)
    places = [(("rows",), 0), ((weight.name,), 0)]
    return apply_share(w, w.map(weight), weight, places, weight.name, {"rows"})


def _widen_layers(w: Writer) -> Any:
    op = w.op
    params = [_shared(w, p) for p in op["params"]]
    outputs = w.target.axes[op.node]
    drops = op["dropout"] and op["train"] and op["num_layers"] > 1 and not w.target.independent
    if drops and any(map(w.wide, outputs[0])):
        return _widen_dropping(w, params)
    return w.copy(params=params)


def _widen_dropping(w: Writer, params: list[Any]) -> list[fx.Node]:
    """Layer by layer, time first; the masks between them are drawn at the student's shape."""
    op, layers = w.op, w.op["num_layers"]
    directions = 2 if op["bidirectional"] else 1
    several = isinstance(op["hx"], list | tuple)
    axes, sizes = w.target.axes[op.node][0], list(value(op.node)[0].shape)
    x, ends = w[_source(op)], []
    if op["batch_first"]:
        axes, sizes = (axes[1], axes[0], axes[2]), [sizes[1], sizes[0], sizes[2]]
        x = w.call(aten.transpose.int, x, 0, 1)
    for k in range(layers):
        own = params[k * len(params) // layers : (k + 1) * len(params) // layers]
        bounds = 0, k * directions, (k + 1) * directions
        states = [w.call(aten.slice.Tensor, w.map(h), *bounds) for h in _states(op)]
        given = {_source(op): x, "hx": states if several else states[0], "params": own}
        done = w.copy(**given, num_layers=1, dropout=0.0, batch_first=False)
        x, *last = (w.call(operator.getitem, done, n) for n in range(1 + len(states)))
        ends.append(last)
        if k + 1 < layers:
            shape_ = student_sizes(w, x, axes, sizes)
            mask = w.call(copies.dropout_mask, x, shape_, "dropout", op["dropout"], None)
            x = w.call(aten.mul.Tensor, x, w.spread(mask, axes))
    x = w.call(aten.transpose.int, x, 0, 1) if op["batch_first"] else x
    return [x, *(w.call(aten.cat.default, list(parts)) for parts in zip(*ends, strict=True))]


def _widen_cell(w: Writer) -> fx.Node:
    return w.copy(**{name: _shared(w, w.op[name]) for name in ("w_ih", "w_hh")})


TABLE: dict[Any, Rule] = rows(
    {
        "_pack_padded_sequence": "a! b! ..., n! -> steps ..., times",
        "_pad_packed_sequence": "steps! ..., times! -> a b ..., n",
    }
)
for _gates, _name in ((4, "lstm"), (3, "gru"), (1, "rnn_tanh"), (1, "rnn_relu")):
    TABLE |= rows(
        {
            f"{_name}.input {_name}.data": Rule(partial(_layers, gates=_gates), _widen_layers),
            f"{_name}_cell": Rule(partial(_cell, gates=_gates), _widen_cell),
        }
    )

"""Decompose: an op that has no rule, and that torch composes of others, makes way for those.

Export keeps such ops whole (``tensordot``, ``cosine_similarity``, ``triplet_margin_loss``). Their
kernel is traced over the values of the graph, so that what stands there afterwards is what would
have been called.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ...calls.held import has_gradient
from ...torch_private import (
    composed,
    enter_autocast,
    exit_autocast,
    is_composite,
    tree_flatten,
    tree_unflatten,
)
from ..program import Program, bind, is_tensor, value
from . import bridged, rule_of

aten = torch.ops.aten


def decompose(program: Program) -> Program:
    """The same program, of ops that have a rule, or that nothing else is known of."""
    program = program.copied()
    for mode in program.modes.values():
        regions = 0  # under autocast
        for node in mode.nodes:
            regions += (node.target is enter_autocast) - (node.target is exit_autocast)
            _decompose(program, node, regions > 0)
    return program


def _decompose(program: Program, node: fx.Node, autocast: bool) -> None:
    """Replace a node, and what it is composed of in turn; or leave it, if it cannot be traced."""
    if rule_of(node.target) is not None or bridged.reason(node.target):
        return
    if not is_composite(node.target, autocast):
        return
    flat, spec = tree_flatten((node.args, node.kwargs))
    given = list(dict.fromkeys(x for x in flat if isinstance(x, fx.Node)))
    values = [_value(program, x) for x in given]

    def arguments(values: list[Any]) -> Any:
        known = dict(zip(given, values, strict=True))
        return tree_unflatten([known[x] if isinstance(x, fx.Node) else x for x in flat], spec)

    try:
        traced = composed(node.target, arguments, values)
    except Exception:  # it reads values, say: bridged
        return
    results = traced.output_node().args[0]
    several = isinstance(results, list | tuple)
    if traced.find_nodes(op="get_attr") or (several and not all(map(_is_getitem, node.users))):
        return
    if traced.find_nodes(op="call_function", target=node.target):  # of itself
        return
    for call in list(traced.nodes):
        _leave_type(call)
    new = dict(zip(traced.find_nodes(op="placeholder"), given, strict=True))
    before = node.prev
    with node.graph.inserting_before(node):
        made: Any = node.graph.graph_copy(traced, new)
    parts = [x for x in _between(before, node) if x.op == "call_function"]
    for part in parts:
        kept = {key: node.meta[key] for key in _PROVENANCE if key in node.meta}
        part.meta = {"val": part.meta["val"]} | kept if "val" in part.meta else kept
    for user in list(node.users) if several else ():
        user.replace_all_uses_with(made[user.args[1]])
        node.graph.erase_node(user)
    if not several:
        node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    for part in parts:
        _decompose(program, part, autocast)


def _leave_type(call: fx.Node) -> None:
    """A call that names the type that its input has would bake it: that goes without saying."""
    args = bind(call) if hasattr(call.target, "_schema") else {}
    given = call.args[0] if call.args else None
    if "dtype" not in args or not is_tensor(given) or args["dtype"] != value(given).dtype:
        return
    if call.target is aten.to.dtype and not args["copy"]:
        call.replace_all_uses_with(given)  # type: ignore[arg-type]
        call.graph.erase_node(call)
        return
    arguments = call.target._schema.arguments  # type: ignore[union-attr]
    said = next(a for a in arguments if a.name == "dtype")
    if said.has_default_value() and said.default_value is None and has_gradient(value(given)):
        args["dtype"] = None
        call.args = tuple(args[a.name] for a in arguments if not a.kwarg_only)
        call.kwargs = {k: args[k] for k in call.kwargs if k in args and k != "dtype"}


_PROVENANCE = ("nn_module_stack", "stack_trace")


def _between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes after one and before another."""
    found = []
    while (start := start.next) is not end:
        found.append(start)
    return found


def _is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _value(program: Program, node: fx.Node) -> Any:
    """What stands for a node while its op is traced: of a parameter its fake twin."""
    return program.tensors[str(node.target)] if node.op == "get_attr" else value(node)

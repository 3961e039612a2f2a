"""Inline ``torch.no_grad`` and autocast regions.

Export keeps them as higher-order ops that hold a child graph, which no later pass would look into.
Here the child's nodes come into the graph, between a node that enters the region and one that
leaves it; order in the graph is order in time, and neither is ever erased.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ...kernels.regions import enter_grad, exit_grad
from ...torch_private import enter_autocast, exit_autocast
from ..program import Program

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


_FORMS = {_GRAD: (1, enter_grad, exit_grad), _AUTOCAST: (4, enter_autocast, exit_autocast)}
"""Region -> how many arguments say its state, and what enters and leaves it."""


def inline(program: Program) -> Program:
    """Bring the child graphs of all regions into their parents, innermost last."""
    program, children = program.copied(), dict(program.children)
    for mode in program.modes.values():
        while regions := [n for n in mode.nodes if n.target in _FORMS]:
            for node in regions:
                _inline(mode.graph, node, children)
    used = {n.target for _, n in program.each() if n.op == "get_attr"}
    kept = {name: child for name, child in children.items() if name in used}
    return replace(program, children=kept)


def _inline(graph: fx.Graph, node: fx.Node, children: dict[str, nn.Module]) -> None:
    count, enter, leave = _FORMS[node.target]  # type: ignore[index]
    state, holder, operands = node.args[:count], node.args[count], node.args[count + 1 :]
    assert isinstance(holder, fx.Node)
    child = children[str(holder.target)]
    body = child.graph
    assert isinstance(body, fx.Graph)
    new = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        token = graph.call_function(enter, state)
        outputs: Any = graph.graph_copy(body, new)
        graph.call_function(leave, (token,))
    for inner in body.find_nodes(op="get_attr"):
        made = operator.attrgetter(inner.target)(child)
        if isinstance(made, nn.Module):  # a child of the child
            name = f"{holder.target}_{inner.target}".replace(".", "_")
            new[inner].target, children[name] = name, made
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not holder.users:
        graph.erase_node(holder)

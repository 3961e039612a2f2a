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
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ...kernels.regions import enter_grad, exit_grad
from ..program import Program

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


_FORMS = {_GRAD: (1, enter_grad, exit_grad), _AUTOCAST: (4, _enter_autocast, _exit_autocast)}


def inline(program: Program) -> Program:
    """Bring the child graphs of all regions into their parents, innermost last."""
    children = dict(program.children)
    for name, mode in program.modes.items():
        while regions := [n for n in mode.nodes if n.target in _FORMS]:
            for node in regions:
                _inline(name, mode.graph, node, children)
    used = {n.target for _, n in program.each() if n.op == "get_attr"}
    kept = {name: child for name, child in children.items() if name in used}
    return replace(program, children=kept)


def _inline(mode: str, graph: fx.Graph, node: fx.Node, children: dict[str, nn.Module]) -> None:
    count, enter, leave = _FORMS[node.target]  # type: ignore[index]
    state, holder, operands = node.args[:count], node.args[count], node.args[count + 1 :]
    assert isinstance(holder, fx.Node)
    child = children[str(holder.target)]
    body = child.graph
    assert isinstance(body, fx.Graph)
    for inner in body.find_nodes(op="get_attr"):
        made = operator.attrgetter(inner.target)(child)
        if isinstance(made, nn.Module) and f"_{mode}_" not in inner.target:
            inner.target = f"{holder.target}_{inner.target}".replace(".", "_")
            children[inner.target] = made
    with graph.inserting_before(node):
        token = graph.call_function(enter, state)
        inputs = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
        outputs: Any = graph.graph_copy(body, inputs)
        graph.call_function(leave, (token,))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not holder.users:
        graph.erase_node(holder)

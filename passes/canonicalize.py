"""Canonicalize: fewer spellings, and no in-place op where a functional one means the same.

An in-place op is replaced if nobody else sees the memory that it writes: no alias of its target
(connected by view ops) is used later. What remains writes to buffers, or through views.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .program import Program, bind, has_effect, is_tensor, mutated, value

aten = torch.ops.aten

_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_DROPOUTS = {
    overload.default
    for kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for overload in (getattr(aten, kind), getattr(aten, f"{kind}_"))
}


def canonicalize(program: Program) -> Program:
    for mode in program.modes.values():
        _one_node_per_tensor(mode.graph)
        for node in mode.nodes:
            _drop_identity(node)
        _functionalize(mode.graph)
        for node in mode.nodes:
            _spell_copy(node)
        _protect_buffers(mode.graph)
        mode.graph.eliminate_dead_code(is_impure_node=has_effect)
    return program


def _one_node_per_tensor(graph: fx.Graph) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            if node.target in seen:
                node.replace_all_uses_with(seen[node.target])
                graph.erase_node(node)
            else:
                seen[node.target] = node


def _drop_identity(node: fx.Node) -> None:
    """Erase export's assertions, and dropout that drops nothing."""
    if node.target in _CHECKS:
        node.graph.erase_node(node)
    elif node.target in _DROPOUTS:
        source, p, train = node.args[:3] if len(node.args) > 2 else (None, None, True)
        if isinstance(source, fx.Node) and (p == 0 or not train):
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)


def _spell_copy(node: fx.Node) -> None:
    """What functionalization leaves of a copy has no derivative: spell it as an expansion."""
    if node.target is aten.copy.default:
        target, source = node.args[:2]
        node.target, node.args = aten.expand_as.default, (source, target)
        if value(source).dtype != value(target).dtype:
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(aten.type_as.default, (source, target))
            cast.meta = {**node.meta, "val": value(source).to(value(target).dtype)}
            node.args = (cast, target)


def _functionalize(graph: fx.Graph) -> None:
    order = {node: k for k, node in enumerate(graph.nodes)}
    family: dict[fx.Node, set[fx.Node]] = {}  # nodes that may share memory, views of views too
    for node in list(graph.nodes):
        for target in [arg for name, arg in mutated(node) if name == "self"]:
            private = all(
                member.op == "call_function"
                and (member is target or all(order[user] <= order[node] for user in member.users))
                for member in family[target]
            )
            functional = _functional(node.target)
            if functional and private and not _casts(node, target):
                node.target = functional
                later = {user for user in target.users if order[user] > order[node]}
                target.replace_all_uses_with(node, later.__contains__)
        family[node] = {node}
        for source in _aliased(node):
            family[node] |= family[source]
        for member in family[node]:
            family[member] = family[node]


def _protect_buffers(graph: fx.Graph) -> None:
    """What reads a buffer before it is overwritten reads a clone: autograd may have kept it."""
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        buffer = node.args[0] if node.target is aten.copy_.default else None
        if not isinstance(buffer, fx.Node) or buffer.op != "get_attr":
            continue
        readers = [
            user
            for user in buffer.users
            if order[user] < order[node]
            and buffer not in _aliased(user)
            and all(target is not buffer for _, target in mutated(user))
        ]
        if readers:
            with graph.inserting_before(min(readers, key=order.__getitem__)):
                clone = graph.call_function(aten.clone.default, (buffer,))
            clone.meta = {**readers[0].meta, "val": value(buffer)}
            for user in readers:
                user.replace_input_with(buffer, clone)


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory a node's result may share."""
    schema = getattr(node.target, "_schema", None)
    if node.target is operator.getitem:
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    if schema is None:
        return node.all_input_nodes if node.op == "call_function" and value(node) is None else []
    args = bind(node)
    sources = [args[a.name] for a in schema.arguments if a.alias_info is not None]
    return _tensors(sources)


def _tensors(arguments: Iterable[Any]) -> list[fx.Node]:
    """Those among the arguments of a call, or in lists among them."""
    flat = (x for arg in arguments for x in (arg if isinstance(arg, list | tuple) else [arg]))
    return [x for x in flat if is_tensor(x)]


def _functional(target: Any) -> Any:
    """``aten.relu_.default`` -> ``aten.relu.default``, or None. Overloads need not have one name:
    ``pow_.Scalar`` is ``pow.Tensor_Scalar``."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    overloads, wanted = (getattr(packet, o) for o in packet.overloads()), _takes(target)
    return next((op for op in overloads if _takes(op) == wanted), None)


def _takes(op: Any) -> list[str]:
    return [str(a.type) for a in op._schema.arguments]


_PLACES = {"index", "indices", "mask"}  # arguments that say where, not what


def _casts(node: fx.Node, target: fx.Node) -> bool:
    """True if the in-place op keeps a type or shape that the functional one would promote."""
    args, mine = bind(node), value(target)
    given = _tensors(args[name] for name in args.keys() - _PLACES)
    others = [value(x) for x in given if x is not target]
    return any(o.dtype != mine.dtype or o.ndim > mine.ndim for o in others)

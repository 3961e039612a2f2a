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

from .program import Program, bind, has_effect, is_mutable, is_tensor, mutated, value

aten = torch.ops.aten

_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_KINDS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_DROPOUTS = {getattr(aten, f"{kind}{end}").default for kind in _KINDS for end in ("", "_")}


def canonicalize(program: Program) -> Program:
    """The same program in fewer spellings, with a value on every node that has one."""
    program = program.copied()
    for mode in program.modes.values():
        _one_node_per_tensor(mode.graph)
        for node in mode.nodes:
            _drop_identity(node)
        _functionalize(mode.graph)
        for node in mode.nodes:
            _spell_copy(node)
        _protect_buffers(mode.graph)
        mode.graph.eliminate_dead_code(is_impure_node=has_effect)
        for node in mode.nodes:
            if node.op == "get_attr" and node.target in program.tensors:
                node.meta["val"] = program.tensors[str(node.target)]
            elif is_mutable(node) and node.args:  # the final copies of a functional capture
                node.meta.setdefault("val", value(node.args[0]))
    return program


def _one_node_per_tensor(graph: fx.Graph) -> None:
    first: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
            graph.erase_node(node)


def _drop_identity(node: fx.Node) -> None:
    """Erase export's assertions, and dropout that drops nothing."""
    if node.target in _DROPOUTS and len(node.args) > 2:
        source, p, train = node.args[:3]
        if isinstance(source, fx.Node) and (p == 0 or not train):
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
    elif node.target in _CHECKS:
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
    family: dict[fx.Node, set[fx.Node]] = {}  # nodes that may share memory, views of views too
    for node in graph.nodes:
        for target in [arg for name, arg in mutated(node) if name == "self"]:
            others = {user for member in family[target] - {target} for user in member.users}
            private = all(member.op == "call_function" for member in family[target])
            other = functional(node.target)
            unseen = private and max(others, default=node) <= node
            if other and unseen and not _casts(node, target):
                node.target = other
                target.replace_all_uses_with(node, node.__lt__)
        family[node] = {node}.union(*(family[source] for source in _aliased(node)))
        for member in family[node]:
            family[member] = family[node]


def _protect_buffers(graph: fx.Graph) -> None:
    """What reads a buffer before it is overwritten reads a clone: autograd may have kept it."""
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        buffer = node.args[0]
        if not isinstance(buffer, fx.Node) or buffer.op != "get_attr":
            continue
        earlier = [user for user in buffer.users if user < node and buffer not in _aliased(user)]
        readers = [user for user in earlier if buffer not in dict(mutated(user)).values()]
        if readers:
            with graph.inserting_before(min(readers)):
                clone = graph.call_function(aten.clone.default, (buffer,))
            clone.meta = {**readers[0].meta, "val": value(buffer)}
            for user in readers:
                user.replace_input_with(buffer, clone)


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory a node's result may share."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        args = bind(node)
        return _tensors(args[a.name] for a in schema.arguments if a.alias_info is not None)
    if node.target is operator.getitem:
        return [x for x in node.args[:1] if isinstance(x, fx.Node)]
    return node.all_input_nodes if node.op == "call_function" and value(node) is None else []


def _tensors(arguments: Iterable[Any]) -> list[fx.Node]:
    """Those among the arguments of a call, or in lists among them."""
    flat = (x for arg in arguments for x in (arg if isinstance(arg, list | tuple) else [arg]))
    return [x for x in flat if is_tensor(x)]


def functional(target: Any) -> Any:
    """``aten.relu_.default`` -> ``aten.relu.default``, or None. Overloads need not have one name:
    ``pow_.Scalar`` is ``pow.Tensor_Scalar``."""
    name = target.overloadpacket.__name__
    packet = getattr(getattr(torch.ops, target.namespace), name.rstrip("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return next((op for op in overloads if _takes(op) == _takes(target)), None)


def _takes(op: Any) -> list[str]:
    return [str(a.type) for a in op._schema.arguments]


_PLACES = {"index", "indices", "mask"}  # arguments that say where, not what


def _casts(node: fx.Node, target: fx.Node) -> bool:
    """True if the in-place op keeps a type or shape that the functional one would promote."""
    args, mine = bind(node), value(target)
    given = map(value, _tensors(args[name] for name in args.keys() - _PLACES))
    return any(x.dtype != mine.dtype or x.ndim > mine.ndim for x in given)

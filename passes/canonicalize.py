"""Canonicalize: fewer spellings, and no in-place op where a functional one means the same.

An in-place op is replaced if nobody else sees the memory that it writes: no alias of its target
(connected by view ops) is used later. What remains writes to buffers, or through views.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from .effects import has_effect
from .program import Program, bind, check, is_tensor, mutated, value

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
    return check(program)


def follow(program: Program, double: Program) -> Program:
    """Let device and dtype constants that capture baked follow the parameters.

    ``double`` is the same network captured in float64: a dtype that differs there follows the
    parameters' dtype, one that does not (a deliberate ``.float()``) stays. A conversion that only
    ``double`` has did nothing in this dtype (capture drops those): it is put in.
    """
    for name, mode in program.modes.items():
        same = _align(program, mode.nodes, double.modes[name].nodes)
        casts = {node for node in same.values() if node.target in _CASTS}
        for twin, node in same.items():
            if node.op == "call_function" and node.target == twin.target:
                _follow_node(program, node, twin, same, casts)
    return check(program)


_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default}
Same = dict[fx.Node, fx.Node]
"""The float64 twin's node -> the program's."""


def _align(program: Program, nodes: list[fx.Node], twins: list[fx.Node]) -> Same:
    """Which nodes are the same in both, but for conversions; empty if the graphs differ more."""
    named = {n.target: n for n in nodes if n.op != "call_function"}
    same: Same = {n: named[n.target] for n in twins if n.target in named}
    own = [n for n in nodes if n.op == "call_function"]
    missing = []
    for twin in (n for n in twins if n.op == "call_function"):
        while own and own[0].target in _CASTS and twin.target not in _CASTS:
            own.pop(0)
        if own and own[0].target == twin.target:
            same[twin] = own.pop(0)
        elif own and twin.target in _CASTS and twin.args[0] in same:
            missing.append((twin, own[0]))
            same[twin] = same[twin.args[0]]  # type: ignore[index]
        else:
            return {}
    for twin, place in missing:
        source = same[twin.args[0]]  # type: ignore[index]
        dtype = _attribute(program, place, "dtype")
        with place.graph.inserting_before(place):
            cast = place.graph.call_function(aten.to.dtype, (source, dtype))
        cast.meta = {**twin.meta, "val": value(source)}
        for user in twin.users:
            if user in same and same[user] is not source:
                same[user].replace_input_with(source, cast)
        same[twin] = cast
    return {} if own else same


def bakes_constants(program: Program) -> bool:
    """True if some call names a floating dtype or one of its limits, or makes floating numbers
    of none (and by that may name the default dtype)."""
    return any(node.op == "call_function" and _bakes(node) for _, node in program.each())


def _bakes(node: fx.Node) -> bool:
    constants = [*node.args, *node.kwargs.values()]
    if _names_dtype(node) or any(isinstance(x, float) and _limit(x) for x in constants):
        return True
    made = value(node)
    return isinstance(made, torch.Tensor) and made.is_floating_point() and not _reads_floats(node)


def casts_on_purpose(program: Program) -> bool:
    """True if some floating value is brought into a floating dtype that does not ``follow`` the
    parameters': such a network rounds to that dtype whatever its parameters are."""
    nodes = [node for _, node in program.each() if node.op == "call_function"]
    return any(_names_dtype(node) and _reads_floats(node) for node in nodes)


def _names_dtype(node: fx.Node) -> bool:
    constants = [*node.args, *node.kwargs.values()]
    return any(isinstance(x, torch.dtype) and x.is_floating_point for x in constants)


def _reads_floats(node: fx.Node) -> bool:
    return any(value(n).is_floating_point() for n in node.all_input_nodes if is_tensor(n))


def _follow_node(
    program: Program, node: fx.Node, twin: fx.Node, same: Same, casts: set[fx.Node]
) -> None:
    def replaced(mine: Any, other: Any) -> Any:
        if isinstance(mine, list | tuple) and isinstance(other, list | tuple):
            return [replaced(a, b) for a, b in zip(mine, other, strict=False)]
        if isinstance(mine, torch.dtype) and mine != other:
            return _attribute(program, node, "dtype")
        if isinstance(mine, float) and mine != other and (limit := _limit(mine)):
            first = node.args[0]  # under autocast its type may not be the parameters'
            follows = (
                isinstance(first, fx.Node)
                and getattr(value(twin.args[0]), "dtype", None) is torch.float64
            )
            dtype = None if follows else _attribute(program, node, "dtype")
            with node.graph.inserting_before(node):
                dtype = dtype or node.graph.call_function(getattr, (first, "dtype"))
                return node.graph.call_function(dtype_limit, (dtype, limit))
        if isinstance(mine, fx.Node) and mine in casts:
            return same.get(other, mine)  # a cast that did nothing was taken for what it casts
        return mine

    args = tuple(map(replaced, node.args, twin.args))
    kwargs = {k: replaced(v, twin.kwargs.get(k)) for k, v in node.kwargs.items()}
    node.args, node.kwargs = args, kwargs


_LIMITS: dict[str, Callable[[torch.finfo], float]] = {
    "min": lambda info: info.min,
    "max": lambda info: info.max,
    "tiny": lambda info: info.tiny,
    "eps": lambda info: info.eps,
    "1 - eps": lambda info: 1 - info.eps,  # the upper end of uniform noise
}


def dtype_limit(dtype: torch.dtype, name: str) -> float:
    """``torch.finfo(dtype).min`` and so on, for the dtype that the parameters have by then."""
    return float(_LIMITS[name](torch.finfo(dtype)))


def _limit(number: float) -> str | None:
    """Which limit of its dtype a baked number is (masks are filled with the smallest one)."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    each = ((name, dtype_limit(dtype, name)) for dtype in dtypes for name in _LIMITS)
    return next((name for name, limit in each if limit == number), None)


def follow_device(program: Program) -> Program:
    """Let device constants that equal the parameters' device follow it."""
    for _, node in program.each():
        if isinstance(device := node.kwargs.get("device"), torch.device):
            new = _attribute(program, node, "device", device)
            node.kwargs = {**node.kwargs, "device": new}
        if node.op == "call_function" and any(isinstance(a, torch.device) for a in node.args):
            node.args = tuple(
                _attribute(program, node, "device", a) if isinstance(a, torch.device) else a
                for a in node.args
            )
    return program


def _attribute(program: Program, node: fx.Node, name: str, value_: Any = None) -> Any:
    """A node that reads ``dtype`` or ``device`` of the first floating parameter, if it agrees."""
    for target, tensor in program.tensors.items():
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            if value_ is not None and tensor.device != value_:
                break
            with node.graph.inserting_before(node):
                source = node.graph.get_attr(target)
                source.meta["val"] = tensor
                return node.graph.call_function(getattr, (source, name))
    return value_ if value_ is not None else torch.float32


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

"""Follow: dtype and device constants that capture baked become the parameters' own, and batch
norms have the momenta of theirs, and their synchronization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from ..calls.held import converted, has_gradient
from ..calls.tree import Slot
from ..errors import CaptureError
from ..kernels.norms import synchronized
from ..torch_private import BATCH_NORMS, tree_leaves
from .capture.inline import inline
from .capture.submodules import recapture
from .program import (
    DOUBLE,
    ORDER,
    Mode,
    Program,
    bind,
    copied,
    duplicate,
    is_tensor,
    origin,
    shape,
    value,
)
from .rules.decompose import decompose
from .widen import Widened

aten = torch.ops.aten


def follow_dtype(program: Program) -> Program:
    """``follow``, with a capture in float64, where a dtype was baked: for the example's sizes
    alone, which takes a fraction of the time; with free ones where that goes another way."""
    if not bakes_constants(program):
        return program
    double, found = converted(duplicate(program.student), torch.double), program
    for level in ("none", None):
        try:
            again = recapture(program, double, torch.double, program.functional, level)
            twin = decompose(inline(again))
        except CaptureError:  # one that only runs in its own dtype keeps it
            continue
        found, all_of_it = follow(program, twin)
        if all_of_it:
            break
    return found


def follow(program: Program, double: Program) -> tuple[Program, bool]:
    """Let dtype constants that capture baked follow the parameters; and whether the two programs
    could be compared in all modes.

    ``double`` is the same network captured in float64: a dtype that differs there follows the
    parameters' dtype, one that does not (a deliberate ``.float()``) stays. A conversion that only
    ``double`` has did nothing in this dtype (capture drops those): it is put in.
    """
    program, all_of_it = program.copied(), True
    for name, mode in program.modes.items():
        same = _align(program, mode.nodes, double.modes[name].nodes)
        all_of_it &= bool(same)
        casts = {node for node in same.values() if node.target in _CASTS}
        for twin, node in same.items():
            if ORDER in twin.meta:
                node.meta[DOUBLE] = twin.meta[ORDER]
            if node.op == "call_function" and node.target == twin.target:
                _follow_node(program, node, twin, same, casts)
        other = double.modes[name].out
        if mode.out.spec == other.spec:
            differ = [a != b for a, b in zip(mode.out.held, other.held, strict=True)]
            program.modes[name] = _returned(program, mode, "dtype", _floating, differ)
    return program, all_of_it


_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default}
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}


Same = dict[fx.Node, fx.Node]
"""The float64 twin's node -> the program's."""


def _align(program: Program, nodes: list[fx.Node], twins: list[fx.Node]) -> Same:
    """Which nodes are the same in both, but for conversions and sizes; empty if the graphs differ
    more."""
    named = {n.target: n for n in nodes if n.op != "call_function"}
    same: Same = {n: named[n.target] for n in twins if n.target in named}
    own = [n for n in nodes if n.op == "call_function" and not _passes_on(n)]
    missing, skipped = list[tuple[fx.Node, fx.Node]](), set[fx.Node]()
    alone = list[fx.Node]()
    for twin in (n for n in twins if n.op == "call_function" and not _of_sizes(n)):
        if twin.target is aten.alias.default and twin.args[0] in same:
            if any(cast is twin.args[0] for cast, _ in missing):
                return {}
            same[twin] = same[twin.args[0]]  # type: ignore[index]
            continue
        while own and own[0].target in _CASTS and twin.target not in _CASTS:
            alone.append(own.pop(0))
        while own and _slices_nothing(own[0]) and not _slices_nothing(twin):
            skipped.add(own.pop(0))
        if own and own[0].target == twin.target:
            same[twin] = own.pop(0)
        elif own and twin.target in _CASTS and twin.args[0] in same:
            missing.append((twin, own[0]))
            same[twin] = same[twin.args[0]]  # type: ignore[index]
        else:
            return {}
    casts = {twin for twin, _ in missing}
    for user in (same[user] for twin in casts for user in twin.users if user in same):
        if skipped & {user, *user.all_input_nodes}:
            return {}
    for twin, place in missing:
        source = same[twin.args[0]]  # type: ignore[index]
        dtype = _attribute(program, place, "dtype", torch.float32)
        with place.graph.inserting_before(place):
            if value(twin).is_complex():
                dtype = place.graph.call_function(_to_complex, (dtype,))
            cast = place.graph.call_function(aten.to.dtype, (source, dtype))
        cast.meta = {**twin.meta, "val": value(source)}
        for user in twin.users:
            if user in same and same[user] is not source:
                same[user].replace_input_with(source, cast)
        same[twin] = cast
    for node in () if own else alone:  # another layout for this dtype: whatever the dtype is
        read = node.args[0]
        if isinstance(read, fx.Node) and value(read).dtype == value(node).dtype:
            node.kwargs = {k: x for k, x in node.kwargs.items() if k != "dtype"}
    return {} if own else same


def _to_complex(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_complex()


def _of_sizes(node: fx.Node) -> bool:
    """Computes a number from sizes, or asserts something."""
    numbers = bool | int | float | torch.SymBool | torch.SymInt | torch.SymFloat
    return isinstance(value(node), numbers) or node.target in _ASSERTIONS


def _passes_on(node: fx.Node) -> bool:
    """Computes nothing of a tensor's values; capture has an alias for the last of some slices that
    take all there is where sizes are fixed."""
    return _of_sizes(node) or node.target is aten.alias.default


def _slices_nothing(node: fx.Node) -> bool:
    """Takes all that there is: capture drops it where sizes are fixed."""
    return node.target is aten.slice.Tensor and shape(node) == shape(node.args[0])


def _follow_node(
    program: Program, node: fx.Node, twin: fx.Node, same: Same, casts: set[fx.Node]
) -> None:
    def replaced(mine: Any, other: Any) -> Any:
        if isinstance(mine, list | tuple) and isinstance(other, list | tuple):
            return [replaced(a, b) for a, b in zip(mine, other, strict=False)]
        if isinstance(mine, torch.dtype) and mine != other and not mine.is_complex:
            return _attribute(program, node, "dtype", torch.float32)
        if isinstance(mine, float) and mine != other:
            return _number_of(program, node, twin, mine, other)
        if isinstance(mine, fx.Node) and mine in casts:
            return same.get(other, mine)  # a cast that did nothing was taken for what it casts
        return mine

    args = tuple(map(replaced, node.args, twin.args))
    kwargs = {k: replaced(v, twin.kwargs.get(k)) for k, v in node.kwargs.items()}
    node.args, node.kwargs = args, kwargs


def _returned(
    program: Program, mode: Mode, name: str, kind: Callable[[Any], bool], follows: list[bool]
) -> Mode:
    """Let constants of a kind in what a module returns (the dtype that a cache notes) be the
    parameters' ``name``, where they follow it."""
    held, end = list(mode.out.held), mode.graph.output_node()
    rest = iter(end.args[0])  # type: ignore[arg-type]
    results = list[Any]()
    for place, x in enumerate(held):
        if x is Slot:
            results.append(next(rest))
            continue
        read = _attribute(program, end, name, x) if kind(x) and follows[place] else None
        if isinstance(read, fx.Node):
            held[place] = Slot
            results.append(read)
    end.args = ((*results, *rest),)
    return replace(mode, out=replace(mode.out, held=tuple(held)))


# --------------------------------------------------------------------------- what is baked
def bakes_constants(program: Program) -> bool:
    """True if some call names a floating dtype or one of its limits, or makes floating numbers
    of none (and by that may name the default dtype), or a result holds one."""

    def bakes(node: fx.Node) -> bool:
        makes = is_tensor(node) and has_gradient(value(node)) and not _reads_floats(node)
        limits = (isinstance(x, float) and _limit(x) for x in _arguments(node))
        return bool(asked(node)) or makes or any(limits)

    returned = any(_floating(x) for mode in program.modes.values() for x in mode.out.held)
    return returned or any(map(bakes, _calls(program)))


def _floating(x: Any) -> bool:
    return isinstance(x, torch.dtype) and x.is_floating_point


def casts_on_purpose(program: Program) -> bool:
    """True if some floating value is brought into a floating dtype that does not ``follow`` the
    parameters': such a network rounds to that dtype whatever its parameters are."""
    return any(asked(node) and _reads_floats(node) for node in _calls(program))


def _calls(program: Program) -> list[fx.Node]:
    return [node for _, node in program.each() if node.op == "call_function"]


def _arguments(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def asked(node: fx.Node) -> set[torch.dtype]:
    """The floating dtypes that a call names, export's assertions apart."""
    computes = (
        node.op == "call_function" and node.target is not aten._assert_tensor_metadata.default
    )
    given = _arguments(node) if computes else []
    dtypes = (x for x in given if isinstance(x, torch.dtype))
    return {x for x in dtypes if x.is_floating_point or x.is_complex}


def _reads_floats(node: fx.Node) -> bool:
    """Its inputs may be several tensors in one, as of a split."""
    given = tree_leaves([value(n) for n in node.all_input_nodes])
    return any(has_gradient(x) for x in given if isinstance(x, torch.Tensor))


# --------------------------------------------------------------------------- limits of a dtype
_LIMITS = ("min", "max", "tiny", "eps", "1 - eps")  # the last: the upper end of uniform noise


def dtype_limit(dtype: torch.dtype, name: str) -> float:
    """``torch.finfo(dtype).min`` and so on, for the dtype that the parameters have by then."""
    info = torch.finfo(dtype)
    return 1 - info.eps if name == "1 - eps" else float(getattr(info, name))


def _limit(number: float) -> str | None:
    """Which limit of its dtype a baked number is (masks are filled with the smallest one)."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    each = ((name, dtype_limit(dtype, name)) for dtype in dtypes for name in _LIMITS)
    return next((name for name, limit in each if limit == number), None)


def _in_dtype(dtype: torch.dtype, mine: float, other: float) -> float:
    """A number that forward chose by the dtype: of float64, or of the example's."""
    return other if dtype is torch.float64 else mine


def _number_of(program: Program, node: fx.Node, twin: fx.Node, mine: float, other: Any) -> Any:
    """A node that computes a number as the dtype has it: of the first argument where that follows
    the parameters' (under autocast it may be another), else of theirs."""
    limit, first, wide = _limit(mine), node.args[0], value(twin.args[0])
    if limit is None and not isinstance(other, float):
        return mine
    follows = isinstance(first, fx.Node) and getattr(wide, "dtype", None) is torch.float64
    dtype = None if follows else _attribute(program, node, "dtype", torch.float32)
    with node.graph.inserting_before(node):
        dtype = dtype or node.graph.call_function(getattr, (first, "dtype"))
        call = (dtype_limit, (dtype, limit)) if limit else (_in_dtype, (dtype, mine, other))
        return node.graph.call_function(*call)


# --------------------------------------------------------------------------- devices
def follow_device(program: Program) -> Program:
    """Let device constants that equal the parameters' device follow it."""
    program = program.copied()
    for node in _calls(program):
        if any(map(_is_device, _arguments(node))):
            node.kwargs = {k: _device(program, node, x) for k, x in node.kwargs.items()}
            node.args = tuple(_device(program, node, x) for x in node.args)
    for name, mode in program.modes.items():
        every = [True] * len(mode.out.held)
        program.modes[name] = _returned(program, mode, "device", _is_device, every)
    return program


def _is_device(x: Any) -> bool:
    return isinstance(x, torch.device)


def _device(program: Program, node: fx.Node, x: Any) -> Any:
    return _attribute(program, node, "device", x) if _is_device(x) else x


def _attribute(program: Program, node: fx.Node, name: str, baked: Any) -> Any:
    """A node that reads ``dtype`` or ``device`` of the first floating parameter; ``baked`` if there
    is none, or it stands on another device."""
    for target, tensor in program.tensors.items():
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            if name == "device" and tensor.device != baked:
                break
            with node.graph.inserting_before(node):
                source = node.graph.get_attr(target)
                source.meta["val"] = tensor
                return node.graph.call_function(getattr, (source, name))
    return baked


# --------------------------------------------------------------------------- momenta
_NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_functional.default}


def follow_norms(program: Widened) -> Widened:
    """Let the teacher's graphs read the momentum of a batch norm where it is the module's, which
    may change (``swa_utils.update_bn`` sets it to ``None``); and let those that train on several
    processes together do so there, too."""
    modules, graphs = dict(program.student.named_modules()), dict(program.graphs)
    for key, mode in program.modes.items():
        graph, calls = copied(graphs[key]), Counter[str]()
        paths = {node.name: origin(node).path for node in mode.nodes if node.target in _NORMS}
        for node in [n for op in _NORMS for n in graph.find_nodes(op="call_function", target=op)]:
            path, given = paths.get(node.meta.get("of", ""), ""), bind(node)
            norm: Any = modules.get(path)
            if isinstance(norm, BATCH_NORMS) and given["training"]:
                calls[path] += 1
                with graph.inserting_before(node):
                    module = graph.get_attr(path)
                    if norm.momentum in (None, given["momentum"]) and norm.track_running_stats:
                        ahead = calls[path] if program.functional else 0
                        given |= {"momentum": graph.call_function(momentum, (module, ahead))}
                node.args, node.kwargs = tuple(given.values()), {}
                if isinstance(norm, nn.SyncBatchNorm):
                    node.args = node.target, module, *node.args
                    node.target = synchronized
        graphs[key] = graph
    return replace(program, graphs=graphs)


def momentum(norm: Any, ahead: int) -> float:
    """How much a batch counts in the statistics: as much as all before it, if there is no momentum.
    ``ahead``: batches that are counted when the graph ends."""
    if norm.momentum is None:
        return 1.0 / (float(norm.num_batches_tracked) + ahead)
    return float(norm.momentum)

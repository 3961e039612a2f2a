"""Faults planted by rule in a compiled program, for ``benchmarks.mutations``.

An operator takes a ``Subject`` and says, one by one, which ``Mutant``s of its kind there are; none
is made before it is asked for, and each is made over copies.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gpdfx.algebra.frozen import Frozen
from gpdfx.branches.term import Term
from gpdfx.kernels import copies
from gpdfx.kernels.fold import reference
from gpdfx.kernels.fold.site import TYPES
from gpdfx.passes.folded import Lowered, reads
from gpdfx.passes.program import bind, copied, draws, is_mutable, origin
from gpdfx.passes.widen import Widened
from tests.helpers import folding, teacher_of

aten = torch.ops.aten

SMALL = 1e-6
"""What is added, and how far from one what is multiplied by."""


@dataclass(frozen=True)
class Value:
    """A tensor that a node gave. ``learns``: it has a gradient."""

    shape: tuple[int, ...]
    floating: bool
    learns: bool


@dataclass(frozen=True)
class Subject:
    """A program to plant faults in. ``values``: what every node of the teacher's graphs gave for
    the example, a ``Value`` for a tensor."""

    program: Widened
    values: dict[fx.Node, Any]

    @staticmethod
    def of(program: Widened, call: Any) -> Subject:
        """With the values of a run of each graph."""
        values: dict[fx.Node, Any] = {}
        folds = folding(teacher_of(program, call))
        for key, graph in program.graphs.items():
            inputs: list[Any] = [
                x.detach().requires_grad_(x.is_floating_point()).clone()
                for x in program.modes[key].site.tensors
            ]
            run = _Run(folds.net, values, graph)
            run.run(*inputs, *([folds()] if reads(graph) else ()))
        return Subject(program, values)

    def nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Every node that is read or writes, and its graph."""
        for key, graph in self.program.graphs.items():
            for node in graph.nodes:
                if node.op != "output" and (node.users or is_mutable(node)):
                    yield key, node

    def calls(self) -> Iterator[tuple[str, fx.Node, dict[str, Any]]]:
        """Every call of an op, and its arguments by name."""
        for key, node in self.nodes():
            if node.op == "call_function" and node.target is not operator.getitem:
                yield key, node, arguments(node)

    def tensors(self) -> Iterator[tuple[str, fx.Node, Value]]:
        """Every node that gives a floating tensor."""
        for key, node in self.nodes():
            value = self.values[node]
            if isinstance(value, Value) and value.floating:
                yield key, node, value

    @cached_property
    def _students(self) -> dict[tuple[str, str], fx.Node]:
        return {(key, node.name): node for key, node in self.program.each()}

    def axes(self, key: str, node: fx.Node) -> tuple[Frozen, ...]:
        """The frozen axes of a node's tensor; none if they are not known."""
        if node.op == "get_attr":
            axes = self.program.maps.get(str(node.target), ())
        else:
            student = self._students.get((key, str(node.meta.get("student"))))
            found = self.program.inference.axes.get(student) if student else None
            axes = tuple(map(self.program.frozen, found)) if isinstance(found, tuple) else ()
        sizes = tuple(axis.teacher for axis in axes)
        return axes if sizes == self.values[node].shape else ()


class _Run(fx.Interpreter):
    """Notes what each node gives."""

    def __init__(self, net: Any, values: dict[fx.Node, Any], graph: fx.Graph) -> None:
        super().__init__(net, graph=graph)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        x = super().run_node(n)
        tensor = isinstance(x, Tensor)
        learns = tensor and x.requires_grad
        self.values[n] = Value(tuple(x.shape), x.is_floating_point(), learns) if tensor else x
        return x


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, and what makes the program that has it."""

    mode: str
    node: str
    op: str
    source: str
    make: Callable[[], Widened]


Mutants = Iterator[Mutant]
Operator = Callable[[Subject], Mutants]
Edit = Callable[[fx.Graph, fx.Node], None]


# --------------------------------------------------------------------------- making mutants
def in_graph(program: Widened, key: str, node: fx.Node, edit: Edit, detail: str = "") -> Mutant:
    """``edit`` this node of a copy of its graph."""

    def make() -> Widened:
        place = list(program.graphs[key].nodes).index(node)
        graph = copied(program.graphs[key])
        edit(graph, list(graph.nodes)[place])
        graph.lint()
        return replace(program, graphs=program.graphs | {key: graph})

    target = node.target
    op = str(target) if hasattr(target, "_schema") else getattr(target, "__name__", str(target))
    return Mutant(key, f"{node.name} {detail}".strip(), op, origin(node).source, make)


def in_table(program: Widened, table: str, name: str, value: Any, detail: str = "") -> Mutant:
    """Another value under a name of one of the program's mappings."""

    def make() -> Widened:
        return replace(program, **{table: getattr(program, table) | {name: value}})

    return Mutant("", f"{name} {detail}".strip(), table, "", make)


def wrapped(function: Callable[..., Any], *args: Any) -> Edit:
    """What reads the node reads a function of it."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_after(node):
            new = graph.call_function(function, (node, *args))
        node.replace_all_uses_with(new, lambda user: user is not new)

    return edit


def dropped(graph: fx.Graph, node: fx.Node) -> None:
    """What reads the node reads its first argument."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    if hasattr(node.target, "_schema"):
        return bind(node)
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except ValueError:  # a builtin
        return {}
    bound.apply_defaults()
    return bound.arguments


def changed(**changes: Any) -> Edit:
    """Other values of some arguments."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        given, target = arguments(node) | changes, node.target
        if hasattr(target, "_schema"):
            named = {a.name for a in target._schema.arguments if a.kwarg_only}
        else:
            signature = inspect.signature(target).parameters  # type: ignore[arg-type]
            named = {n for n, p in signature.items() if p.kind is p.KEYWORD_ONLY}
        node.args = tuple(x for name, x in given.items() if name not in named)
        node.kwargs = {name: x for name, x in given.items() if name in named}

    return edit


# --------------------------------------------------------------------------- values
def detached(x: Tensor) -> Tensor:
    return x.detach()


def scaled(x: Tensor) -> Tensor:
    return x * (1 + SMALL)


def negated(x: Tensor) -> Tensor:
    return -x


def shifted(x: Tensor) -> Tensor:
    return x + SMALL


def exchanged(x: Tensor, dim: int, a: int, b: int) -> Tensor:
    """Two indices change places."""
    index = torch.arange(x.shape[dim], device=x.device)
    index[a], index[b] = b, a
    return x.index_select(dim, index)


def of_value(function: Callable[[Tensor], Tensor], subject: Subject) -> Mutants:
    """A function of each floating tensor in its place."""
    for key, node, value in subject.tensors():
        if function is not detached or value.learns:
            yield in_graph(subject.program, key, node, wrapped(function))


def cast(dtype: torch.dtype, subject: Subject) -> Mutants:
    """Each floating tensor goes to a dtype and back."""

    def edit(graph: fx.Graph, node: fx.Node) -> None:
        with graph.inserting_after(node):
            there = graph.call_function(aten.to.dtype, (node, dtype))
        with graph.inserting_after(there):
            back = graph.call_function(aten.to.other, (there, node))
        node.replace_all_uses_with(back, lambda user: user not in (there, back))

    for key, node, _ in subject.tensors():
        yield in_graph(subject.program, key, node, edit)


def drop_cast(subject: Subject) -> Mutants:
    """What would go to another dtype stays as it is."""
    for key, node, given in subject.calls():
        name = getattr(node.target, "overloadpacket", node.target).__name__
        if isinstance(given.get("dtype"), torch.dtype) and name in ("to", "_to_copy"):
            yield in_graph(subject.program, key, node, dropped)


def swap_copies(subject: Subject) -> Mutants:
    """Two teacher indices of different student indices change places, along each wide axis."""
    for key, node, _ in subject.tensors():
        for dim, axis in enumerate(subject.axes(key, node)):
            if axis.wide and axis.student > 1:
                b = int(np.flatnonzero(axis.map != axis.map[0])[-1])
                edit = wrapped(exchanged, dim, 0, b)
                yield in_graph(subject.program, key, node, edit, f"dim {dim}")


# --------------------------------------------------------------------------- maps and shares
def shift_map(subject: Subject) -> Mutants:
    """The map of a wide dimension of a parameter or buffer, or an index that graphs name, is
    rolled by one."""
    program = subject.program
    for name, maps in program.maps.items():
        for dim, axis in enumerate(maps):
            if axis.wide and axis.student > 1:
                rolled = Frozen(axis.student, np.roll(axis.map, 1))
                value = (*maps[:dim], rolled, *maps[dim + 1 :])
                yield in_table(program, "maps", name, value, f"dim {dim}")
    yield from _tables(subject, "roll", lambda x: x.flatten().roll(1).view_as(x))


def drop_shares(subject: Subject) -> Mutants:
    """A contraction without its shares."""
    program = subject.program
    for key, node in subject.nodes():
        if node.target is copies.share:
            yield in_graph(program, key, node, dropped)
    for name, one in program.lowered.items():
        if one.shares:
            value = Lowered(replace(one.site, share=None), ())
            yield in_table(program, "lowered", name, value)


def swap_shares(subject: Subject) -> Mutants:
    """Two numbers of a table of shares, or of an index, change places: neighbours along each
    dimension."""

    def swap(dim: int, x: Tensor) -> Tensor:
        x = x.clone()
        one, other = (x.select(dim, k).view(-1) for k in (0, 1))
        one[0], other[0] = other[0].clone(), one[0].clone()
        return x

    for dim in range(6):
        yield from _tables(subject, f"dim {dim}", partial(swap, dim), dim)


def wrong_count(subject: Subject) -> Mutants:
    """One number of a table is off: by a copy or an index that others have, by one unit of random
    shares."""

    def off(x: Tensor) -> Tensor:
        x = x.clone()
        last = x.view(-1)[-1]
        if x.is_floating_point():
            last += 1 / 256
        elif x.max() > 0:
            last += 1 if last < x.max() else -1
        return x

    yield from _tables(subject, "off by one", off)


def _tables(
    subject: Subject, what: str, function: Callable[[Tensor], Tensor], dim: int = 0
) -> Mutants:
    """A function of each table that graphs or folds name, unless it changes nothing."""
    program = subject.program
    for table in ("shares", "constants"):
        for name, x in getattr(program, table).items():
            if dim < x.ndim and x.shape[dim] > 1 and not torch.equal(x, function(x)):
                yield in_table(program, table, name, function(x), what)


# --------------------------------------------------------------------------- arguments
def argument(names: set[str], other: Callable[[Any], Any], kinds: Any, subject: Subject) -> Mutants:
    """Another value of each argument of these names."""
    for key, node, given in subject.calls():
        for name in sorted(names & given.keys()):
            old = given[name]
            if isinstance(old, kinds) and other(old) != old:
                edit = changed(**{name: other(old)})
                yield in_graph(subject.program, key, node, edit, name)


def other_momentum(old: float | fx.Node) -> float:
    """Another number; a constant in the place of one that is read."""
    return 0.11 if isinstance(old, fx.Node) else old + 0.01


def swap_operands(subject: Subject) -> Mutants:
    """An op whose operands are not to be exchanged, with exchanged ones."""
    for key, node, given in subject.calls():
        name = getattr(node.target, "overloadpacket", node.target).__name__
        for a, b in PAIRS if name not in COMMUTE else ():
            if isinstance(given.get(a), fx.Node) and isinstance(given.get(b), fx.Node):
                yield in_graph(subject.program, key, node, partial(_exchanged, a, b))
        listed = given.get("tensors")
        if isinstance(listed, list | tuple) and len(listed) > 1:
            yield in_graph(subject.program, key, node, _reversed)


PAIRS = (("self", "other"), ("self", "mat2"), ("self", "exponent"))
COMMUTE = ("add", "add_", "mul", "mul_", "maximum", "minimum", "eq", "ne", "logical_and")


def _exchanged(a: str, b: str, graph: fx.Graph, node: fx.Node) -> None:
    given = arguments(node)
    changed(**{a: given[b], b: given[a]})(graph, node)


def _reversed(graph: fx.Graph, node: fx.Node) -> None:
    changed(tensors=list(reversed(arguments(node)["tensors"])))(graph, node)


def bake_size(subject: Subject) -> Mutants:
    """A number that is computed from sizes becomes the example's."""

    def baked(number: int, graph: fx.Graph, node: fx.Node) -> None:
        node.replace_all_uses_with(number)  # type: ignore[arg-type]
        graph.erase_node(node)

    for key, node in subject.nodes():
        number = subject.values[node]
        if type(number) is int and node.op == "call_function":
            edit = partial(baked, number)
            yield in_graph(subject.program, key, node, edit, str(number))


# --------------------------------------------------------------------------- effects
def drop_write(subject: Subject) -> Mutants:
    """What would be written to a tensor, or to statistics, is not."""
    for key, node, given in subject.calls():
        if is_mutable(node):
            yield in_graph(subject.program, key, node, dropped)
        if given.get("training") or given.get("use_input_stats"):
            for name in ("running_mean", "running_var"):
                if isinstance(given.get(name), fx.Node):
                    edit = partial(_elsewhere, name)
                    yield in_graph(subject.program, key, node, edit, name)


def _elsewhere(name: str, graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        clone = graph.call_function(torch.clone, (arguments(node)[name],))
    changed(**{name: clone})(graph, node)


def draw_again(subject: Subject) -> Mutants:
    """The random state moves once more: before each draw, and at the end."""
    for key, graph in subject.program.graphs.items():
        for node in graph.nodes:
            if node.op == "output" or (node.op == "call_function" and draws(node)):
                yield in_graph(subject.program, key, node, _draw_before)


def _draw_before(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        graph.call_function(torch.rand, (1,))


ACTIVATIONS = (
    *("relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh"),
    *("leaky_relu", "elu", "selu", "softplus", "mish", "clamp", "exp", "rsqrt", "sqrt", "erf"),
)


def drop_activation(subject: Subject) -> Mutants:
    """An activation is the identity."""
    for key, node, _ in subject.calls():
        name = getattr(node.target, "overloadpacket", node.target).__name__
        if name.rstrip("_") in ACTIVATIONS:
            yield in_graph(subject.program, key, node, dropped)


# --------------------------------------------------------------------------- graphs and branches
def other_mode(subject: Subject) -> Mutants:
    """A part runs the graph of the other mode."""
    program = subject.program
    for key, mode in program.modes.items():
        for other, twin in program.modes.items():
            alike = (mode.site.path, mode.site.call.shapes)
            same = alike == (twin.site.path, twin.site.call.shapes)
            if same and mode.site.training != twin.site.training:
                yield in_table(program, "graphs", key, program.graphs[other], f"from {other}")


def permute_outputs(subject: Subject) -> Mutants:
    """Two outputs of one shape change places, or the first and last entry of one."""
    for key, graph in subject.program.graphs.items():
        node = graph.output_node()
        given = node.args[0]
        assert isinstance(given, tuple | list)
        shapes = [getattr(subject.values.get(x), "shape", None) for x in given]  # type: ignore[call-overload]
        for a, size in enumerate(shapes):
            if size and size[-1] > 1:
                edit = partial(_permuted_output, a, size[-1] - 1)
                yield in_graph(subject.program, key, node, edit, f"{a}")
            for b in range(a + 1, len(shapes)):
                if size is not None and size == shapes[b] and given[a] is not given[b]:
                    edit = partial(_swapped_outputs, a, b)
                    yield in_graph(subject.program, key, node, edit, f"{a} and {b}")


def _permuted_output(a: int, last: int, graph: fx.Graph, node: fx.Node) -> None:
    given = list(node.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(node):
        given[a] = graph.call_function(exchanged, (given[a], -1, 0, last))
    node.args = (tuple(given),)


def _swapped_outputs(a: int, b: int, graph: fx.Graph, node: fx.Node) -> None:
    given = list(node.args[0])  # type: ignore[arg-type]
    given[a], given[b] = given[b], given[a]
    node.args = (tuple(given),)


def mute_scale(subject: Subject) -> Mutants:
    """The scales of one branch get no gradient from the fold."""
    program = subject.program
    for name, one in program.lowered.items():
        for k, term in enumerate(one.site.terms):
            muted = _Muted(*(getattr(term, f.name) for f in fields(term)))
            terms = (*one.site.terms[:k], muted, *one.site.terms[k + 1 :])
            value = replace(one, site=replace(one.site, terms=terms))
            yield in_table(program, "lowered", name, value, f"{term.letters} {k}")


class _Muted(Term):
    """A term that forgets the gradient of its scales."""


def _back(term: Term, *given: Any) -> Any:
    sums = _BACK(term, *given)
    return torch.zeros_like(sums) if isinstance(term, _Muted) else sums


_BACK, reference._back = reference._back, _back
TYPES[_Muted.__name__] = _Muted


OPERATORS: dict[str, Operator] = {
    "detach": partial(of_value, detached),
    "scale": partial(of_value, scaled),
    "negate": partial(of_value, negated),
    "add": partial(of_value, shifted),
    "half": partial(cast, torch.float16),
    "float32": partial(cast, torch.float32),
    "drop a cast": drop_cast,
    "swap copies": swap_copies,
    "shift map": shift_map,
    "drop shares": drop_shares,
    "swap shares": swap_shares,
    "wrong count": wrong_count,
    "eps": partial(argument, {"eps"}, lambda x: 2 * x, float),
    "momentum": partial(argument, {"momentum"}, other_momentum, float | fx.Node),
    "correction": partial(argument, {"correction", "unbiased"}, lambda x: 1 - x, int | float),
    "drop dropout": partial(argument, {"p", "dropout_p"}, lambda x: 0.0, float),
    "swap operands": swap_operands,
    "bake a size": bake_size,
    "drop a write": drop_write,
    "draw again": draw_again,
    "drop activation": drop_activation,
    "other mode": other_mode,
    "permute outputs": permute_outputs,
    "mute a scale": mute_scale,
}
"""By name, in the order of the table."""

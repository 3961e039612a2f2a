"""The data flow between layers, merges and bridges: what ``explain``'s evidence holds of the
graphs, and what ``graph`` draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..algebra.axes import Axis, leaves
from ..passes.capture.modes import GIVEN
from ..passes.program import Mode, bind, is_tensor, mutated, number, origin, shape, value
from ..passes.rules.op import parts
from ..passes.widen import Widened

if TYPE_CHECKING:  # imported where it is used: it takes a fifth of a second
    import networkx as nx

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "attention")
"""What is shown even where all its inputs come from one layer."""
TIMES = "\u00d7"
WORDS = {
    **{"add": "+", "add_": "+", "sub": "-", "mul": TIMES, "mul_": TIMES, "div": "/"},
    **{"cat": "concat", "scaled_dot_product_attention": "attention"},
}


@dataclass(frozen=True)
class Step:
    """What is drawn as one node. ``kind``: input, layer, merge, bridge or output; ``module``: the
    path of the user's module that it is in; ``op``: what it does, in a word; ``axis``: of its
    result the one that is called its width, refined (a layer's is of its weight); ``weight``: by
    the student's name; ``why``: a bridge stands."""

    kind: str
    module: str
    op: str
    axis: Axis | None = None
    weight: str = ""
    why: str = ""


def data_flow(widened: Widened) -> nx.DiGraph:
    """The data flow in eval mode: nodes are named for people and hold a ``step``, in the order of
    execution; a layer that is called twice is two of them."""
    import networkx as nx

    flow = nx.DiGraph()
    drawn: dict[str, set[Any]] = {}  # what of a part has been drawn already
    for mode in widened.modes.values():
        if mode.site.training or mode.site.mode == GIVEN:
            continue
        read = {node.target for node in mode.nodes if node.op == "get_attr"}
        if mode.site.path not in drawn or read - drawn[mode.site.path]:
            drawn.setdefault(mode.site.path, set()).update(read)
            _Reader(widened, flow, mode).run()
    return flow


class _Reader:
    """Adds one graph. ``sources``: the nodes of the flow that a value comes from; ``weights``:
    matrices that a value is made of; ``moving``: values that depend on the input."""

    def __init__(self, widened: Widened, flow: nx.DiGraph, mode: Mode) -> None:
        self.flow, self.mode, self.path = flow, mode, mode.site.path
        self.inference, self.widths, self.names = widened.inference, widened.widths, widened.names
        self.matrices = set(widened.parameters(rank=2))
        self.bridged = {(b.node, b.op): b.reason for b in widened.bridges}
        self.sources: dict[fx.Node, tuple[str, ...]] = {}
        self.weights: dict[fx.Node, tuple[str, ...]] = {}
        self.moving = set[fx.Node]()

    def run(self) -> None:
        for node in self.mode.nodes:
            if node.op == "output":
                self._add("output", Step("output", self.path, ""), _unique(self._from(node)))
            elif isinstance(value(node), int | float | torch.SymInt):
                continue  # sizes are no data flow
            elif node.op == "placeholder" and is_tensor(node):
                sizes = " x ".join(map(str, shape(node)))
                step = Step("input", self.path, sizes)
                self.sources[node] = (self._add(node.name, step, ()),)
                self.moving.add(node)
            elif node.op == "get_attr":
                self.sources[node] = ()
                self.weights[node] = (str(node.target),) if node.target in self.matrices else ()
            elif node.op == "call_function":
                self._call(node)

    def _from(self, node: fx.Node) -> Iterable[str]:
        return (s for n in node.all_input_nodes for s in self.sources.get(n, ()))

    def _call(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self.sources]
        sources, moves = _unique(self._from(node)), any(n in self.moving for n in inputs)
        held = _unique(w for n in inputs if n not in self.moving for w in self.weights[n])
        why = self.bridged.get((node.name, str(node.target)), "")
        module, word = origin(node).path, _word(node)
        name = f"{module} {word}".lstrip()
        weight = max(held, key=lambda n: len(self.inference.tensors[n]), default="")
        if weight and (moves or why):
            name = next((n for n in self.names[weight] if n.startswith(f"{module}.")), weight)
            name = name.removesuffix(".weight")
        if why:
            step = Step("bridge", module, _layer(node, word), None, weight, why)
            sources = (self._add(name, step, sources),)
        elif moves and held:
            axes = [self.inference.solver.resolve(a) for a in self.inference.tensors[weight]]
            axis = next((a for a in axes if leaves(a) and self._made_of(node, a)), axes[0])
            step = Step("layer", module, _layer(node, word), axis, weight)
            sources = (self._add(name, step, sources),)
        elif moves and (len(sources) > 1 or word in PRODUCTS):
            wide = (a for a in self._axes(node) if any(map(self._wide, leaves(a))))
            step = Step("merge", module, word, next(wide, None))
            sources = (self._add(name, step, sources),)
        for n in (node, *(x for _, x in mutated(node))):  # who reads that later reads this
            self.sources[n], self.weights[n] = sources, () if moves else held
            self.moving |= {n} if moves else set()

    def _add(self, name: str, step: Step, sources: Iterable[str]) -> str:
        name = name if not self.path or name.startswith(self.path) else f"{self.path} {name}"
        unique, k = name, 1
        while unique in self.flow:
            k += 1
            unique = f"{name} ({k})"
        self.flow.add_node(unique, step=step)
        self.flow.add_edges_from((source, unique) for source in sources)
        return unique

    def _wide(self, leaf: Any) -> bool:
        return bool(self.widths(leaf) != leaf.size)

    def _axes(self, node: fx.Node) -> list[Axis]:
        """All axes of a result, refined."""
        every = parts(self.inference.axes.get(node, ()))
        return [self.inference.solver.resolve(a) for axes in every for a in axes]

    def _made_of(self, node: fx.Node, axis: Axis) -> bool:
        """Whether the result has all that a weight's axis is made of."""
        return {x for a in self._axes(node) for x in leaves(a)}.issuperset(leaves(axis))


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _word(node: fx.Node) -> str:
    """An op in a word: ``conv2d``, ``+``."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", "")
    name = name or str(node.target)
    return WORDS.get(name, name)


def _layer(node: fx.Node, word: str) -> str:
    """A layer in a few: ``conv 3x3 /2``."""
    args = bind(node) if hasattr(node.target, "_schema") else {}
    if not {"weight", "groups", "stride"} <= args.keys():
        return word
    kernel, groups = shape(args["weight"]), number(args["groups"])
    kind = "" if groups == 1 else "depthwise " if kernel[1] == 1 else "grouped "
    kind += "transposed conv " if "transpose" in word or args.get("transposed") else "conv "
    stride = max(map(number, args["stride"]), default=1)
    return kind + "x".join(map(str, kernel[2:])) + (f" /{stride}" if stride > 1 else "")

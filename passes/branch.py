"""Branch: layers get multi-branch weights; graphs read the folded weight where they read the
parameter.

The fold itself stands outside of the graphs (``teacher.folding``): it is computed once a step and
layer, however often the weight is used, and for teacher and student together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ..branches.layer import Layer
from ..branches.sets import NONE, BranchSet
from ..kernels import copies
from . import folded
from .assign import check_sizes
from .folded import Branched, kernel, merged, module_of, plain
from .program import Program, bind, copied, shape, size_hint
from .widen import Widened

aten = torch.ops.aten

LAYERS: dict[Any, tuple[str, str, str]] = {
    aten.linear.default: ("linear", "weight", "bias"),
    aten.addmm.default: ("matrix", "mat2", "self"),
    aten.mm.default: ("matrix", "mat2", ""),
    aten.matmul.default: ("matrix", "other", ""),
    **{
        op: ("conv", "weight", "bias")
        for packet in (aten.conv1d, aten.conv2d, aten.conv3d)
        for op in (packet.default, packet.padding)
    },
    aten.conv_transpose1d.default: ("transposed", "weight", "bias"),
    aten.conv_transpose2d.input: ("transposed", "weight", "bias"),
    aten.conv_transpose3d.input: ("transposed", "weight", "bias"),
}
"""Op -> how it stores its weight, and the names of its weight and bias."""

Uses = dict[str, list[tuple[fx.Node, fx.Node]]]
"""Parameter -> where it is read: its node, and the op."""


def branch(program: Widened) -> Widened:
    """Give every trainable layer the branches that are asked for its weight, by all its names."""
    names, uses = program.names, uses_of(program)
    choose = program.options.control.branches_of
    asked = {name: choose(names[name]) for name in program.parameters(rank=2)}
    each = {
        n: _branched(program, uses, n, chosen) for n, chosen in asked.items() if chosen is not NONE
    }
    found = [one for one in each.values() if isinstance(one, Branched)]
    left = {name: why for name, why in each.items() if isinstance(why, str)}
    check_sizes(program, program.widths, sum(map(partial(_bytes, program), found)))
    graphs = dict(program.graphs)
    for key, mode in program.modes.items() if found else ():
        graphs[key] = copied(graphs[key])
        read_folded(graphs[key], found, mode.site.training)
    return replace(program, graphs=graphs, branched=tuple(found), unbranched=left)


def _bytes(program: Program, one: Branched) -> int:
    """What the parameters of a weight's branches take."""
    shapes = (shape for b in one.chosen.branches for shape in b.shapes(one.layer).values())
    return sum(map(prod, shapes)) * program.tensors[one.weight].itemsize


# --------------------------------------------------------------------------- finding layers
def _branched(program: Widened, uses: Uses, name: str, chosen: BranchSet) -> Branched | str:
    """A weight with those of the branches that fit, or why it has none."""
    layer = layer_of(program, uses, name)
    if isinstance(layer, str):
        return layer
    chosen = chosen.on(layer, positions(program, uses, name))
    if layer.layout == "matrix":  # a plain product has no place for what these add
        chosen = replace(chosen, branches=tuple(b for b in chosen.branches if not b.norm))
    if not chosen.branches:
        return "no branch of its set fits a layer of this form"
    bias = _bias(program, uses, name) if any(b.norm for b in chosen.branches) else None
    return Branched(name, bias, layer, chosen)


def uses_of(program: Program) -> Uses:
    """All of the student's graphs, by what they read."""
    found: Uses = defaultdict(list)
    for _, node in program.each():
        if node.op == "get_attr":
            found[str(node.target)] += [(node, user) for user in node.users]
    return found


def layer_of(program: Widened, uses: Uses, name: str) -> Layer | str:
    """The geometry of a weight in the teacher, or why it is not that of a layer that trains."""
    found: set[Layer] = set()
    for node, user in uses[name]:
        layout, argument, _ = LAYERS.get(user.target, ("", "", ""))
        if not layout or bind(user)[argument] is not node:
            return f"{user.target} reads it, too" if found else f"{user.target} reads it"
        op = program.inference.ops[user]
        if user in program.inference.bridges or any(x is node for x, _ in op.narrowed):
            return f"{user.target} runs at the student's width"
        groups = program.frozen(op.env["g"]).teacher if "g" in op.env else 1
        shape = [m.teacher for m in program.maps[name]]
        if layout in ("linear", "matrix") and len(shape) != 2:
            return f"{user.target} reads it with {len(shape)} dimensions"
        rows, columns = shape[:2] if layout in ("conv", "linear") else shape[1::-1]
        outputs, inputs = (
            (rows, columns // groups) if layout == "transposed" else (rows // groups, columns)
        )
        found.add(Layer(groups, outputs, inputs, tuple(shape[2:]), layout))
    if len(found) != 1:
        return "layers of several forms read it" if found else "no layer reads it"
    if not program.tensors[name].requires_grad:
        return "it is frozen"
    (layer,) = found
    return layer if prod(layer.shape) else "it is empty"


def positions(program: Widened, uses: Uses, name: str) -> float:
    """How many a sample of the example has that the layers of a weight compute, in the mode with
    most of them: pixels of the output, or of a transposed convolution's input; tokens."""
    found: dict[fx.Graph, int] = defaultdict(int)
    for node, user in uses[name]:
        source = bind(user)["input"] if LAYERS[user.target][0] == "transposed" else user
        sizes = [size_hint(n) for n in shape(source)]
        found[node.graph] += prod(sizes) // max(1, sizes[1 - len(shape(node))])
    batch = {
        mode.graph: next((x.shape[0] for x in mode.site.tensors if x.ndim), 1)
        for mode in program.modes.values()
    }
    return max(total / max(1, batch[graph]) for graph, total in found.items())


def _bias(program: Widened, uses: Uses, name: str) -> str | None:
    """The bias parameter that goes with a weight, wherever either is used."""
    ops = [user for _, user in uses[name]]
    biases = {bind(op).get(LAYERS[op.target][2]) for op in ops}
    targets = {b.target if isinstance(b, fx.Node) and b.op == "get_attr" else None for b in biases}
    if len(targets) != 1 or None in targets:
        return None
    (bias,) = targets
    own = all(user in ops for _, user in uses[str(bias)])
    return str(bias) if own and isinstance(program.tensors[str(bias)], torch.nn.Parameter) else None


# --------------------------------------------------------------------------- rewriting
def read_folded(graph: fx.Graph, found: Sequence[Branched], training: bool) -> None:
    """Folded weights take the place of parameters."""
    nodes = {str(n.target): n for n in graph.find_nodes(op="get_attr")}
    add = partial(folded.add, graph)
    for one in found:
        node = nodes.get(one.weight)
        if node is None:
            continue
        normed = [name for name, b in one.chosen.named().items() if b.norm]
        new = add(plain(one.weight) if normed and training else merged(one.weight))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if normed and training:
            for layer in _layers_on(new):
                _add_normed(graph, one, layer, new, {b: add(kernel(one.weight, b)) for b in normed})
        elif one.bias is not None:
            bias = nodes[one.bias]
            bias.replace_all_uses_with(add(merged(one.bias)))
            graph.erase_node(bias)


def _layers_on(weight: fx.Node) -> list[fx.Node]:
    """The ops that a weight goes into, its shares multiplied first or not."""
    users = [
        u for user in weight.users for u in (user.users if user.target is copies.share else [user])
    ]
    return [u for u in users if u.target in LAYERS]


def _add_normed(
    graph: fx.Graph, one: Branched, layer: fx.Node, weight: fx.Node, kernels: dict[str, fx.Node]
) -> None:
    """``y -> y + sum_b norm_b(layer with the weight of b)``, on the same input."""
    _, weight_name, bias_name = LAYERS[layer.target]
    users, total = list(layer.users), layer
    with graph.inserting_before(layer.next):
        for name, own in kernels.items():
            args = bind(layer) | {weight_name: own, bias_name: None}
            if (shared := bind(layer)[weight_name]) is not weight:  # the same shares
                args[weight_name] = graph.node_copy(shared)
                args[weight_name].replace_input_with(weight, own)
            made = graph.call_function(layer.target, tuple(args.values()))  # type: ignore[arg-type]
            made = graph.call_module(f"{module_of(one.weight)}.norms.{name}", (made,))
            total = graph.call_function(aten.add.Tensor, (total, made))
    for user in users:
        user.replace_input_with(layer, total)

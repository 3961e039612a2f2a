"""The tensors of a plain graph under the student's names, and its layers as modules."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...passes.program import unused
from ...teacher.inner import add_module, attach
from ...teacher.module import Teacher
from .layers import Names, call_layer, layers_of
from .retrace import RAW, Variant, keep_traceable

aten = torch.ops.aten
METHODS = {
    aten.sym_size.int: "size",
    aten.view.default: "view",
    aten.reshape.default: "reshape",
    aten.expand.default: "expand",
    aten.unflatten.int: "unflatten",
}
"""Of what has sizes as arguments, the form in which every tracer keeps these free."""


@dataclass(frozen=True)
class Written:
    """A graph, and what it reads: the values of each variant of a tensor, and ``constants``;
    ``outputs``: what it gives for the example."""

    graph: fx.Graph
    variants: Mapping[str, Mapping[Variant, Tensor]]
    constants: Mapping[str, Tensor]
    outputs: Any


def names_of(teacher: Teacher) -> dict[str, list[str]]:
    """Tensor -> all of its names, its own first."""
    names = {name: [name] for name in teacher._facts.maps}
    for other, name in teacher._facts.alias.items():
        names[name].append(other)
    return names


def meanings(graph: fx.Graph, names: Names, student: nn.Module) -> dict[str, dict[str, Variant]]:
    """Tensor -> which variant each of its names stands for; none if there are more of these than
    names of layers that read them."""
    reads = defaultdict[str, dict[Variant, list[fx.Node]]](lambda: defaultdict(list))
    for node in graph.find_nodes(op="get_attr"):
        if variant := node.meta.get("variant"):
            reads[str(node.target)][variant] += node.users
    found = {}
    for name, every in names.items():
        own = reads.get(name, {RAW: []})
        first = next(iter(own))
        mine = _by_layer(own, names, student) if len(own) > 1 else {}
        found[name] = {} if mine is None else dict.fromkeys(every, first) | mine
    return found


def _by_layer(
    reads: Mapping[Variant, list[fx.Node]], names: Names, student: nn.Module
) -> dict[str, Variant] | None:
    mine: dict[str, Variant] = {}
    for variant, users in reads.items():
        for user in users:
            path = next((path for path, _ in layers_of(user, names, student)), None)
            if path is None or mine.setdefault(f"{path}.weight", variant) != variant:
                return None
    return mine


def assembled(teacher: Teacher, written: Written, training: bool) -> fx.GraphModule:
    """The graph as a module, with all tensors of the student; in eval mode with its layers."""
    graph, student, names = written.graph, teacher._student, names_of(teacher)
    root = nn.Module()
    for path, _ in student.named_modules(remove_duplicate=False):
        if path:
            add_module(root, path, nn.Module())
    meant = meanings(graph, names, student)
    tensors = dict[str, Tensor]()
    for name, own in meant.items():
        values = {variant: _value(teacher, written, name, variant) for variant in {*own.values()}}
        tensors |= {other: values[variant] for other, variant in own.items()}
        if len(values) > 1:
            warnings.warn(
                f"{' and '.join(own)} are tied in the student, and here not any more: their layers "
                "weigh the copies differently",
                stacklevel=5,
            )
    lasting = teacher.state_dict(keep_vars=True)
    order = [n for n, _ in student.named_parameters(remove_duplicate=False)]
    order += [n for n, _ in student.named_buffers(remove_duplicate=False)]
    for name in dict.fromkeys([*filter(tensors.__contains__, order), *tensors]):
        attach(root, name, tensors[name], persistent=name in lasting)
    prefix = unused("_constants", root._modules)
    for k, (name, constant) in enumerate(written.constants.items()):
        attach(root, f"{prefix}.c{k}", constant.detach().clone(), persistent=False)
        for node in graph.find_nodes(op="get_attr"):
            node.target = f"{prefix}.c{k}" if node.target == name else node.target
    _read_own(graph, meant, names, student)
    for node in list(graph.nodes):
        if node.target in METHODS:
            node.op, node.target = "call_method", METHODS[node.target]
        elif not training:
            call_layer(node, root, student)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    identity = unused("_identity", root._modules)
    parameters = frozenset(n for n, _ in root.named_parameters(remove_duplicate=False))
    if keep_traceable(graph, parameters, identity):
        root._modules[identity] = nn.Identity()
    root.train(training)
    plain = fx.GraphModule(root, graph, f"{type(student).__name__}Teacher")
    for registry in ("_parameters", "_buffers", "_modules"):  # also what the graph does not read
        getattr(plain, registry).clear()
        getattr(plain, registry).update(getattr(root, registry))
    plain._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
    return plain


def _value(teacher: Teacher, written: Written, name: str, variant: Variant) -> Tensor:
    """A tensor of the plain network."""
    own = teacher._tensor(name)
    value = (own if variant == RAW else written.variants[name][variant]).detach().clone()
    if not isinstance(own, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=own.requires_grad)


def _read_own(
    graph: fx.Graph,
    meant: Mapping[str, Mapping[str, Variant]],
    names: Names,
    student: nn.Module,
) -> None:
    """Let every layer read a tied tensor by its own name."""
    for node in graph.find_nodes(op="get_attr"):
        own = meant.get(str(node.target), {})
        for user in list(node.users) if len(own) > 1 else ():
            for path, _ in layers_of(user, names, student):
                if own[f"{path}.weight"] == node.meta.get("variant"):
                    with graph.inserting_before(node):
                        user.replace_input_with(node, graph.get_attr(f"{path}.weight"))
                    break

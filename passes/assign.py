"""Assign widths: one global choice, from what the user asked for each parameter.

An axis belongs to the parameter that brings it: the first, in graph order, of which an op's
result has it (a layer's output channels; its norm and the layers that are added to it bring them
again, the next layer contracts them). That one's ratio counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import fx

from ..algebra.axes import Axis, Leaf, leaves
from ..algebra.frozen import Frozen, freeze
from ..algebra.solver import Reason
from ..algebra.widths import Widths, choose_widths, width_of
from ..control import covers
from ..memory import check_room
from .infer import Inferred
from .program import extended
from .rules.op import parts


@dataclass(frozen=True)
class Assigned(Inferred):
    """A program with a width for every leaf."""

    widths: Widths = field(kw_only=True)

    def frozen(self, axis: Axis) -> Frozen:
        """The map from the teacher's indices along an axis to the student's."""
        return freeze(self.inference.solver.resolve(axis), self.widths)

    def check(self) -> None:
        """Also: nothing shrinks, and what is fixed keeps its size."""
        super().check()
        for leaf, width in self.widths.size.items():
            if width < leaf.size or (width > leaf.size and leaf in self.inference.solver.reason):
                raise AssertionError(f"{leaf} may not have {width} indices")


def assign(program: Inferred) -> Assigned:
    """One width for every leaf (see ``choose_widths``)."""
    inference, control = program.inference, program.options.control
    solver, parameters = inference.solver, program.parameters()
    names = program.names
    free = {
        name: dict.fromkeys(x for a in axes for x in leaves(a) if x not in solver.reason)
        for name, axes in parameters.items()
    }
    stays: dict[Leaf, Reason] = {}
    for name in parameters:
        for leaf in free[name] if control.keeps(names[name]) else ():
            stays.setdefault(leaf, Reason("kept", name))
    free = {name: {x: None for x in own if x not in stays} for name, own in free.items()}
    asked = _asked(program, free, names)
    taken = {leaf: next(iter(by.items())) for leaf, by in asked.items()}
    stays |= {leaf: Reason("ratio 1", owner) for leaf, (owner, r) in taken.items() if r == 1}
    widths = choose_widths(
        solver,
        [a for axes in parameters.values() for a in axes],
        [a for axes in inference.axes.values() for part in parts(axes) for a in part],
        lambda leaf: taken[leaf][1],
        stays,
        control.round_to,
    )
    check_sizes(program, widths)
    differ = {leaf: by for leaf, by in asked.items() if len(set(by.values())) > 1}
    disputed = {x: by for x, by in differ.items() if x not in widths.held}
    return extended(Assigned, program, widths=replace(widths, disputed=disputed))


def check_sizes(program: Inferred, widths: Widths, more: int = 0) -> None:
    """Raise ``InputError`` where the teacher's tensors would not fit into memory. ``more``: bytes
    that branches take."""
    resolve = program.inference.solver.resolve
    sizes: dict[torch.device, int] = {}
    for name, axes in program.inference.tensors.items():
        x = program.tensors[name]
        size = prod(width_of(resolve(axis), widths.size) for axis in axes) * x.itemsize
        sizes[x.device] = sizes.get(x.device, more) + size
    for device, size in sizes.items():
        check_room(f"a teacher of {program.options.control}", size, device)


def _asked(
    program: Inferred, free: dict[str, dict[Leaf, None]], names: dict[str, list[str]]
) -> dict[Leaf, dict[str, float]]:
    """Leaf -> parameter -> the ratio asked for it, the owner's first.

    Weights that bring the leaf have a say. So have those that only follow, a norm or a bias, or a
    head (its rows are the network's output), if they have an entry of their own: one that is not
    the owner's too.
    """
    control, tensors = program.options.control, program.inference.tensors
    bring: dict[Leaf, dict[str, None]] = {}
    for name, leaf in _brought(program, free):
        bring.setdefault(leaf, {})[name] = None
    bringing = {name for some in bring.values() for name in some}
    readers: dict[Leaf, list[str]] = {}
    for name, own in free.items():
        for leaf in own:
            readers.setdefault(leaf, []).append(name)
    asked = {}
    for leaf, some in readers.items():
        first = [*bring.get(leaf, some)]  # behind a bridge an axis begins with those that read it
        weights = {first[0], *(n for n in first if len(tensors[n]) > 1)}
        heads = [n for n in some if n not in bringing and n not in first]
        asked[leaf] = {
            n: control.ratio_of(names[n])
            for n in (*first, *heads)
            if n in weights or not covers(control.entry(names[n]), names[first[0]])
        }
    return asked


def _brought(program: Inferred, free: dict[str, dict[Leaf, None]]) -> Iterator[tuple[str, Leaf]]:
    """In graph order: a parameter that an op reads, and a leaf of it that the op's result has.
    Ops on weights alone (a transpose) hand their parameters on."""
    inference = program.inference
    read: dict[fx.Node, list[str]] = {}
    for _, node in program.each():
        if node.op == "get_attr" and node.target in free:
            read[node] = [str(node.target)]
        names = [name for x in node.all_input_nodes for name in read.get(x, ())]
        op = inference.ops.get(node)
        if not names or op is None:
            continue
        if op.is_static(node):
            read[node] = names
            continue
        axes = [a for part in parts(inference.axes[node]) for a in part]
        result = {leaf for a in axes for leaf in leaves(inference.solver.resolve(a))}
        yield from ((name, leaf) for name in names for leaf in free[name] if leaf in result)

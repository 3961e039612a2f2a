"""The law of the fold: at the start branches add nothing, and every gradient of the fold is right.

A fold is linear in the layer's own weight and in the branches' scales, which begin at zero. So, in
float64 and to the last bits: what it folds to is the weight itself (times its shares); and along
one random direction of weight and scales together, the change that the gradients foretell is the
change that comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import copies
from ..kernels.fold import fold
from ..passes.branch import LAYERS
from ..passes.folded import Folded, kernel, merged, module_of, plain, read, students, teachers
from ..passes.program import bind
from ..passes.widen import Widened
from ..teacher.fold import Fold
from ..teacher.folding import Chunk
from .facts import Errors, Fact, Law, difference
from .streaming import StreamingTeacher

aten = torch.ops.aten

Tensors = Mapping[str, Tensor]
Call = Callable[[Tensors], Folded]


def fold_errors(teacher: StreamingTeacher, seed: int) -> Errors:
    """How far each branched weight is from both."""
    errors: Errors = {}
    expected, folding = teacher._unfolded(), teacher._folding
    for chunk in folding.fused:
        tensors = dict(zip(chunk.names, chunk.tensors(), strict=True))
        errors |= _errors(_of_chunk(chunk), tensors, chunk.sites, expected, seed)
    for path in folding.singles:
        one: Fold = teacher._net.get_submodule(path)  # type: ignore[assignment]
        name = one.branched.weight
        tensors = {name: teacher.gather(name), f"{path}.scales": one.scales}
        errors |= _errors(_of_single(teacher, one, path), tensors, [name], expected, seed)
    return errors


def _of_chunk(chunk: Chunk) -> Call:
    def call(tensors: Tensors) -> Folded:
        sites, given = tuple(chunk.sites.values()), [tensors[name] for name in chunk.names]
        made = fold(sites, chunk.key, chunk.index, given, teacher=True, student=True)
        folded: dict[str, Tensor] = {}
        for name, (wide, own) in zip(chunk.sites, made, strict=True):
            assert wide is not None
            assert own is not None
            folded |= {teachers(name): wide, students(name): own}
        return folded

    return call


def _of_single(teacher: StreamingTeacher, one: Fold, path: str) -> Call:
    name = one.branched.weight

    def call(tensors: Tensors) -> Folded:
        given = {"scales": tensors[f"{path}.scales"]}
        bias = None if one.branched.bias is None else teacher.gather(one.branched.bias).detach()
        made: Folded = torch.func.functional_call(one, given, (tensors[name], bias))
        return {n: x for n, x in made.items() if n in (merged(name), plain(name))}

    return call


def _errors(
    call: Call, tensors: Tensors, weights: Collection[str], expected: Folded, seed: int
) -> Errors:
    draw = torch.Generator().manual_seed(seed)

    def like(x: Tensor) -> Tensor:  # of rank one: as telling, and drawn sooner
        made = torch.ones((), dtype=torch.float64)
        for size in x.shape:
            made = made.unsqueeze(-1) * torch.randn(size, generator=draw, dtype=torch.float64)
        return made.to(x)

    steps = {n: like(x) for n, x in tensors.items() if n in weights or n.endswith(".scales")}
    for name in steps.keys() - set(weights):
        steps[name][0] = 0  # of the weight itself: the only product of two that move
    given = {n: x.detach().requires_grad_(n in steps) for n, x in tensors.items()}
    with torch.enable_grad():
        folded = call(given)
        errors = {Fact(Law.FOLD, n): difference(expected[n], y.detach()) for n, y in folded.items()}
        cotangents = {n: like(y) for n, y in folded.items()}
        total = torch.stack([(y * cotangents[n]).sum() for n, y in folded.items()]).sum()
    sources = [given[n] for n in steps]
    gradients = torch.autograd.grad(total, sources, materialize_grads=True)
    terms = [g * step for g, step in zip(gradients, steps.values(), strict=True)]
    foretold, size = (sum(float(f(t).sum()) for t in terms) for f in (torch.clone, torch.abs))
    with torch.no_grad():
        other = call({n: x + steps[n] if n in steps else x for n, x in tensors.items()})
        comes = sum(float(((other[n] - folded[n]) * cotangents[n]).sum()) for n in folded)
    fact = Fact(Law.FOLD, f"gradient of {', '.join(weights)}")
    errors[fact] = abs(comes - foretold) / max(size, abs(comes), 1e-300)
    return errors


# --------------------------------------------------------------------------- normalized branches
def branch_errors(program: Widened) -> Errors:
    """Of branches with a norm, which the student does not have and whose scale is zero: each has
    to run exactly as its layer does, with its own weight, and into its norm, and to be added."""
    errors: Errors = {}
    kernels = {
        f"{module_of(one.weight)}.norms.{name}": (one.weight, name)
        for one in program.branched
        for name, branch in one.chosen.named().items()
        if branch.norm
    }
    for graph in program.graphs.values():
        for node in graph.find_nodes(op="call_module"):
            if node.target in kernels:
                weight, name = kernels[node.target]
                fact = Fact(Law.FOLD, f"branch {name} of {weight}")
                alike = _runs_as_its_layer(node, weight, name)
                errors[fact] = max(errors.get(fact, 0.0), 0.0 if alike else math.inf)
    return errors


def _runs_as_its_layer(norm: fx.Node, weight: str, name: str) -> bool:
    """In ``total = layer + norm``, or ``(layer + another norm) + norm``."""
    total, own = next(iter(norm.users), norm), norm.args[0]
    if len(norm.users) != 1 or total.target is not aten.add.Tensor or total.args[1] is not norm:
        return False
    layer: Any = total.args[0]
    while layer.target is aten.add.Tensor and layer.args[1].op == "call_module":
        layer = layer.args[0]
    if own.target is not layer.target or own.target not in LAYERS or len(own.users) != 1:  # type: ignore[union-attr]
        return False
    _, weight_name, bias_name = LAYERS[layer.target]
    mine, its = bind(own), bind(layer)  # type: ignore[arg-type]
    one, other = mine.pop(weight_name), its.pop(weight_name)
    mine.pop(bias_name), its.pop(bias_name)
    if one.target is copies.share and other.target is copies.share:
        if one.args[1:] != other.args[1:] or len(one.users) != 1:
            return False
        one, other = one.args[0], other.args[0]
    reads = [(n.target, n.args[1:]) for n in (one, other)]
    return mine == its and reads == [(read, (n,)) for n in (kernel(weight, name), plain(weight))]

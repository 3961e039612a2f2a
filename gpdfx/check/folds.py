"""The law of the fold: at the start branches add nothing, and every gradient of the fold is right.

A fold is linear in the layer's own weight and in the branches' scales, which begin at zero. So, in
float64 and to the last bits: what it folds to is the weight itself (times its shares); and along
one random direction of weight and scales together, the change that the gradients foretell is the
change that comes. Layers that are alike in all but numbers and sizes have one fold: the smallest
one's is run, of the others weight, scales and the student's part are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import copies
from ..kernels.fold import Site, fold, key_of, owned
from ..passes.branch import LAYERS
from ..passes.folded import Folded, kernel, merged, module_of, plain, read, students, teachers
from ..passes.program import bind
from ..passes.widen import Widened
from ..teacher.fold import Fold
from .facts import Errors, Fact, Law, difference
from .streaming import StreamingTeacher

aten = torch.ops.aten

Tensors = Mapping[str, Tensor]
Call = Callable[[Tensors], Folded]
ORIGIN, SCALES = "origin", "scales"


@dataclass(frozen=True)
class _Layer:
    """The fold of one weight. ``form``: all that it is but for numbers and sizes; ``names``: of
    its tensors, by what the call takes them for; ``site``: if it is in the fused fold."""

    weight: str
    elements: int
    form: Any
    names: Mapping[str, str]
    call: Call
    site: Site | None = None

    def start_error(self, tensors: Tensors, own: Tensor, narrow: Tensor) -> float:
        """Zero if the fold takes this layer's ``own`` weight, its scales are one and zero, and the
        student's part of the weight is the ``narrow`` one."""
        origin, scales = tensors[ORIGIN], tensors.get(SCALES)
        right = torch.equal(origin, own)
        if scales is not None:
            right &= bool((scales[0] == 1).all() and not scales[1:].any())
        if self.site is not None and self.site.cut is not None:
            part = self.site.cut.take(self.site.layer.by_taps(origin), "goi")
            right &= torch.equal(self.site.narrow.store(part), narrow)
        return 0.0 if right else math.inf


def fold_errors(teacher: StreamingTeacher, seed: int) -> Errors:
    """How far each branched weight is from both."""
    errors: Errors = {}
    tried, expected = set[Any](), teacher._unfolded()
    for one in sorted(_layers(teacher), key=lambda one: one.elements):
        tensors = {key: teacher._folding.read(name).detach() for key, name in one.names.items()}
        own, narrow = teacher.gather(one.weight), teacher._given[one.weight]
        errors[Fact(Law.FOLD, one.weight)] = one.start_error(tensors, own, narrow)
        if one.weight in teacher.folded if one.site else one.form not in tried:
            tried.add(one.form)
            errors |= _errors(one, tensors, expected, seed)
    return errors


def _layers(teacher: StreamingTeacher) -> Iterator[_Layer]:
    folding = teacher._folding
    for chunk in folding.alone:
        layers = owned(tuple(chunk.sites.values()), [chunk.names[k] for k in chunk.index])
        for weight, (site, names) in zip(chunk.sites, layers, strict=True):
            keys = [ORIGIN, *([SCALES] if site.terms else [])]
            keys += [f"{k}" for k in range(len(keys), site.size)]
            call = partial(_of_site, weight, site)
            named = dict(zip(keys, names, strict=True))
            yield _Layer(weight, site.layer.elements, site.form, named, call, site)
    for path in folding.singles:
        fold: Fold = teacher._net.get_submodule(path)  # type: ignore[assignment]
        one = fold.branched
        form = one.chosen, one.bias is None, one.layer.layout, one.layer.kernel
        named = {ORIGIN: one.weight, SCALES: f"{path}.scales"}
        call = partial(_of_single, teacher, fold)
        yield _Layer(one.weight, one.layer.elements, form, named, call)


def _of_site(weight: str, site: Site, tensors: Tensors) -> Folded:
    index, given = tuple(range(site.size)), list(tensors.values())
    ((wide, own),) = fold((site,), key_of((site,)), index, given, teacher=True, student=True)
    assert wide is not None
    assert own is not None
    return {teachers(weight): wide, students(weight): own}


def _of_single(teacher: StreamingTeacher, one: Fold, tensors: Tensors) -> Folded:
    weight, bias = one.branched.weight, one.branched.bias
    shift = None if bias is None else teacher.gather(bias).detach()
    given = {"scales": tensors[SCALES]}
    made: Folded = torch.func.functional_call(one, given, (tensors[ORIGIN], shift))
    return {n: x for n, x in made.items() if n in (merged(weight), plain(weight))}


def _errors(layer: _Layer, tensors: Tensors, expected: Folded, seed: int) -> Errors:
    draw = torch.Generator().manual_seed(seed)

    def like(x: Tensor) -> Tensor:  # of rank one: as telling, and drawn sooner
        made = torch.ones((), dtype=torch.float64)
        for size in x.shape:
            made = made.unsqueeze(-1) * torch.randn(size, generator=draw, dtype=torch.float64)
        return made.to(x)

    steps = {key: like(x) for key, x in tensors.items() if key in (ORIGIN, SCALES)}
    if SCALES in steps:
        steps[SCALES][0] = 0  # of the weight itself: the only product of two that move
    given = {key: x.detach().requires_grad_(key in steps) for key, x in tensors.items()}
    with torch.enable_grad():
        folded = layer.call(given)
        errors = {Fact(Law.FOLD, n): difference(expected[n], y.detach()) for n, y in folded.items()}
        cotangents = {n: like(y) for n, y in folded.items()}
        total = torch.stack([(y * cotangents[n]).real.sum() for n, y in folded.items()]).sum()
    sources = [given[key] for key in steps]
    gradients = torch.autograd.grad(total, sources, materialize_grads=True)
    terms = [(g.conj() * step).real for g, step in zip(gradients, steps.values(), strict=True)]
    foretold, size = (sum(float(f(t).sum()) for t in terms) for f in (torch.clone, torch.abs))
    with torch.no_grad():
        other = layer.call(
            {key: x + steps[key] if key in steps else x for key, x in tensors.items()}
        )
        comes = sum(float(((other[n] - folded[n]) * cotangents[n]).real.sum()) for n in folded)
    fact = Fact(Law.FOLD, f"gradient of {layer.weight}")
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

"""The law of the fold: at the start branches add nothing, and every gradient of the fold is right.

A fold is linear in the layer's own weight and in the branches' scales, which begin at zero. So, in
float64 and to the last bits: what it folds to is the weight itself (times its shares); and along
one random direction of weight and scales together, the change that the gradients foretell is the
change that comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from ..kernels.fold import fold
from ..passes.folded import Folded, merged, plain, students, teachers
from ..teacher.fold import Fold
from ..teacher.folding import Chunk
from .facts import Errors, Fact, Law, difference, floating
from .observe import observe, projection
from .streaming import StreamingTeacher
from .visit import Pair

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

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)

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
STEP = 1e-4


def norm_error(pair: Pair, gradients: str) -> float:
    """How far the gradients of the norms of branches, which the student has not, are from what a
    small step along them does to the outputs in train mode; 0 where there are no such branches."""
    teacher = pair.teacher.train()
    norms = {
        f"{path}.{name}": p
        for path in teacher._folds.values()
        for name, p in teacher._net.get_submodule(path).norms.named_parameters()  # type: ignore[union-attr]
    }
    if not norms or gradients == "none":
        return 0.0
    draw = torch.Generator().manual_seed(pair.seed)
    steps = {n: torch.randn(p.shape, generator=draw).to(p) * STEP for n, p in norms.items()}
    for p in norms.values():
        p.requires_grad_()
    seen = observe(teacher, pair.inputs, pair.seed, "parameters", parameters=norms)
    found = {f.which: x for f, x in seen.items() if f.law is Law.PARAMETERS}
    foretold = sum(float((found[n] * step).sum()) for n, step in steps.items() if n in found)
    totals = []
    for sign in (1, -2, 1):  # there, to the other side, and back
        with torch.no_grad():
            for name, p in norms.items():
                p.add_(steps[name].to(p), alpha=sign)
        totals.append(_total(pair))
    comes = (totals[0] - totals[1]) / 2
    for p in norms.values():
        p.requires_grad_(False).zero_()
    return abs(comes - foretold) / max(abs(comes), abs(foretold), 1e-300)


def _total(pair: Pair) -> float:
    """The projection whose gradients ``observe`` takes."""
    teacher = pair.teacher
    with torch.enable_grad():
        seen = observe(teacher, pair.inputs, pair.seed, "parameters")
    outputs = {f: x for f, x in seen.items() if f.law is Law.OUTPUTS and isinstance(f.which, int)}
    return float(
        projection({f: x.requires_grad_(floating(x)) for f, x in outputs.items()}, pair.seed)
    )

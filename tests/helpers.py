"""What several test files need to look inside a teacher and its making."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpdfx.algebra.frozen import Frozen
from gpdfx.calls import tree
from gpdfx.check import laws
from gpdfx.check.certificate import Check
from gpdfx.compiler import compile_program
from gpdfx.control import ExpandOptions, make_control
from gpdfx.passes.widen import Widened
from gpdfx.teacher.compiled import Compiled, Facts, Inputs, Python, find_caches
from gpdfx.teacher.folding import Folding
from gpdfx.teacher.module import Teacher


def thinned(every: Iterable[tuple[Any, ...]], usual: Collection[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test, of which those that are not usual make it slow."""
    return [pytest.param(*x, marks=() if x in usual else pytest.mark.slow) for x in every]


def program_of(
    model: nn.Module, call: Inputs, ratio: Any = 2.0, *, branches: Any = None, **options: Any
) -> Widened:
    """What the passes make of a model, for a call of it."""
    control = make_control(model, ratio, branches=branches)
    return compile_program(model, call, ExpandOptions(control, **options))


def with_branches(program: Widened, branches: Any) -> Widened:
    """The same program for other branches."""
    from gpdfx import passes
    from gpdfx.passes.widen import widen

    control = make_control(program.student, 2, branches=branches)
    control = replace(program.options.control, branches=control.branches)
    program = replace(program, options=replace(program.options, control=control))
    made: Widened = passes.run(program, passes.PASSES[passes.PASSES.index(widen) :])
    return made


def verify(program: Widened, call: Inputs) -> Check:
    """The check that ``expand`` makes."""
    return laws.verify(compiled(program, call))


def teacher_of(program: Widened, call: Inputs) -> Teacher:
    """A teacher without a report."""
    return Teacher(compiled(program, call))


def compiled(program: Widened, call: Inputs) -> Compiled:
    """What a teacher is made from."""
    return Compiled.of(program, call, Python(find_caches(program.student, call)))


def facts(teacher: Teacher) -> Facts:
    """What a teacher knows of its making: maps, ties, shares."""
    return teacher._facts


def summed(grad: Tensor, maps: tuple[Frozen, ...]) -> Tensor:
    """A gradient of the teacher's parameter, added up over the copies of each index."""
    for dim, axis in enumerate(maps):
        shape = (*grad.shape[:dim], axis.student, *grad.shape[dim + 1 :])
        grad = grad.new_zeros(shape).index_add(dim, torch.from_numpy(axis.map), grad)
    return grad


def folding(teacher: Teacher) -> Folding:
    """What folds its branches."""
    return teacher._folding


def parts(teacher: Teacher) -> dict[str, Any]:
    """Its captured parts, by the path of the student's module."""
    return teacher._parts


def hidden_student(teacher: Teacher) -> nn.Module:
    """The user's module, without values of its own."""
    return teacher._student


def python_shell(teacher: Teacher) -> nn.Module | None:
    """The user's Python between its parts."""
    return teacher._code.shell


def run_teacher(teacher: Teacher, folded: Any, *args: Any, features: Any = None) -> Any:
    """A call on given folded weights; ``features``: takes those that were asked for."""
    return teacher._run_teacher(folded, args, {}, features)


def trains_as(
    model: nn.Module, teacher: Teacher, *inputs: Any, who: str = "both", rtol: float = 1e-4
) -> None:
    """Assert that teacher and student give what the model gives: the outputs of one call, the
    gradients of a projection of them with respect to every parameter, and the buffers after it."""
    for run in (teacher, teacher.student) if who == "both" else (getattr(teacher, who, teacher),):
        own = copy.deepcopy(model)
        own.train(model.training)
        results = []
        for network in (own, run):
            torch.manual_seed(0)
            outputs = [y for y in tree.leaves(network(*inputs)) if isinstance(y, Tensor)]
            draw = torch.Generator().manual_seed(1)
            total = sum((y * torch.randn(y.shape, generator=draw)).sum() for y in outputs)
            total.backward()  # type: ignore[union-attr]
            results.append([y.detach() for y in outputs])
        torch.testing.assert_close(*results, rtol=rtol, atol=1e-5)
        wide = dict(teacher.named_parameters())
        scale = max(float(p.grad.abs().max()) for p in own.parameters() if p.grad is not None)
        for name, p in own.named_parameters():
            got = wide[name].grad
            assert (p.grad is None) == (got is None), name
            if p.grad is not None and got is not None:
                folded = summed(got, facts(teacher).maps_of(name))
                gap = float((folded - p.grad).abs().max())
                assert gap <= rtol * scale, f"{name}: {gap:.1e} of {scale:.1e}"
        teacher.zero_grad()

"""Free sizes: at which other input sizes than the example's the teacher is still the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..passes.capture.limits import LEVELS
from ..teacher.captured import Section
from .compare import Pair
from .locate import call_of, calls_of
from .observe import difference, keep_rng, observe


def free_levels(pair: Pair, limit: float) -> dict[str, str]:
    """At which level the parts of the teacher, in eval mode, follow the student to other sizes."""
    student, parts = pair.copy().eval(), pair.teacher._parts
    pair.teacher.eval()
    calls = calls_of(student, list(parts), pair.inputs)
    free = {}
    for path, part in parts.items():
        module, called = student.get_submodule(path), calls.get(path, [])
        sections = [s for s in part.sections if not s.training] or part.sections
        levels = [_level(pair, module, s, call_of(s, called), 100 * limit) for s in sections]
        free[path] = max(levels, key=LEVELS.index)
    return free


def _level(pair: Pair, module: nn.Module, section: Section, flat: Any, limit: float) -> str:
    """The first level at which both agree in the first size that the student can have."""
    for level in LEVELS[:-1] if flat else ():
        sizes = section.sizes.elsewhere(flat, level, section.call.names)
        verdicts = (_agree(pair, module, section, moved, limit) for moved in sizes)
        if next((agree for agree in verdicts if agree is not None), False):
            return level
    return LEVELS[-1]


def _agree(
    pair: Pair, module: nn.Module, section: Section, flat: list[Any], limit: float
) -> bool | None:
    """Whether the teacher follows; ``None`` if the student does not run on these tensors."""
    inputs, teacher = section.call.unflatten(flat), pair.teacher
    folded = teacher._fold()

    def run(*args: Any, **kwargs: Any) -> Any:
        return section(teacher._net, folded, section.flatten(args, kwargs))

    with torch.no_grad(), keep_rng():
        try:
            expected = observe(module, inputs, pair.seed)
        except Exception:  # a size that the student cannot have: try another
            return None
        try:
            got = observe(run, inputs, pair.seed)
        except Exception:  # the graph is not free in this size, whatever capture said
            return False
    return all(difference(x, got.get(fact)) <= limit for fact, x in expected.items())

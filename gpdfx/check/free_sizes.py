"""Free sizes: at which other input sizes than the example's the teacher is still the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..passes.capture.limits import LEVELS
from ..teacher.captured import Section
from ..teacher.module import Teacher
from .locate import call_of, calls_of
from .observe import difference, keep_rng, observe


def free_levels(
    student: nn.Module, twin: Teacher, inputs: tuple[Any, Any], seed: int, limit: float
) -> dict[str, str]:
    """At which level the parts of the teacher, in eval mode, follow the student to other sizes."""
    student.eval()
    twin.eval()
    found = {}
    calls = calls_of(student, list(twin._parts), inputs)
    for path, part in twin._parts.items():
        sections = [s for s in part.sections if not s.training] or part.sections
        levels = [
            _free_section(student.get_submodule(path), section, twin, call, seed, limit)
            for section, call in ((s, call_of(s, calls.get(path, []))) for s in sections)
        ]
        found[path] = max(levels, key=LEVELS.index)
    return found


def _free_section(
    module: nn.Module, section: Section, twin: Teacher, flat: Any, seed: int, limit: float
) -> str:
    def run(*args: Any, **kwargs: Any) -> Any:
        return section(twin._net, twin._fold(), section.flatten(args, kwargs))

    sizes = section.sizes
    for level in LEVELS[:-1] if flat else ():
        for moved in sizes.elsewhere(flat, level, section.call.names):
            args, kwargs = section.call.unflatten(moved)
            with torch.no_grad(), keep_rng():
                try:
                    mine = observe(module, args, kwargs, seed)
                except Exception:  # a size that the student cannot have: try another
                    continue
                try:
                    theirs = observe(run, args, kwargs, seed)
                except Exception:  # the graph is not free in this size, whatever capture said
                    break
            if all(difference(x, theirs.get(n)) <= 100 * limit for n, x in mine.items()):
                return level
            break
    return LEVELS[-1]

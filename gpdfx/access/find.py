"""The teacher in what a training loop holds: a ``GPD``, an average of it, or it wrapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import InputError
from ..teacher.module import Teacher

WRAPPERS = ("_orig_mod", "module")
"""Attributes in which ``torch.compile``, and DDP, ``AveragedModel`` and timm's averages keep it."""
OF_GPD = "teacher."
"""Before a teacher's names in the state of a ``GPD``."""


def unwrapped(given: Any) -> Any:
    """What a module wraps."""
    while not isinstance(given, Teacher):
        inside = (getattr(given, name, None) for name in WRAPPERS)
        inner = next((x for x in inside if isinstance(x, nn.Module)), None)
        if inner is None:
            break
        given = inner
    return given


def find_teacher(what: str, given: Any) -> Teacher:
    """The teacher that is, or is in, what ``what`` was given. Raises ``InputError`` if none is."""
    owner = unwrapped(given)
    teacher = owner if isinstance(owner, Teacher) else unwrapped(getattr(owner, "teacher", None))
    if not isinstance(teacher, Teacher):
        raise InputError(
            f"{what} takes a teacher, not {type(given).__name__}",
            remedy="pass what gpdfx.expand returned, a gpdfx.GPD, or an average of one",
        )
    return teacher


def prefix_of(given: Any) -> str:
    """What stands before a teacher's names in the state of what a loop holds, unwrapped."""
    return "" if isinstance(unwrapped(given), Teacher) else OF_GPD

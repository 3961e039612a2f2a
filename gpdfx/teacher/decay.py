"""What of a teacher decays, and which layer of its student a parameter belongs to.

``teacher``: a ``Teacher``, which asks this of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .. import torch_private
from ..passes.folded import PREFIX

NORMS: tuple[type[nn.Module], ...] = (*torch_private.NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def student_name(teacher: Any, name: str) -> str:
    """The student's parameter that one of a teacher's is, or is a branch of, or stands for."""
    own = f"{teacher._own_name}."
    if name.startswith(own):
        return name.removeprefix(own)
    if not name.startswith(f"{PREFIX}."):
        return name
    inside = name.removeprefix(f"{PREFIX}.")
    return max((w for w in teacher._folds if inside.startswith(f"{w}.")), key=len, default=name)


def undecayed(teacher: Any) -> set[str]:
    """Vectors and scalars, biases, parameters of norms, scales of branches, and whatever is, or is
    a branch of, what the student's modules name in their ``no_weight_decay()``."""
    student = teacher._student
    left: list[str] = []
    for path, module in student.named_modules():
        before = f"{path}." if path else ""
        if isinstance(module, NORMS):
            left += [before + name for name, _ in module.named_parameters(recurse=False)]
        if callable(named := getattr(module, "no_weight_decay", None)):
            left += [before + name for name in named()]

    def is_left(name: str) -> bool:
        scale = name.startswith(PREFIX) and name.endswith(".scales")
        return scale or any(fnmatchcase(student_name(teacher, name), one) for one in left)

    return {
        name
        for name, p in teacher.named_parameters()
        if p.ndim < 2 or name.split(".")[-1] == "bias" or is_left(name)
    }


def layers_of(teacher: Any) -> dict[str, int] | None:
    """The student's parameters -> the layer, from the input on, that its ``group_matcher`` (a
    protocol of timm's) puts them in; ``None`` where it has none."""
    student = teacher._student
    if not callable(matcher := getattr(student, "group_matcher", None)):
        return None
    from timm.models import group_parameters

    return group_parameters(student, matcher(coarse=False), reverse=True)  # type: ignore[no-any-return]


def matcher_of(teacher: Any, prefix: str = "") -> Callable[..., Any]:
    """``group_matcher`` of timm's protocol for a teacher's names, behind a prefix. Raises
    ``AttributeError`` where the student has none."""
    layers = layers_of(teacher)
    if layers is None:
        raise AttributeError(f"{type(teacher._student).__name__} has no group_matcher")
    last = max(layers.values())

    def layer(name: str) -> int:
        return layers.get(student_name(teacher, name.removeprefix(prefix)), last)

    return lambda coarse=False: layer

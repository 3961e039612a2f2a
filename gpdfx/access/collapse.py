"""Collapse: the plain student out of a teacher (channel-branch reparameterization, CBR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..passes.program import duplicate
from ..teacher.module import Teacher
from .find import find_teacher


def collapse(teacher: nn.Module) -> nn.Module:
    """The plain student: the user's own class, state_dict keys and ties, trained values.

    Parameters are the first copies of the teacher's, bit for bit; buffers are those the student
    gathered itself. The teacher is unchanged and shares no memory with the result.

    ``teacher``: a teacher, or what holds one: a ``GPD``, an average of either (``AveragedModel``,
    timm's ``ModelEmaV3``), any of them compiled or wrapped for data parallelism.
    """
    found = find_teacher("collapse", teacher)
    return filled(found, found._student)


@torch.no_grad()
def filled(teacher: Teacher, like: nn.Module) -> nn.Module:
    """A copy of a student without values (``like``) with the teacher's."""
    made: dict[int, Any] = {}
    empty = dict(like.named_parameters())
    for name, derived in teacher.student_parameters():
        p = empty[name]
        own = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=derived.device)
        made[id(p)] = nn.Parameter(own.copy_(derived), requires_grad=p.requires_grad)
    plain = duplicate(like, made)
    buffers = teacher._student_buffers()
    for name, buffer in plain.named_buffers():
        buffer.copy_(buffers[name])
    return plain

"""Collapse: the plain student out of a teacher (channel-branch reparameterization, CBR)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..calls import sharded
from ..calls.held import has_gradient
from ..passes.program import duplicate
from ..teacher.module import Teacher
from ..torch_private import BATCH_NORMS
from .find import find_teacher, unwrapped


def collapse(teacher: nn.Module, *, average: bool | None = None) -> nn.Module:
    """The plain student: the user's own class, state_dict keys and ties, trained values.

    Parameters are the first copies of the teacher's, bit for bit; buffers are those the student
    gathered itself. The teacher is unchanged and shares no memory with the result.

    Args:
        teacher: a teacher, or what holds one: a ``GPD``, an average of either (``AveragedModel``,
            timm's ``ModelEmaV3``), any of them compiled or wrapped for data parallelism.
        average: give every process the same student where each has statistics of its own batches:
            their mean, and the largest of what is counted (a collective: call it on all). If false,
            each takes its own; if not given, it does so with a warning.
    """
    found = find_teacher("collapse", teacher)
    sharded.release(unwrapped(teacher))
    plain = filled(found, found._student)
    if average:
        _average(plain)
    elif average is None and _world() > 1:
        _warn_of_statistics(plain)
    return plain


@torch.no_grad()
def filled(teacher: Teacher, like: nn.Module) -> nn.Module:
    """A copy of a student without values (``like``) with the teacher's."""
    made: dict[int, Any] = {}
    empty = dict(like.named_parameters())
    with teacher._settled():
        for name, derived in teacher.student_parameters():
            p = empty[name]
            own = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=derived.device)
            made[id(p)] = nn.Parameter(own.copy_(derived), requires_grad=p.requires_grad)
    plain = duplicate(like, made)
    buffers = teacher._student_buffers()
    for name, buffer in plain.named_buffers():
        buffer.copy_(buffers[name])
    return plain


# --------------------------------------------------------------------------- several processes
def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _average(plain: nn.Module) -> None:
    """Give all processes the mean of floating-point buffers, and the largest of other ones."""
    for buffer in plain.buffers() if _world() > 1 else ():
        if has_gradient(buffer):
            dist.all_reduce(buffer)
            buffer /= _world()
        else:
            dist.all_reduce(buffer, dist.ReduceOp.MAX)


def _warn_of_statistics(plain: nn.Module) -> None:
    """Say that other processes may have another student; once, as Python warns."""
    for path, norm in plain.named_modules():
        own = isinstance(norm, BATCH_NORMS) and not isinstance(norm, nn.SyncBatchNorm)
        if own and norm.running_mean is not None:
            warnings.warn(
                f"the statistics of {path} are of the batches of this process alone; "
                "collapse(..., average=True), called on every process, takes their mean",
                stacklevel=3,
            )
            return

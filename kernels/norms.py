"""Batch norm over the batches of all processes, as ``nn.SyncBatchNorm`` has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..torch_private import can_synchronize, norms_are_local, synchronized_batch_norm


def synchronized(
    op: Any,
    norm: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> Any:
    """``op``, a batch norm of ATen's that a ``SyncBatchNorm`` called: its arguments, its results.
    ``norm``: knows the module's process group."""
    given = x, weight, bias, mean, var, training, momentum, eps, *rest
    if norms_are_local() or not (dist.is_available() and dist.is_initialized()):
        return op(*given)
    group = norm.process_group or dist.group.WORLD
    if (world := dist.get_world_size(group)) == 1:
        return op(*given)
    if not can_synchronize(x):
        raise InputError(
            f"PyTorch has no SyncBatchNorm on {x.device.type}, in training on several processes",
            remedy="train on GPUs, or keep nn.BatchNorm in the model",
        )
    if op is torch.ops.aten.batch_norm.default:
        return synchronized_batch_norm(x, weight, bias, mean, var, eps, momentum, group, world)
    mean, var = (None if one is None else one.clone() for one in (mean, var))  # functional
    y = synchronized_batch_norm(x, weight, bias, mean, var, eps, momentum, group, world)
    return y, None, None, mean, var

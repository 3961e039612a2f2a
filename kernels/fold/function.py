"""The fold of many layers as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .op import fold_op
from .site import Site, owned, pairs

_KINDS = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "maia", "xla")
_CASTING = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))
"""Devices with autocast: found out here, for compilers of torch 2.11 cannot."""

Weights = tuple[Tensor | None, Tensor | None]
"""The teacher's and the student's."""


def fold(
    sites: tuple[Site, ...],
    key: str,
    index: tuple[int, ...],
    tensors: Sequence[Tensor],
    *,
    teacher: bool,
    student: bool,
) -> list[Weights]:
    """The weights of all ``sites``, as far as they are asked for.

    ``key``: ``key_of`` the sites. ``index``: which of ``tensors`` are those of the sites, one
    site after the other. Nothing is kept for the backward but these tensors. On the GPU it is the
    operator ``gpdfx::fold``, elsewhere a node of autograd over plain torch, which costs less to
    call than an operator, and whose gradients can be differentiated again.
    """
    half = _autocast(tensors[0].device.type)
    if tensors[0].is_cuda:
        made = fold_op(list(tensors), list(index), key, teacher, student, half)
    else:
        made = _Fold.apply(sites, index, teacher, student, half, *tensors)
    found = pairs(sites, made, teacher, student)
    if not (teacher and student):
        return found
    return [
        (wide, own if site.distinct else wide)
        for site, (wide, own) in zip(sites, found, strict=True)
    ]


def _autocast(kind: str) -> torch.dtype | None:
    """The type of products under autocast, if it is on."""
    if kind in _CASTING and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        sites: tuple[Site, ...],
        index: tuple[int, ...],
        teacher: bool,
        student: bool,
        half: torch.dtype | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for site, own in owned(sites, index, tensors):
            made += reference.listed(site, *reference.forward(site, own, teacher, student))
        return tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sites, ctx.index, ctx.teacher, ctx.student, ctx.half, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        frozen = _frozen(ctx.sites, ctx.index, tensors)
        if any(frozen):
            made = pairs(ctx.sites, output, ctx.teacher, ctx.student)
            still = [w for pair, fixed in zip(made, frozen, strict=True) if fixed for w in pair]
            ctx.mark_non_differentiable(*(w for w in still if w is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if ctx.half is None:
            found = _backward(ctx, tensors, grads)
        else:  # products in the type that they had in the forward
            with torch.autocast(tensors[0].device.type, ctx.half):
                found = _backward(ctx, tensors, grads)
        needed = ctx.needs_input_grad[5:]
        return (
            *(None, None, None, None, None),
            *(g if need else None for g, need in zip(found, needed, strict=True)),
        )


def _frozen(sites: Sequence[Site], index: Sequence[int], tensors: Sequence[Tensor]) -> list[bool]:
    """Which sites have no tensor that takes a gradient."""
    return [not any(t.requires_grad for t in own) for _, own in owned(sites, index, tensors)]


def _backward(
    ctx: Any, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(tensors)
    given = pairs(ctx.sites, grads, ctx.teacher, ctx.student)
    at = 0
    for (site, own), pair in zip(owned(ctx.sites, ctx.index, tensors), given, strict=True):
        for grad in reference.backward(site, own, *pair):
            if grad is not None:  # only constants belong to several sites
                found[ctx.index[at]] = grad
            at += 1
    return found

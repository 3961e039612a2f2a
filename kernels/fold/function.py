"""The fold of many layers as one node of autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .site import Site

Weights = tuple[Tensor | None, Tensor | None]
"""The teacher's and the student's."""


def fold(
    sites: tuple[Site, ...],
    index: tuple[int, ...],
    tensors: Sequence[Tensor],
    *,
    teacher: bool,
    student: bool,
) -> list[Weights]:
    """The weights of all layers, as far as they are asked for.

    ``index``: which of ``tensors`` are those of the sites, one site after the other. Nothing is
    kept for the backward but these tensors. Autograd sees one node; its gradients can be
    differentiated again.
    """
    made = list(_Fold.apply(sites, index, teacher, student, *tensors))
    found: list[Weights] = []
    for site in sites:
        wide = made.pop(0) if teacher else None
        own = made.pop(0) if student and (site.distinct or not teacher) else wide
        found.append((wide, own if student else None))
    return found


def _each(
    sites: tuple[Site, ...], index: tuple[int, ...], tensors: Sequence[Tensor]
) -> Iterator[tuple[Site, list[Tensor]]]:
    """Every site with its tensors."""
    at = 0
    for site in sites:
        yield site, [tensors[k] for k in index[at : at + site.size]]
        at += site.size


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        sites: tuple[Site, ...],
        index: tuple[int, ...],
        teacher: bool,
        student: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for site, own in _each(sites, index, tensors):
            wide, narrow = reference.forward(site, own, teacher, student)
            made += [] if wide is None else [wide]
            made += [] if narrow is None or not (site.distinct or wide is None) else [narrow]
        return tuple(made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sites, ctx.index, ctx.teacher, ctx.student, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.half = _autocast(tensors[0].device.type)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if ctx.half is None:
            found = _backward(ctx, tensors, grads)
        else:  # products in the type that they had in the forward
            with torch.autocast(tensors[0].device.type, ctx.half):
                found = _backward(ctx, tensors, grads)
        needed = ctx.needs_input_grad[4:]
        return (
            *(None, None, None, None),
            *(g if need else None for g, need in zip(found, needed, strict=True)),
        )


def _autocast(kind: str) -> torch.dtype | None:
    """The type of products under autocast, if it is on."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _backward(
    ctx: Any, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(tensors)
    rest = list(grads)
    at = 0
    for site, own in _each(ctx.sites, ctx.index, tensors):
        wide = rest.pop(0) if ctx.teacher else None
        both = ctx.teacher and not site.distinct
        narrow = rest.pop(0) if ctx.student and not both else None
        for grad in reference.backward(site, own, wide, narrow):
            if grad is not None:  # only constants belong to several sites
                found[ctx.index[at]] = grad
            at += 1
    return found

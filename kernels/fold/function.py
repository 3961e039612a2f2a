"""The fold of many layers as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...torch_private import is_exporting
from . import reference
from .op import by_kernels, by_operator, plainly, sizes_of, taken
from .site import Site, key_of, owned

KERNELS = {"cuda"}
"""Devices with kernels."""
TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types that they read."""


def fold(
    sites: Sequence[Site],
    key: str,
    index: tuple[int, ...],
    tensors: Sequence[Tensor],
    *,
    teacher: bool,
    student: bool,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The weights of all ``sites``, the teacher's and the student's, as far as they are asked for;
    one tensor for both where these are not distinct.

    ``key``: ``key_of`` the sites. ``index``: which of ``tensors`` are those of the sites, one site
    after the other. Nothing is kept for the backward but these tensors. Where there are kernels,
    they fold what they can (``refusal``); else plain torch does. Compilers are given operators
    either way, for they take longer over the many small ops of folds than over the networks; what
    is exported has none.
    """
    kind, kept = tensors[0].device.type, (tensors[0].dtype, torch.int64, torch.int32)
    asked = teacher, student, reference.autocast_type(kind)
    can = kind in KERNELS and kept[0] in TYPES and all(t.dtype in kept for t in tensors)
    fused = taken(key, teacher) if can else (False,) * len(sites)
    made: Sequence[Tensor | None]
    if len({*fused}) > 1:
        made = _in_two(sites, fused, [tensors[k] for k in index], asked)
    elif is_exporting():
        each = owned(sites, [tensors[k] for k in index])
        made = [w for one in each for w in reference.plain(*one, teacher, student)]
    else:
        made = _Fold.apply(key, index, fused[0], *asked, *tensors)
    pairs = list(zip(made[::2], made[1::2], strict=True))
    if not (teacher and student):
        return pairs
    return [(wide, wide if own is None else own) for wide, own in pairs]


def _in_two(
    sites: Sequence[Site], fused: Sequence[bool], tensors: Sequence[Tensor], asked: Any
) -> list[Tensor | None]:
    """Some by kernels, the others without."""
    each = list(zip(owned(sites, tensors), fused, strict=True))
    made = {}
    for kernels in (True, False):
        some = [one for one, own in each if own == kernels]
        key = key_of(tuple(site for site, _ in some))
        flat = [t for _, own in some for t in own]
        made[kernels] = iter(_Fold.apply(key, tuple(range(len(flat))), kernels, *asked, *flat))
    return [next(made[own]) for own in fused for _ in range(2)]


def _without_kernels(grads: Any, *given: Any) -> list[Tensor | None]:
    if torch.compiler.is_compiling():
        return by_operator(grads, *given, False)
    return plainly(grads, *given)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        key: str,
        index: tuple[int, ...],
        kernels: bool,
        teacher: bool,
        student: bool,
        half: torch.dtype | None,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        given = [tensors[k] for k in index], key, teacher, student, half
        if kernels:
            return tuple(by_kernels(None, *given))
        return tuple(_without_kernels(None, *given))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rest = key, index, *_ = inputs[:6]
        ctx.save_for_backward(*inputs[6:])
        ctx.set_materialize_grads(False)
        at, still = 0, []
        for k, size in enumerate(sizes_of(key)):
            if not any(inputs[6 + n].requires_grad for n in index[at : at + size]):
                still += [w for w in output[2 * k : 2 * k + 2] if w is not None]
            at += size
        ctx.mark_non_differentiable(*still)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, (key, index, kernels, *asked) = ctx.saved_tensors, ctx.rest
        given, twice = ([tensors[k] for k in index], key, *asked), torch.is_grad_enabled()
        if twice:
            made = plainly(grads, *given, back=reference.back_plainly)
        elif kernels:
            made = by_kernels(grads, *given)
        else:
            made = _without_kernels(grads, *given)
        found, needed = [None] * len(tensors), ctx.needs_input_grad[6:]
        for k, grad in zip(index, made, strict=True):
            if grad is not None and needed[k]:  # of one site: it is no constant
                found[k] = grad
        return *[None] * 6, *found

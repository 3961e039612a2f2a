"""The fold of many layers as one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...torch_private import is_fake
from . import reference
from .op import autocast, backward_op, fold_op, layout_of, run, sizes_of, taken
from .site import Site, key_of, owned, sites_of, viewed

_KINDS = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "maia", "xla")
_CASTING = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))
"""Devices with autocast: found out here, for compilers of torch 2.11 cannot."""
KERNELS = {"cuda"}
"""Devices with kernels."""


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
    they fold what they can (``refusal``); else plain torch does, and compilers fold in their own
    way.
    """
    kind = tensors[0].device.type
    casts = kind in _CASTING and torch.is_autocast_enabled(kind)
    asked = teacher, student, torch.get_autocast_dtype(kind) if casts else None
    fused = taken(key, teacher) if kind in KERNELS else (False,) * len(sites)
    made: Sequence[Tensor | None]
    if any(fused) and not all(fused):
        made = _in_two(sites, fused, [tensors[k] for k in index], asked)
    elif any(fused) or not torch.compiler.is_compiling():
        made = _Fold.apply(key, index, any(fused), *asked, *tensors)
    else:
        each = owned(sites, [tensors[k] for k in index])
        made = [w for one in each for w in reference.plain(*one, teacher, student)]
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
        own = [tensors[k] for k in index]
        if not kernels:
            each = owned(sites_of(key), own)
            return tuple(x for one in each for x in reference.forward(*one, teacher, student))
        if torch.compiler.is_compiling() or is_fake(own[0]):
            flat = fold_op(own, key, teacher, student, half)
            return tuple(viewed(flat, layout_of(own, key, teacher, student)[0][1]))
        return tuple(run(None, own, key, teacher, student, half))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        key, index, ctx.kernels, *asked = inputs[:6]
        ctx.rest = key, index, *asked
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
        tensors, (key, index, *asked) = ctx.saved_tensors, ctx.rest
        own, twice = [tensors[k] for k in index], torch.is_grad_enabled()
        if twice or not ctx.kernels:
            back = _back_plainly if twice else reference.backward
            each, back_of = owned(sites_of(key), own), zip(grads[::2], grads[1::2], strict=True)
            with autocast(own[0], asked[2]):
                both = zip(each, back_of, strict=True)
                made = [grad for (site, its), pair in both for grad in back(site, its, *pair)]
        elif torch.compiler.is_compiling() or is_fake(own[0]):
            flat = backward_op(list(grads), own, key, *asked)
            made = viewed(flat, layout_of(own, key, asked[0], asked[1])[1][1])
        else:
            made = run(list(grads), own, key, *asked)
        found, needed = [None] * len(tensors), ctx.needs_input_grad[6:]
        for k, grad in zip(index, made, strict=True):
            if grad is not None and needed[k]:  # of one site: it is no constant
                found[k] = grad
        return *[None] * 6, *found


def _back_plainly(
    site: Site, tensors: Sequence[Tensor], teacher: Tensor | None, student: Tensor | None
) -> list[Tensor | None]:
    """``reference.backward``, whose result has gradients."""
    found: list[Tensor | None] = [None] * site.size
    grads = [g for g in (teacher, student) if g is not None]
    trained = [k for k, trains in enumerate(site.differentiable()) if trains]

    def call(*own: Tensor) -> list[Tensor]:
        given = dict(enumerate(tensors)) | dict(zip(trained, own, strict=True))
        made = reference.plain(site, list(given.values()), teacher is not None, student is not None)
        return [w for w in made if w is not None]

    if grads:
        back: Any = torch.func.vjp(call, *(tensors[k] for k in trained))[1]
        for k, grad in zip(trained, back(grads), strict=True):
            found[k] = grad
    return found

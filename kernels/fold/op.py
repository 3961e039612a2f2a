"""The fold by Triton kernels or in plain torch, as operators of PyTorch that compilers call.

All weights come in one flat tensor, and so do all gradients. Tensors are those of the sites, one
site after the other; these come by their key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...torch_private import constant_result, is_fake
from . import reference
from .site import Tensors, owned, places, refusal, sites_of, viewed

Grads = Sequence[Tensor | None]


def constant(function: Callable[..., Any]) -> Any:
    """Remembered, and for compilers a constant."""
    cached = lru_cache(maxsize=512)(function)
    return constant_result(lambda *given: cached(*given))


@constant
def sizes_of(key: str) -> tuple[int, ...]:
    """How many tensors each site has."""
    return tuple(site.size for site in sites_of(key))


@constant
def taken(key: str, teacher: bool) -> tuple[bool, ...]:
    """Which sites kernels fold. A student alone that is cut out of its own part of all tensors
    costs less without them."""
    return tuple(not refusal(site) and (teacher or not site.apart) for site in sites_of(key))


@constant
def layout(key: str, shapes: Any, strides: Any, teacher: bool, student: bool) -> Any:
    """``places``, of such tensors."""
    both = zip(shapes, strides, strict=True)
    tensors = [torch.empty_strided(*one, device="meta") for one in both]
    return places(owned(sites_of(key), tensors), teacher, student)


def layout_of(tensors: Tensors, key: str, teacher: bool, student: bool) -> Any:
    """``places``, for compilers."""
    shapes, strides = (
        tuple(tuple(map(int, of(t))) for t in tensors) for of in (Tensor.size, Tensor.stride)
    )
    return layout(key, shapes, strides, teacher, student)


def by_kernels(grads: Grads | None, *given: Any) -> list[Tensor | None]:
    """All weights that are asked for; or, from their gradients, those of all tensors."""
    from . import launch

    if torch.compiler.is_compiling() or is_fake(given[0][0]):
        return by_operator(grads, *given, True)
    return viewed(*launch.run(grads, *given))


def by_operator(grads: Grads | None, *given: Any) -> list[Tensor | None]:
    """The same for compilers; the last of ``given`` says whether by kernels."""
    flat = fold_op(*given) if grads is None else backward_op(list(grads), *given)
    weights, trained = layout_of(*given[:4])
    return viewed(flat, weights if grads is None else trained)


def plainly(
    grads: Grads | None,
    tensors: Tensors,
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
    *,
    back: Any = reference.backward,
) -> list[Tensor | None]:
    """The same in plain torch, under autocast to ``half``."""
    each, kind = owned(sites_of(key), tensors), tensors[0].device.type
    alike = half == reference.autocast_type(kind)
    with nullcontext() if alike else torch.autocast(kind, half, enabled=half is not None):
        if grads is None:
            return [w for one in each for w in reference.forward(*one, teacher, student)]
        pairs = zip(each, grads[::2], grads[1::2], strict=True)
        return [grad for one, *pair in pairs for grad in back(*one, *pair)]


def fold_flat(
    tensors: list[Tensor],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
    kernels: bool = True,
) -> Tensor:
    return _flat(None, kernels, tensors, key, teacher, student, half)


def backward_flat(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
    kernels: bool = True,
) -> Tensor:
    return _flat(grads, kernels, tensors, key, teacher, student, half)


def _flat(grads: Grads | None, kernels: bool, *given: Any) -> Tensor:
    """In one flat tensor."""
    if kernels:
        from . import launch

        flat: Tensor = launch.run(grads, *given)[0]
        return flat
    where = layout_of(*given[:4])[grads is not None]
    flat = given[0][0].new_empty(where.size)
    for place, x in zip(viewed(flat, where), plainly(grads, *given), strict=True):
        if place is not None:
            place.zero_() if x is None else place.copy_(x)
    return flat


fold_op = torch.library.custom_op("gpdfx::fold", fold_flat, mutates_args=())
backward_op = torch.library.custom_op("gpdfx::fold_backward", backward_flat, mutates_args=())


@fold_op.register_fake
def _(tensors: Tensors, *rest: Any) -> Tensor:
    return tensors[0].new_empty(layout_of(tensors, *rest[:3])[0].size)


@backward_op.register_fake
def _(grads: Any, tensors: Tensors, *rest: Any) -> Tensor:
    return tensors[0].new_empty(layout_of(tensors, *rest[:3])[1].size)

"""The fold by Triton kernels, as functions and as operators of PyTorch that compilers call.

All weights come in one flat tensor, and so do all gradients. Tensors are those of the sites, one
site after the other; these come by their key. What kernels do not take (types that differ) is
folded by ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...torch_private import constant_result
from . import reference
from .site import View, owned, refusal, regions, sites_of, tensors_like, viewed, weights_like

Tensors = list[Tensor]
Views = Sequence[View | None]


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
def layout(
    key: str, shapes: tuple[Any, ...], strides: tuple[Any, ...], teacher: bool, student: bool
) -> tuple[tuple[int, Views], tuple[int, Views]]:
    """Of weights and gradients: the size of the flat tensor, and where they lie in it."""
    both = zip(shapes, strides, strict=True)
    tensors = [torch.empty_strided(*one, device="meta") for one in both]
    each = owned(sites_of(key), tensors)
    trained = [zip(tensors_like(*one), one[0].differentiable(), strict=True) for one in each]
    likes = [like if trains else None for one in trained for like, trains in one]
    return regions(weights_like(each, teacher, student)), regions(likes)


def layout_of(
    tensors: Tensors, key: str, teacher: bool, student: bool
) -> tuple[tuple[int, Views], tuple[int, Views]]:
    """``layout`` for these tensors."""
    shapes, strides = (
        tuple(tuple(map(int, of(t))) for t in tensors) for of in (Tensor.size, Tensor.stride)
    )
    found: tuple[Any, Any] = layout(key, shapes, strides, teacher, student)
    return found


def autocast(like: Tensor, half: torch.dtype | None) -> AbstractContextManager[Any]:
    """Products in a type, if there is one."""
    return torch.autocast(like.device.type, half) if half else nullcontext()


def packed(found: Iterable[Tensor | None], like: Tensor, size: int, views: Views) -> Tensor:
    """Results in one flat tensor."""
    flat = like.new_zeros(size)
    for view, x in zip(viewed(flat, views), found, strict=True):
        if view is not None and x is not None:
            view.copy_(x)
    return flat


# --------------------------------------------------------------------------- in plain torch
def fold_plainly(
    tensors: Tensors, key: str, teacher: bool, student: bool, half: torch.dtype | None
) -> Tensor:
    """All weights that are asked for."""
    with autocast(tensors[0], half):
        each = owned(sites_of(key), tensors)
        made = [x for one in each for x in reference.forward(*one, teacher, student)]
    return packed(made, tensors[0], *layout_of(tensors, key, teacher, student)[0])


def back_plainly(
    grads: list[Tensor | None],
    tensors: Tensors,
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> Tensor:
    """The gradients of all tensors, from those of the two weights of each site."""
    pairs = zip(grads[::2], grads[1::2], strict=True)
    with autocast(tensors[0], half):
        each = zip(owned(sites_of(key), tensors), pairs, strict=True)
        found = [grad for one, pair in each for grad in reference.backward(*one, *pair)]
    return packed(found, tensors[0], *layout_of(tensors, key, teacher, student)[1])


# --------------------------------------------------------------------------- by kernels
def run(grads: Any, *given: Any, flat: bool = False) -> Any:
    """What ``fold_plainly`` makes, or from gradients ``back_plainly``: each result by itself, or in
    one ``flat`` tensor that nobody else has."""
    from . import launch

    (tensors, key, teacher, student, half), backward = given, grads is not None
    call = launch.prepared(tensors, key, teacher, student, half or tensors[0].dtype)
    if call is not None and not flat:
        results = call.results(backward)
        call.plan.run(grads, call.addresses, results.flat)
        return results.aliases()
    size, views = layout_of(tensors, key, teacher, student)[backward]
    if call is not None:
        out = tensors[0].new_empty(size)
        call.plan.run(grads, call.addresses, out)
    else:
        out = back_plainly(grads, *given) if backward else fold_plainly(*given)
    return out if flat else viewed(out, views)


# --------------------------------------------------------------------------- operators
def operator(name: str, plainly: Any, by_kernels: Any, which: int) -> Any:
    """Of PyTorch."""
    op = torch.library.custom_op(name, plainly, mutates_args=(), device_types=("cpu",))
    op.register_kernel("cuda")(partial(by_kernels, flat=True))

    def like(*given: Any) -> Any:
        tensors, key, teacher, student, _ = given[-5:]
        return tensors[0].new_empty(layout_of(tensors, key, teacher, student)[which][0])

    op.register_fake(like)
    return op


fold_op = operator("gpdfx::fold", fold_plainly, partial(run, None), 0)
backward_op = operator("gpdfx::fold_backward", back_plainly, run, 1)

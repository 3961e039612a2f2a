"""The fold by Triton kernels, as operators of PyTorch that compilers call.

All weights come in one flat tensor, and so do all gradients. Tensors are those of the sites, one
site after the other; these come by their key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...torch_private import constant_result, is_fake
from .site import Tensors, owned, places, refusal, sites_of, viewed


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


def by_kernels(grads: Sequence[Tensor | None] | None, *given: Any) -> list[Tensor | None]:
    """All weights that are asked for; or, from their gradients, those of all tensors."""
    from . import launch

    tensors, key, teacher, student, _ = given
    if torch.compiler.is_compiling() or is_fake(tensors[0]):
        flat = fold_op(*given) if grads is None else backward_op(list(grads), *given)
        weights, trained = layout_of(tensors, key, teacher, student)
        return viewed(flat, weights if grads is None else trained)
    return viewed(*launch.run(grads, *given))


def fold_flat(
    tensors: list[Tensor], key: str, teacher: bool, student: bool, half: torch.dtype | None
) -> Tensor:
    from . import launch

    return launch.run(None, tensors, key, teacher, student, half)[0]


def backward_flat(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> Tensor:
    from . import launch

    return launch.run(grads, tensors, key, teacher, student, half)[0]


fold_op = torch.library.custom_op("gpdfx::fold", fold_flat, mutates_args=())
backward_op = torch.library.custom_op("gpdfx::fold_backward", backward_flat, mutates_args=())


@fold_op.register_fake
def _(tensors: Tensors, key: str, teacher: bool, student: bool, half: Any) -> Tensor:
    return tensors[0].new_empty(layout_of(tensors, key, teacher, student)[0].size)


@backward_op.register_fake
def _(grads: Any, tensors: Tensors, key: str, teacher: bool, student: bool, half: Any) -> Tensor:
    return tensors[0].new_empty(layout_of(tensors, key, teacher, student)[1].size)

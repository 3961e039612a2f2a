"""The fold as an operator of PyTorch, with Triton kernels on the GPU.

Layers come by the key of their ``Site``s, all tensors as inputs, so that autograd, compilers and
functionalization see what is read. On other devices it is ``reference``; what keeps a layer from
the kernels, ``refusal`` says. The student's weight alone is cut out of the branches by
``reference`` everywhere, and so is what is in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...branches.kinds import Average, Frequency, Full, LowRank, Pointwise, Product, Separable
from . import reference
from .site import Site, each, pairs, sites_of

KINDS = {Average: 0, Frequency: 0, Pointwise: 0, Full: 1, Product: 2, LowRank: 2, Separable: 3}
"""Kind of branch -> kind of summand, of which a layer may have as many as ``SLOTS`` says."""
SLOTS = {0: 2, 1: 2, 2: 1, 3: 1}


def refusal(site: Site) -> str:
    """Why a layer's branches have no kernel; empty if they have."""
    counts = Counter(KINDS.get(type(b), -1) for b in site.branches)
    if -1 in counts:
        kinds = (type(b).__name__ for b in site.branches if type(b) not in KINDS)
        return f"there is no kernel for {next(kinds)}"
    return (
        "it has more branches of one kind than the kernel"
        if any(n > SLOTS[kind] for kind, n in counts.items())
        else ""
    )


def _kernels(tensor: Tensor) -> Any:
    """The launcher, where the kernels run; the interpreter runs them on the CPU."""
    from . import launch

    return launch if tensor.dtype in launch.TYPES else None


# --------------------------------------------------------------------------- forward
@torch.library.custom_op("gpdfx::fold", mutates_args=(), device_types=("cpu",))
def fold_op(
    tensors: list[Tensor],
    index: list[int],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> list[Tensor]:
    """The weights that are asked for, site by site, the teacher's first (see ``fold``)."""
    made: list[Tensor] = []
    for site, own in each(key, index, tensors):
        made += reference.listed(
            site, *_autocast(half, own, reference.forward, site, own, teacher, student)
        )
    return made


def _autocast(half: torch.dtype | None, own: list[Tensor], call: Any, *args: Any) -> Any:
    if half is None:
        return call(*args)
    with torch.autocast(own[0].device.type, half):
        return call(*args)


@fold_op.register_kernel("cuda")
def fold_kernels(
    tensors: list[Tensor],
    index: list[int],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> list[Tensor]:
    """``fold_op`` by kernels, for those layers that have them."""
    layers, kernels = each(key, index, tensors), _kernels(tensors[0])
    fused = [teacher and kernels is not None and not refusal(site) for site, _ in layers]
    chosen = [one for one, good in zip(layers, fused, strict=True) if good]
    found = iter(())
    if chosen:
        sites, owned = zip(*chosen, strict=True)
        found = iter(kernels.forward(sites, owned, student, half or tensors[0].dtype))
    made: list[Tensor] = []
    for (site, own), good in zip(layers, fused, strict=True):
        weights = (
            next(found)
            if good
            else _autocast(half, own, reference.forward, site, own, teacher, student)
        )
        made += reference.listed(site, *weights)
    return made


@fold_op.register_fake
def _(
    tensors: list[Tensor],
    index: list[int],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> list[Tensor]:
    made: list[Tensor] = []
    for site, own in each(key, index, tensors):
        wide = torch.empty_like(own[0]) if teacher else None
        made += reference.listed(site, wide, reference.room(site, own[0]) if student else None)
    return made


# --------------------------------------------------------------------------- backward
@torch.library.custom_op("gpdfx::fold_backward", mutates_args=(), device_types=("cpu",))
def backward_op(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    index: list[int],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> list[Tensor]:
    """The gradients of all tensors; an empty one for those that have none."""
    found = []
    for (site, own), (wide, narrow) in zip(
        each(key, index, tensors), pairs(sites_of(key), grads, teacher, student), strict=True
    ):
        found.append(_autocast(half, own, reference.backward, site, own, wide, narrow))
    return _gathered(found, tensors, index)


def _gathered(
    found: Sequence[Sequence[Tensor | None]], tensors: Sequence[Tensor], index: Sequence[int]
) -> list[Tensor]:
    """By tensor: only constants, which have no gradient, belong to several sites."""
    made = [t.new_empty(0) for t in tensors]
    for place, grad in zip(index, (g for own in found for g in own), strict=True):
        if grad is not None:
            own = tensors[place]  # whose memory order compilers rely on
            made[place] = (
                grad if grad.stride() == own.stride() else torch.empty_like(own).copy_(grad)
            )
    return made


@backward_op.register_kernel("cuda")
def backward_kernels(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    index: list[int],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> list[Tensor]:
    """``backward_op`` by kernels, for those layers that have them."""
    layers, kernels = each(key, index, tensors), _kernels(tensors[0])
    given = pairs(sites_of(key), grads, teacher, student)
    fused = [
        teacher and kernels is not None and not refusal(site) and pair != (None, None)
        for (site, _), pair in zip(layers, given, strict=True)
    ]
    chosen = [(*one, g) for one, g, good in zip(layers, given, fused, strict=True) if good]
    quick = iter(())
    if chosen:
        sites, owned, own_grads = zip(*chosen, strict=True)
        quick = iter(kernels.backward(sites, owned, own_grads, half or tensors[0].dtype))
    found = [
        next(quick) if good else _autocast(half, own, reference.backward, site, own, wide, narrow)
        for (site, own), (wide, narrow), good in zip(layers, given, fused, strict=True)
    ]
    return _gathered(found, tensors, index)


@backward_op.register_fake
def _(
    grads: list[Tensor | None],
    tensors: list[Tensor],
    index: list[int],
    key: str,
    teacher: bool,
    student: bool,
    half: torch.dtype | None,
) -> list[Tensor]:
    made = [t.new_empty(0) for t in tensors]
    given = pairs(sites_of(key), grads, teacher, student)
    at = 0
    for site, pair in zip(sites_of(key), given, strict=True):
        for offset, differentiable in enumerate(reference.differentiable(site)):
            if differentiable and any(g is not None for g in pair):
                made[index[at + offset]] = torch.empty_like(tensors[index[at + offset]])
        at += site.size
    return made


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, *ctx.rest = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    found = backward_op(list(grads), tensors, *ctx.rest)
    mine = [g if g.shape == t.shape else None for g, t in zip(found, tensors, strict=True)]
    return (mine, *[None] * len(ctx.rest))


fold_op.register_autograd(_backward, setup_context=_setup)

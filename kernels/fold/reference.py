"""The fold of one layer in plain torch, forward and backward.

W = s_0 origin + sum_b s_b K_b        teacher: W * shares        student: the first copies of W
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...branches import Layer
from .. import copies
from .rules import RULES, Grad
from .site import Site, Tensors, load, store


def forward(
    site: Site, tensors: Tensors, teacher: bool, student: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's and the student's weight, as far as they are asked for; the same tensor twice
    if they are not distinct."""
    layer, cut = site.layer, site.cut
    if not teacher and cut is not None:
        return None, store(site.narrow, merge(site, site.narrow, _part(site, tensors)))
    total = merge(site, layer, tensors)
    own = total
    if cut is not None and student:
        own = cut.take(total, "goi").clone()  # shares are multiplied in place
    own = store(site.narrow, own) if student else None  # type: ignore[assignment]
    if not teacher:
        return None, own
    wide = store(layer, total)
    if site.share is not None:
        wide = _shared(site, wide, tensors, keep=student and cut is None)
    return wide, own


def listed(site: Site, wide: Tensor | None, narrow: Tensor | None) -> list[Tensor]:
    """Weights as an operator returns them: each once."""
    twice = wide is not None and not site.distinct
    return [w for w in (wide, None if twice else narrow) if w is not None]


def room(site: Site, origin: Tensor) -> Tensor:
    """An empty tensor like the student's weight, in the memory order of the teacher's."""
    layer = site.narrow
    size = store(layer, torch.empty(*layer.shape[:3], *layer.kernel, device="meta")).shape
    strides = origin.stride()
    order = sorted(range(origin.ndim), key=lambda d: -strides[d])
    return torch.empty_permuted(size, order, dtype=origin.dtype, device=origin.device)


def differentiable(site: Site) -> list[bool]:
    """Which of its tensors are parameters."""
    found = [True, True] + [False] * (2 * (site.share is not None))
    for branch, names in zip(site.branches, site.names, strict=True):
        found += [name in branch.shapes(site.layer) for name in names]
    return found


def merge(site: Site, layer: Layer, tensors: Tensors) -> Tensor:
    """(groups, out, in, taps); ``layer``: whose the tensors are, the teacher's or the student's."""
    origin, rows, owned = _unpack(site, layer, tensors)
    total = load(layer, origin) * rows[0]
    for branch, row, own in zip(site.branches, rows[1:], owned, strict=True):
        RULES[type(branch)].add(branch, layer, total, row, *own)
    return total


def backward(
    site: Site, tensors: Tensors, teacher: Tensor | None, student: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the tensors, from those of the weights."""
    layer, cut = site.layer, site.cut
    if teacher is None and student is None:
        return [None] * site.size
    if teacher is None and cut is not None:
        assert student is not None
        found = unmerge(site, site.narrow, _part(site, tensors), load(site.narrow, student))
        return _whole(site, tensors, found)
    if teacher is None:
        assert student is not None
        return unmerge(site, layer, tensors, load(layer, student))
    if site.share is not None:
        teacher = _shared(site, teacher, tensors, keep=True)
    grad = load(layer, teacher)
    if student is not None:
        grad = grad if site.share is not None else grad.clone()
        view = grad if cut is None else cut.view(grad, "goi")
        view.add_(load(site.narrow, student).reshape(view.shape))
    return unmerge(site, layer, tensors, grad)


def unmerge(site: Site, layer: Layer, tensors: Tensors, grad: Tensor) -> list[Tensor | None]:
    """The backward of ``merge``, in the order of ``tensors``."""
    origin, rows, owned = _unpack(site, layer, tensors)
    of_scales = [(grad * load(layer, origin)).sum((2, 3))]
    both = Grad(grad)
    found: list[Tensor | None] = []
    for branch, row, own in zip(site.branches, rows[1:], owned, strict=True):
        of_row, of_own = RULES[type(branch)].back(branch, layer, both, row, *own)
        of_scales.append(of_row)
        found += of_own
    scales = torch.stack([s.view(-1) for s in of_scales])
    rest: list[Tensor | None] = [] if site.share is None else [None, None]
    return [store(layer, grad * rows[0]), scales, *rest, *found]


def _unpack(
    site: Site, layer: Layer, tensors: Tensors
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensors]]:
    """Origin, scales by branch (groups, out, 1, 1), tensors by branch."""
    rows = tensors[1].reshape(-1, layer.groups, layer.outputs, 1, 1).unbind(0)
    at = 2 if site.share is None else 4
    owned = []
    for names in site.names:
        owned.append(tensors[at : at + len(names)])
        at += len(names)
    return tensors[0], rows, owned


def _shared(site: Site, weight: Tensor, tensors: Tensors, *, keep: bool) -> Tensor:
    """A stored weight times its shares, in place unless it is to be kept."""
    how = site.share
    assert how is not None
    split = list(how.split) if how.split else None
    table, classes = tensors[2:4]
    return copies.share(weight, table, classes, how.at, how.dim, split, write=not keep)


# --------------------------------------------------------------------------- the student's part
def _axes(site: Site) -> list[str]:
    """Of the tensors of all branches."""
    return [axes for branch in site.branches for axes in RULES[type(branch)].axes]


def _part(site: Site, tensors: Tensors) -> Tensors:
    """All tensors as the student has them."""
    cut, layer = site.cut, site.layer
    assert cut is not None
    at = 2 if site.share is None else 4
    origin = store(site.narrow, cut.take(load(layer, tensors[0]), "goi"))
    scales = cut.take(tensors[1].unflatten(1, (layer.groups, layer.outputs)), ".go").flatten(1)
    rest = zip(tensors[at:], _axes(site), strict=True)
    return [origin, scales, *tensors[2:at], *(cut.take(t, axes) for t, axes in rest)]


def _whole(site: Site, tensors: Tensors, found: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of these parts as those of all."""
    cut, layer = site.cut, site.layer
    assert cut is not None
    origin, scales = tensors[:2]
    size = (layer.groups, layer.outputs)
    at = 2 if site.share is None else 4
    rest = zip(found[at:], tensors[at:], _axes(site), strict=True)
    of_origin, of_scales = found[:2]
    assert of_origin is not None
    assert of_scales is not None
    of_scales = of_scales.unflatten(1, site.narrow.shape[:2])
    return [
        store(layer, cut.pad(load(site.narrow, of_origin), load(layer, origin), "goi")),
        cut.pad(of_scales, scales.unflatten(1, size), ".go").flatten(1),
        *found[2:at],
        *(None if g is None else cut.pad(g, t, axes) for g, t, axes in rest),
    ]

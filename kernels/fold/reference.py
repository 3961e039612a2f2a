"""The fold of one layer in plain torch, forward and backward.

W = s_0 origin + sum_b s_b K_b        teacher: W * shares        student: the first copies of W

Without branches W is the origin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...branches.layer import Layer
from .. import copies
from .formula import FORMULAS, Grad, dot, scaled
from .site import Site, Tensors, load, store


def forward(
    site: Site, tensors: Tensors, teacher: bool, student: bool, into: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's and the student's weight, as far as they are asked for; the same tensor twice
    if they are not distinct. ``into``: where the teacher's is made; it may be the origin."""
    layer, cut, unbranched = site.layer, site.cut, site.unbranched
    if not teacher and cut is not None:
        part = merge(site, site.narrow, _part(site, tensors))
        return None, store(site.narrow, part.clone() if unbranched else part)
    total = merge(site, layer, tensors, into)
    part, own = total if cut is None else cut.take(total, "goi"), None
    if student:  # shares are multiplied in place
        own = store(site.narrow, part if cut is None and not unbranched else part.clone())
    if not teacher:
        return None, own
    wide = store(layer, total)
    if site.share is not None:
        wide = _shared(site, wide, tensors, _place(wide, into, unbranched, student and cut is None))
    return wide, own


def _place(wide: Tensor, into: Tensor | None, unbranched: bool, kept: bool) -> Tensor | None:
    """Where the teacher's weight goes when it is multiplied by shares: another place than the
    origin, or than what the student reads."""
    return into if unbranched else None if kept else wide


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
    found = [True] * (1 + (not site.unbranched)) + [False] * (2 * (site.share is not None))
    for branch, names in zip(site.branches, site.names, strict=True):
        found += [name in branch.shapes(site.layer) for name in names]
    return found


def merge(site: Site, layer: Layer, tensors: Tensors, into: Tensor | None = None) -> Tensor:
    """(groups, out, in, taps); ``layer``: whose the tensors are, the teacher's or the student's.
    Without branches it is the origin itself."""
    if site.unbranched:
        return load(layer, tensors[0])
    origin, rows, owned = _unpack(site, layer, tensors)
    total = torch.mul(load(layer, origin), rows[0], out=into if into is None else load(layer, into))
    for branch, row, own in zip(site.branches, rows[1:], owned, strict=True):
        FORMULAS[type(branch)].add(branch, layer, total, row, *own)
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
        grad = load(layer, student)  # an operator may not return what it was given
        return unmerge(site, layer, tensors, grad.clone() if site.unbranched else grad)
    fresh = site.share is not None
    if fresh:
        teacher = _shared(site, teacher, tensors, None)
    grad = load(layer, teacher)
    if student is not None:
        grad = grad if fresh else grad.clone()
        view = grad if cut is None else cut.view(grad, "goi")
        view.add_(load(site.narrow, student).reshape(view.shape))
    return unmerge(site, layer, tensors, grad, fresh=fresh or student is not None)


def unmerge(
    site: Site, layer: Layer, tensors: Tensors, grad: Tensor, *, fresh: bool = False
) -> list[Tensor | None]:
    """The backward of ``merge``, in the order of ``tensors``. ``fresh``: ``grad`` may be written
    to."""
    rest: list[Tensor | None] = [] if site.share is None else [None, None]
    if site.unbranched:
        return [store(layer, grad), *rest]
    origin, rows, owned = _unpack(site, layer, tensors)
    of_scales = [dot(grad, load(layer, origin))]
    both = Grad(grad)
    found: list[Tensor | None] = []
    for branch, row, own in zip(site.branches, rows[1:], owned, strict=True):
        of_row, of_own = FORMULAS[type(branch)].back(branch, layer, both, row, *own)
        of_scales.append(of_row)
        found += of_own
    scales = torch.stack([s.view(-1) for s in of_scales])
    of_origin = scaled(grad, rows[0]) if fresh else grad * rows[0]
    return [store(layer, of_origin), scales, *rest, *found]


def _unpack(
    site: Site, layer: Layer, tensors: Tensors
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensors]]:
    """Origin, scales by branch (groups, out, 1, 1), tensors by branch."""
    rows = tensors[1].reshape(-1, layer.groups, layer.outputs, 1, 1).unbind(0)
    at = site.first
    owned = []
    for names in site.names:
        owned.append(tensors[at : at + len(names)])
        at += len(names)
    return tensors[0], rows, owned


def _shared(site: Site, weight: Tensor, tensors: Tensors, out: Tensor | None) -> Tensor:
    """A stored weight times its shares."""
    how = site.share
    assert how is not None
    split = list(how.split) if how.split else None
    table, classes = tensors[site.first - 2 : site.first]
    return copies.share(weight, table, classes, how.at, how.dim, split, out=out)


# --------------------------------------------------------------------------- the student's part
def _axes(site: Site) -> list[str]:
    """Of the tensors of all branches."""
    return [axes for branch in site.branches for axes in FORMULAS[type(branch)].axes]


def _part(site: Site, tensors: Tensors) -> Tensors:
    """All tensors as the student has them."""
    cut, layer, at = site.cut, site.layer, site.first
    assert cut is not None
    origin = store(site.narrow, cut.take(load(layer, tensors[0]), "goi"))
    if site.unbranched:
        return [origin, *tensors[1:]]
    scales = cut.take(tensors[1].unflatten(1, (layer.groups, layer.outputs)), ".go").flatten(1)
    rest = zip(tensors[at:], _axes(site), strict=True)
    return [origin, scales, *tensors[2:at], *(cut.take(t, axes) for t, axes in rest)]


def _whole(site: Site, tensors: Tensors, found: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of these parts as those of all."""
    cut, layer, at = site.cut, site.layer, site.first
    assert cut is not None
    of_origin, of_scales = found[0], None if site.unbranched else found[1]
    assert of_origin is not None
    padded = cut.pad(load(site.narrow, of_origin), load(layer, tensors[0]), "goi")
    if of_scales is None:
        return [store(layer, padded), *found[1:]]
    of_scales = of_scales.unflatten(1, site.narrow.shape[:2])
    scales = tensors[1].unflatten(1, (layer.groups, layer.outputs))
    rest = zip(found[at:], tensors[at:], _axes(site), strict=True)
    return [
        store(layer, padded),
        cut.pad(of_scales, scales, ".go").flatten(1),
        *found[2:at],
        *(None if g is None else cut.pad(g, t, axes) for g, t, axes in rest),
    ]

"""The fold of one layer in plain torch, forward and backward.

    W = s_0 origin + sum_b s_b K_b     teacher: W * shares     student: first copies of W, or mean

K_b is what a ``Term`` says; without terms W is the origin. With G the gradient of W, and p the
carrier of a term, in which K is linear,

    m = (dK/dp)^T G        dp = s m        ds[o] = sum of p m over what belongs to row o

and the gradient of a factor is that of K along s p. Rows of a weight are taken in blocks that stay
in the processor's cache from the first term to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...branches.layer import LAYOUTS
from ...branches.term import Term, aligned, flat
from .. import copies
from .site import Blocks, Site, Tensors, load, room, segments, store

BLOCK = 2**21
"""Elements of a weight that are folded at once."""
Weights = tuple[Tensor | None, Tensor | None]
"""The teacher's and the student's."""
Operands = tuple[Tensor | None, Tensor | None]
"""Carrier and factor of a term, with one dimension a letter."""


def forward(site: Site, tensors: Tensors, teacher: bool, student: bool) -> Weights:
    """The weights that are asked for, one for both if they are not distinct."""
    if not teacher and site.apart:
        return None, forward(*_alone(site, tensors), True, False)[0]
    layer, origin = site.layer, tensors[0]
    scales, operands = _unpack(site, tensors)
    wide = room(layer, origin) if teacher else None
    own = room(site.narrow, origin) if student and (site.distinct or not teacher) else None
    shares = _share_matrix(site, tensors) if own is not None and site.mean else None
    for rows, mine, copy, _ in _blocks(site):
        total = load(layer, origin)[:, rows]
        if site.terms:
            base = total
            total = torch.empty_like(base) if wide is None else load(layer, wide)[:, rows]
            torch.mul(base, scales[0][:, rows], out=total)
        for term, scale, own_operands in zip(site.terms, scales[1:], operands, strict=True):
            _add(term, total, scale[:, rows], own_operands, rows)
        if own is not None and (site.mean or copy == 0):
            part, target = _merged(site, total, shares, rows), load(site.narrow, own)[:, mine]
            target.lerp_(part, 1 / (copy + 1)) if copy else target.copy_(part)
        if wide is not None:
            _times_shares(site, tensors, wide if site.terms else origin, wide, rows)
    return wide, own


def backward(
    site: Site, tensors: Tensors, teacher: Tensor | None, student: Tensor | None
) -> list[Tensor | None]:
    """The gradients of the tensors, from those of the weights."""
    if teacher is None and student is None:
        return [None] * site.size
    if teacher is None and site.apart:
        return _padded(site, tensors, backward(*_alone(site, tensors), student, None))
    layer, origin = site.layer, tensors[0]
    scales, operands = _unpack(site, tensors)
    shares = _share_matrix(site, tensors) if student is not None and site.mean else None
    d_origin = room(layer, origin)
    d_scales = torch.empty_like(tensors[1]) if site.terms else None
    rest = zip(tensors[site.first :], site.differentiable()[site.first :], strict=True)
    found = [t.new_empty(t.shape) if trains else None for t, trains in rest]
    targets = _paired(site, found)
    for _, d_factor in targets:
        if d_factor is not None:
            d_factor.zero_()
    for rows, mine, copy, count in _blocks(site):
        grad = load(layer, d_origin)[:, rows]
        if teacher is None:
            grad.zero_()
        else:
            _times_shares(site, tensors, teacher, d_origin, rows)
        if student is not None and (site.mean or copy == 0):
            part = load(site.narrow, student)[:, mine]
            _spread(site, part / count if site.mean else part, grad, shares, rows)
        if d_scales is not None:
            sums = d_scales.view(-1, layer.groups, layer.outputs)[:, :, rows]
            sums[0] = _dot(grad, load(layer, origin)[:, rows])
            for k, term in enumerate(site.terms):
                sums[k + 1] = _back(
                    term, grad, scales[k + 1][:, rows], operands[k], targets[k], rows
                )
            grad.mul_(scales[0][:, rows])
    between = [None] * (site.first - 1 - (d_scales is not None))
    return [d_origin, *([] if d_scales is None else [d_scales]), *between, *found]


def plain(site: Site, tensors: Tensors, teacher: bool, student: bool) -> Weights:
    """``forward`` by functions that autograd knows."""
    layer, (scales, _) = site.layer, _unpack(site, tensors)
    total, rest = load(layer, tensors[0]), iter(tensors[site.first :])
    if site.terms:
        total = total * scales[0]
    for term, scale in zip(site.terms, scales[1:], strict=True):
        kernel = term.kernel(layer, {name: next(rest) for name in term.names})
        total = total + kernel.reshape(total.shape).to(total) * scale
    wide = own = None
    if teacher:
        wide = store(layer, total)
        if site.share is not None:
            wide = _shared(site, wide, *tensors[site.first - 2 : site.first])
    if student and (site.distinct or not teacher):
        shares = _share_matrix(site, tensors) if site.mean else None
        own = store(site.narrow, _merged(site, total, shares, slice(0, layer.outputs)))
    return wide, own


# --------------------------------------------------------------------------- terms
def _add(term: Term, total: Tensor, scale: Tensor, operands: Operands, rows: slice) -> None:
    """``total += scale K``, of some rows."""
    part, (carrier, factor) = term.part(total), operands
    scale = scale * term.gain
    if carrier is None:
        _diagonal(part, rows).add_(scale.flatten(1))
    elif term.summed:
        part.addcmul_(term.product(carrier[:, rows], factor).to(total.dtype), scale)
    else:
        profile = scale if factor is None else aligned(factor, term.others)[:, rows] * scale
        part.addcmul_(aligned(carrier, term.letters)[:, rows], profile)


def _back(
    term: Term, grad: Tensor, scale: Tensor, operands: Operands, targets: Operands, rows: slice
) -> Tensor:
    """The gradient of the scales, (groups, outputs); those of the operands go to ``targets``."""
    part, (carrier, factor), (d_carrier, d_factor) = term.part(grad), operands, targets
    if carrier is None:
        return _diagonal(part, rows) * term.gain
    letters = "goix" if "x" in term.letters + term.others else "goi"
    if factor is not None:
        given = part if letters == "goix" else part.squeeze(3)
        own = factor[:, rows] if "o" in term.others else factor
        moved = torch.einsum(f"{letters},{term.others}->{term.letters}", given, own)
    else:
        moved = part if letters == "goix" else part.sum(3)
    assert d_carrier is not None
    carrier = carrier[:, rows]
    size = scale.view(*scale.shape[:2], *[1] * (moved.ndim - 2)) * term.gain
    target = d_carrier[:, rows].copy_(moved)
    sums = _dot(target, carrier) * term.gain
    target.mul_(size)
    if d_factor is not None:
        pair = f"{letters},{term.letters}->{term.others}"
        d_factor += torch.einsum(pair, given, carrier * size)
    return sums


def _diagonal(part: Tensor, rows: slice) -> Tensor:
    """Where o = i, of some rows: (groups, outputs)."""
    return part[..., 0].diagonal(rows.start, 1, 2)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """(groups, outputs, ...) twice -> ``(x * y)`` summed over all but the first two."""
    if x.ndim == 4 and x.stride(3) > x.stride(2):  # as it lies in memory
        x, y = x.transpose(2, 3), y.transpose(2, 3)
    sums: Tensor = torch.linalg.vecdot(x.flatten(2), y.flatten(2))
    return sums


# --------------------------------------------------------------------------- rows and shares
def _blocks(site: Site) -> Iterator[tuple[slice, slice, int, int]]:
    """(the teacher's outputs, the student's, which copy, of how many). A layer with groups, or
    with copies that do not stand side by side, is one block."""
    (outer, *_), layer = site.blocks["o"], site.layer
    if layer.groups > 1 or outer > 1:
        yield slice(0, layer.outputs), slice(0, site.narrow.outputs), 0, 1
        return
    step = max(1, BLOCK // max(1, layer.inputs * layer.taps))
    for start, own, size, copy, count in segments(site.blocks["o"]):
        for k in range(0, size, step):
            n = min(step, size - k)
            yield slice(start + k, start + k + n), slice(own + k, own + k + n), copy, count


def _merged(site: Site, total: Tensor, shares: Tensor | None, rows: slice) -> Tensor:
    """The student's part of some rows, (groups, outputs, inputs, taps)."""
    own = None if shares is None else shares[:, rows]
    part = _merge(total, 2, site.blocks["i"], site.mean, own)
    if rows == slice(0, site.layer.outputs):  # all copies are in them
        for dim, letter in enumerate("go"):
            part = _merge(part, dim, site.blocks[letter], site.mean, None)
    return part


def _merge(x: Tensor, dim: int, blocks: Blocks, mean: bool, shares: Tensor | None) -> Tensor:
    """First copies along a dimension, or means: a running mean, exact while copies are equal."""
    outer, wide, narrow = blocks
    if wide == narrow:
        return x
    x = x.unflatten(dim, (outer, wide))
    if not mean:
        return x.narrow(dim + 1, 0, narrow).flatten(dim, dim + 1)
    sizes = [*x.shape]
    sizes[dim + 1] = narrow
    found = x.new_empty(sizes)
    totals: dict[int, Tensor] = {}
    for start, own, size, copy, _ in segments(blocks):
        part, target = x.narrow(dim + 1, start, size), found.narrow(dim + 1, own, size)
        weight: Any = 1 / (copy + 1)
        if shares is not None:
            share = shares.unflatten(dim, (outer, wide)).narrow(dim + 1, start, size)
            totals[own] = share + totals[own] if copy else share
            weight = share / totals[own]
        target.lerp_(part, weight) if copy else target.copy_(part)
    return found.flatten(dim, dim + 1)


def _spread(site: Site, part: Tensor, grad: Tensor, shares: Tensor | None, rows: slice) -> None:
    """The gradient of ``_merged``, added to that of the weight."""
    if rows == slice(0, site.layer.outputs):
        for dim, letter in enumerate("go"):
            outer, wide, narrow = site.blocks[letter]
            if wide != narrow:
                whole = part.new_zeros(
                    [outer * wide if d == dim else n for d, n in enumerate(part.shape)]
                )
                _unmerge(part, whole, dim, site.blocks[letter], site.mean, None)
                part = whole
    own = None if shares is None else shares[:, rows]
    _unmerge(part, grad, 2, site.blocks["i"], site.mean, own)


def _unmerge(
    part: Tensor, whole: Tensor, dim: int, blocks: Blocks, mean: bool, shares: Tensor | None
) -> None:
    """The gradient of ``_merge``, added to that of the whole."""
    outer, wide, narrow = blocks
    part, whole = part.unflatten(dim, (outer, narrow)), whole.unflatten(dim, (outer, wide))
    shares = None if shares is None else shares.unflatten(dim, (outer, wide))
    for start, own, size, copy, count in segments(blocks):
        if not mean and copy:
            continue
        given, target = part.narrow(dim + 1, own, size), whole.narrow(dim + 1, start, size)
        if not mean or count == 1:
            target.add_(given)
        elif shares is None:
            target.add_(given, alpha=1 / count)
        else:
            starts = [own + k * narrow for k in range(count)]
            total = sum(shares.narrow(dim + 1, k, size) for k in starts)
            target.addcmul_(given, shares.narrow(dim + 1, start, size) / total)


def _times_shares(site: Site, tensors: Tensors, x: Tensor, out: Tensor, rows: slice) -> None:
    """Some rows of a stored weight times their shares, into another, which may be the same."""
    how, layer, dim = site.share, site.layer, int(LAYOUTS[site.layer.layout][1])
    if layer.groups == 1:
        x, out = (y.narrow(dim, rows.start, rows.stop - rows.start) for y in (x, out))
    if how is None:
        out.copy_(x)
        return
    table, classes = tensors[site.first - 2 : site.first]
    at = dim and len(how.split or (1,))  # of rows
    if layer.groups == 1 and table.shape[at] > 1:
        table = table.narrow(at, rows.start, rows.stop - rows.start)
    _shared(site, x, table, classes, out)


def _share_matrix(site: Site, tensors: Tensors) -> Tensor | None:
    """(groups, outputs, inputs, 1)."""
    if site.share is None or site.blocks["i"][1] == site.blocks["i"][2]:
        return None
    origin = tensors[0]
    ones = origin.new_ones(()).expand(*origin.shape[:2], *[1] * (origin.ndim - 2))
    shares = _shared(site, ones, *tensors[site.first - 2 : site.first])
    return load(replace(site.layer, kernel=()), shares)


def _shared(
    site: Site, x: Tensor, table: Tensor, classes: Tensor, out: Tensor | None = None
) -> Tensor:
    """A stored tensor times the shares of a site that has some."""
    how = site.share
    assert how is not None
    split = list(how.split) if how.split else None
    return copies.share(x, table, classes, how.at, how.dim, split, out=out)


# --------------------------------------------------------------------------- tensors of a site
def _unpack(site: Site, tensors: Tensors) -> tuple[Any, list[Operands]]:
    """Scales by term (groups, out, 1, 1), the origin's first, and the operands of each term."""
    layer = site.layer
    found = []
    for term, (carrier, factor) in zip(
        site.terms, _paired(site, tensors[site.first :]), strict=True
    ):
        found.append((carrier, None if factor is None else term.second(factor, layer.inputs)))
    scales = tensors[1].reshape(-1, layer.groups, layer.outputs, 1, 1) if site.terms else [None]
    return scales, found


def _paired(site: Site, tensors: Sequence[Tensor | None]) -> list[Operands]:
    """Carrier and factor of each term, with one dimension a letter, of the tensors of all."""
    rest = iter(tensors)
    found = []
    for term in site.terms:
        own = [next(rest) if name else None for name in (term.carrier, term.factor)]
        letters = term.letters, term.others
        found.append(
            tuple(None if x is None else flat(x, y) for x, y in zip(own, letters, strict=True))
        )
    return found  # type: ignore[return-value]


# --------------------------------------------------------------------------- the student's part
def _alone(site: Site, tensors: Tensors) -> tuple[Site, Tensors]:
    """The student's layer as a site of its own, and all tensors as it has them."""
    cut, layer = site.cut, site.layer
    assert cut is not None
    found = [store(site.narrow, cut.take(load(layer, tensors[0]), "goi"))]
    if site.terms:
        found.append(cut.take(_by_group(site, tensors[1]), ".go").flatten(1))
    rest = iter(tensors[site.first :])
    for term in site.terms:
        for name, axes in zip(term.names, term.axes, strict=True):
            own = next(rest)
            own = term.second(own, layer.inputs) if name == term.factor else own
            found.append(cut.take(own, axes))
    terms = tuple(replace(term, residual=False) for term in site.terms)
    return Site(site.narrow, terms), found


def _padded(site: Site, tensors: Tensors, found: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of these parts as those of all."""
    cut, layer, (of_origin, *rest) = site.cut, site.layer, found
    assert cut is not None
    assert of_origin is not None
    whole = room(layer, tensors[0]).zero_()
    made: list[Tensor | None] = [whole]
    _fill(cut.view(load(layer, whole), "goi"), load(site.narrow, of_origin))
    if site.terms:
        scales = torch.zeros_like(tensors[1])
        _fill(cut.view(_by_group(site, scales), ".go"), rest.pop(0))
        made.append(scales)
    made += [None] * (site.first - len(made))
    for tensor, axes, part in zip(tensors[site.first :], _axes(site), rest, strict=True):
        padded = None if part is None else tensor.new_zeros(tensor.shape)
        if padded is not None:
            _fill(cut.view(padded, axes), part)
        made.append(padded)
    return made


def _fill(view: Tensor, part: Tensor | None) -> None:
    assert part is not None
    view.copy_(part.reshape(view.shape))


def _by_group(site: Site, scales: Tensor) -> Tensor:
    found: Tensor = scales.unflatten(1, site.layer.shape[:2])
    return found


def _axes(site: Site) -> list[str]:
    """Of the tensors of all terms."""
    return [axes for term in site.terms for axes in term.axes]

"""The fold of one layer in plain torch, forward and backward.

    W = s_0 origin + sum_b s_b K_b     teacher: W * shares     student: first copies of W, or mean

K_b is what a ``Term`` says; without terms W is the origin. With G the gradient of W, and p the
carrier of a term, in which K is linear,

    m = (dK/dp)^T G        dp = s m        ds[o] = sum of p m over what belongs to row o

and the gradient of a factor is that of K along s p. Rows of a large weight are taken in blocks that
stay in the processor's cache from the first term to the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ...branches.term import Term, aligned, flat
from .site import Site, Tensors, room, segments, uniform

BLOCK = 2**20
"""Elements of a weight that are folded at once."""
Weights = tuple[Tensor | None, Tensor | None]
"""The teacher's and the student's."""
Operands = tuple[Tensor | None, Tensor | None]
"""Carrier and factor of a term, with one dimension a letter."""
_KINDS = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "maia", "xla")
CASTING = frozenset(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))
"""Devices with autocast: found out here, for compilers of torch 2.11 cannot."""
Rows = tuple[slice, Sequence[tuple[int, int, int, int, int]]]
"""Outputs of the teacher, and which of the student's they stand for (``segments``)."""


def autocast_type(kind: str) -> torch.dtype | None:
    """Of products on such devices, if autocast is on."""
    on = kind in CASTING and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def halves(call: Any) -> Any:
    """Under autocast, products of terms are in its type, and nothing else is."""

    @wraps(call)
    def called(site: Site, tensors: Tensors, *given: Any) -> Any:
        half = autocast_type(kind := tensors[0].device.type)
        if half is None:
            return call(site, tensors, *given)
        with torch.autocast(kind, enabled=False):
            return call(site, tensors, *given, half)

    return called


@halves
def forward(
    site: Site, tensors: Tensors, teacher: bool, student: bool, half: torch.dtype | None = None
) -> Weights:
    """The weights that are asked for, one for both if they are not distinct."""
    if not teacher and site.apart and site.terms:
        return None, forward(*alone(site, tensors), True, False, half)[0]
    one, origin = _Layer(site, tensors, teacher), tensors[0]
    wide = room(site.layer, origin) if teacher else None
    own = room(site.narrow, origin) if student and (site.distinct or not teacher) else None
    for rows in one.blocks(wide is None and not site.terms):
        total = one.of(origin, rows)
        if site.terms:
            base, total = total, torch.empty_like(total) if wide is None else one.of(wide, rows)
            torch.mul(base, one.scales[0][:, rows[0]], out=total)
        for k, term in enumerate(site.terms):
            _add(term, total, one.scales[k + 1], one.operands[k], rows[0], half)
        if own is not None:
            one.merge(total, own, rows)
        if wide is not None:
            one.times_shares(total, rows, total if site.terms else one.of(wide, rows))
    return wide, own


@halves
def backward(
    site: Site,
    tensors: Tensors,
    teacher: Tensor | None,
    student: Tensor | None,
    half: torch.dtype | None = None,
) -> list[Tensor | None]:
    """The gradients of the tensors, from those of the weights."""
    if teacher is None and student is None:
        return [None] * site.size
    if teacher is None and site.apart and site.terms:
        parts = backward(*alone(site, tensors), student, None, half)
        return _pulled_back(site, tensors, lambda own: alone(site, own)[1], parts)
    one, (origin, *rest) = _Layer(site, tensors, teacher is not None), tensors
    found: list[Any] = [room(site.layer, origin)]
    both = zip(rest, site.differentiable()[1:], strict=True)
    found += [t.new_empty(t.shape) if trains else None for t, trains in both]
    targets = _paired(site, found[site.first :])
    for _, factor in targets:
        if factor is not None:
            factor.zero_()
    blocks = one.blocks(teacher is None and not site.terms)
    if student is not None:
        one.add_all(blocks)
    for rows in blocks:
        grad = one.of(found[0], rows)
        if teacher is not None:
            one.times_shares(one.of(teacher, rows), rows, grad)
        elif not site.mean:
            grad.zero_()
        if student is not None:
            one.spread(student, grad, rows, fresh=teacher is None)
        if site.terms:
            sums = found[1].view(-1, site.layer.groups, site.layer.outputs)[:, :, rows[0]]
            sums[0] = _dot(grad, one.of(origin, rows))
            for k, term in enumerate(site.terms):
                scale, pair = one.scales[k + 1], one.operands[k]
                sums[k + 1] = _back(term, grad, scale, pair, targets[k], rows[0], half)
            grad.mul_(one.scales[0][:, rows[0]])
    return found


def plain(site: Site, tensors: Tensors, teacher: bool, student: bool) -> Weights:
    """``forward`` by functions that autograd and compilers know."""
    one, rest = _Layer(site, tensors, teacher), iter(tensors[site.first :])
    total = site.layer.by_taps(tensors[0])
    if site.terms:
        total = total * one.scales[0]
    for term, scale in zip(site.terms, one.scales[1:], strict=True):
        kernel = term.kernel(site.layer, {name: next(rest) for name in term.names})
        total = total + kernel.reshape(total.shape).to(total) * scale
    wide = own = None
    if teacher:
        wide = site.layer.store(one.times_shares(total, one.all_rows))
    if student and (site.distinct or not teacher):
        own = room(site.narrow, tensors[0])
        one.merge(total, own, one.all_rows)
    return wide, own


def back_plainly(
    site: Site, tensors: Tensors, teacher: Tensor | None, student: Tensor | None
) -> list[Tensor | None]:
    """``backward``, whose result has gradients."""
    asked = teacher is not None, student is not None
    return _pulled_back(site, tensors, lambda own: plain(site, own, *asked), (teacher, student))


def _pulled_back(
    site: Site, tensors: Tensors, call: Any, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the tensors, from those of what ``call`` makes of them."""
    trained = [k for k, trains in enumerate(site.differentiable()) if trains]
    found: list[Tensor | None] = [None] * site.size

    def some(*own: Tensor) -> list[Tensor]:
        given = dict(enumerate(tensors)) | dict(zip(trained, own, strict=True))
        made = zip(call(list(given.values())), grads, strict=True)
        return [y for y, grad in made if grad is not None]

    back: Any = torch.func.vjp(some, *(tensors[k] for k in trained))[1]
    made = back([grad for grad in grads if grad is not None])
    for k, grad in zip(trained, made, strict=True):
        found[k] = grad
    return found


def alone(site: Site, tensors: Tensors) -> tuple[Site, Tensors]:
    """The student's layer as a site of its own, and its part of all tensors; of one that is
    ``apart``."""
    cut, layer, rest = site.cut, site.layer, iter(tensors[site.first :])
    assert cut is not None
    found = [site.narrow.store(cut.take(layer.by_taps(tensors[0]), "goi"))]
    if site.terms:
        found.append(cut.take(tensors[1].unflatten(1, layer.shape[:2]), ".go").flatten(1))
    for term in site.terms:
        for name, axes in zip(term.names, term.axes, strict=True):
            own = next(rest)
            own = term.second(own, layer.inputs) if name == term.factor else own
            found.append(cut.take(own, axes))
    return Site(site.narrow, tuple(replace(t, residual=False) for t in site.terms)), found


# --------------------------------------------------------------------------- terms
def _add(
    term: Term, total: Tensor, scale: Tensor, operands: Operands, rows: slice, half: Any
) -> None:
    """``total += scale K``, of some rows."""
    part, (carrier, factor), scale = term.part(total), operands, term.gained(scale[:, rows])
    if carrier is None:
        _diagonal(part, rows).add_(scale.flatten(1))
    elif term.summed and factor is not None:
        kind = half or total.dtype
        made = term.product(carrier[:, rows].to(kind), factor.to(kind))
        part.addcmul_(made.to(total.dtype), scale)
    else:
        profile = scale if factor is None else aligned(_of(factor, term, rows), term.others) * scale
        part.addcmul_(aligned(carrier, term.letters)[:, rows], profile)


def _back(
    term: Term,
    grad: Tensor,
    scale: Tensor,
    operands: Operands,
    targets: Operands,
    rows: slice,
    half: Any,
) -> Tensor:
    """The gradient of the scales, (groups, outputs); those of the operands go to ``targets``."""
    part, (carrier, factor), (d_carrier, d_factor) = term.part(grad), operands, targets
    if carrier is None or d_carrier is None:
        return term.gained(_diagonal(part, rows))
    letters = "goix" if "x" in term.letters + term.others else "goi"
    given = part if letters == "goix" else _over_taps(part)
    e = term.summed
    many = e != "" and (term.letters, term.others) == (f"goi{e}", f"gi{e}x")
    if factor is None:
        moved = torch.einsum(f"{letters}->{term.letters}", given)
    else:
        given = given if half is None or not e else given.to(half)
        factor = _of(factor, term, rows).to(given)
        if many:
            given, factor = _side_by_side(given, factor)
            moved = (given @ factor.mT).transpose(1, 2)
        else:
            moved = torch.einsum(f"{letters},{term.others}->{term.letters}", given, factor)
    carrier, target = carrier[:, rows], d_carrier[:, rows]
    size = term.gained(scale[:, rows]).view(*target.shape[:2], *[1] * (target.ndim - 2))
    if many or moved.dtype != target.dtype or not moved.is_contiguous():
        target.view(moved.shape).copy_(moved)
        moved = target
    sums = _dot(moved, carrier)
    torch.mul(moved, size, out=target)
    if d_factor is not None:
        scaled = (carrier * size).to(given)
        if many:
            wide = scaled.reshape(*scaled.shape[:2], given.shape[1], -1).transpose(1, 2)
            d_factor += _parted(wide.mT @ given, d_factor)
        else:
            letters = f"{letters},{term.letters}->{term.others}"
            d_factor += torch.einsum(letters, given, scaled)
    return term.gained(sums)


INPUTS = 4
"""That share a product where each input has one of its own: zeros are multiplied in vain, and it
takes a third of the time."""


def _side_by_side(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(g, o, i, x) and (g, i, e, x) -> (g, i / n, o, n x) and, each on the diagonal of a block,
    (g, i / n, n e, n x)."""
    groups, inputs, expand, taps = factor.shape
    n = math.gcd(INPUTS, inputs)
    blocks = factor.new_zeros(groups, inputs // n, n, expand, n, taps)
    blocks.diagonal(0, 2, 4).copy_(factor.unflatten(1, (-1, n)).movedim(2, -1))
    rows = x.reshape(*x.shape[:2], inputs // n, n * taps).transpose(1, 2)
    return rows, blocks.flatten(4, 5).flatten(2, 3)


def _parted(blocks: Tensor, like: Tensor) -> Tensor:
    """The diagonals of these, (g, i, e, x)."""
    n = like.shape[1] // blocks.shape[1]
    parts = blocks.unflatten(3, (n, -1)).unflatten(2, (n, -1))
    return torch.flatten(parts.diagonal(0, 2, 4).movedim(-1, 2), 1, 2)


def _of(factor: Tensor, term: Term, rows: slice) -> Tensor:
    """Its part for some rows."""
    return factor[:, rows] if "o" in term.others else factor


def _diagonal(part: Tensor, rows: slice) -> Tensor:
    """Where o = i, of some rows: (groups, outputs)."""
    return part[..., 0].diagonal(rows.start, 1, 2)


def _over_taps(x: Tensor) -> Tensor:
    """Summed over the last dimension; for few elements side by side a product is faster."""
    if x.stride(-1) != 1 or x.dtype not in (torch.float32, torch.float64):
        return x.sum(-1)
    return torch.mv(x.reshape(-1, x.shape[-1]), x.new_ones(x.shape[-1])).view(x.shape[:-1])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """(groups, outputs, ...) twice -> ``(x * y)`` summed over all but the first two; half types
    round the sums alone."""
    if x.dtype in (torch.float32, torch.float64):  # twice as fast as a product, in the cache
        return (x * y).sum(tuple(range(2, x.ndim))) if x.ndim > 2 else x * y
    rows, size = x.shape[:2], x.shape[2:].numel()
    return torch.bmm(x.reshape(-1, 1, size), y.reshape(-1, size, 1)).view(rows)


def _paired(site: Site, tensors: Sequence[Tensor | None]) -> list[Operands]:
    """Carrier and factor of each term, of the tensors of all."""
    rest = iter(tensors)

    def take(name: str, letters: str) -> Tensor | None:
        own = next(rest) if name else None
        return None if own is None else flat(own, letters)

    return [(take(t.carrier, t.letters), take(t.factor, t.others)) for t in site.terms]


# --------------------------------------------------------------------------- rows and copies
def _part(x: Any, *where: tuple[int, int, int, int]) -> Any:
    """Ranges: of a dimension, in each of so many blocks, from where, of what size."""
    for dim, outer, start, size in where if x is not None else ():
        if outer > 1:
            x = x.unflatten(dim, (outer, -1)).narrow(dim + 1, start, size)
        elif x.shape[dim] != size:
            x = x.narrow(dim, start, size)
    return x


class _Layer:
    """A site and its tensors: ``scales``, each (groups, outputs, 1, 1); ``operands`` of its terms;
    ``shares`` (groups, outputs, inputs / run, 1), a view as far as rows have the same; where the
    student is a mean by shares, their ``sums`` over copies so far, by what these stand for."""

    def __init__(self, site: Site, tensors: Tensors, teacher: bool) -> None:
        self.site, layer = site, site.layer
        self.all_rows: Rows = slice(0, layer.outputs), [*segments(site.blocks["o"])]
        shape = -1, layer.groups, layer.outputs, 1, 1
        self.scales: Any = tensors[1].reshape(shape) if site.terms else [None]
        pairs = zip(site.terms, _paired(site, tensors[site.first :]), strict=True)
        self.operands = [(p, f if f is None else t.second(f, layer.inputs)) for t, (p, f) in pairs]
        self.shares, self.run = None, 1
        self.sums: dict[Any, Tensor] = {}
        if site.share is not None and (teacher or site.mean):
            _, wide, narrow = inputs = site.blocks["i"]
            run = math.gcd(site.share.run, wide)
            self.run = run if not site.mean or uniform(inputs, narrow, run) else 1
            table, classes = tensors[site.first - 2 : site.first]
            self.shares = site.share.of_inputs(layer, table, classes, tensors[0], self.run)

    def of(self, stored: Tensor, rows: Rows) -> Tensor:
        """Some rows of the teacher's weight, (groups, outputs, inputs, taps)."""
        return self.site.layer.by_taps(stored)[:, rows[0]]

    def blocks(self, whole: bool) -> list[Rows]:
        """Rows that are folded at once. A layer with groups, or with copies that do not stand side
        by side, is one block."""
        layer, blocks = self.site.layer, self.site.blocks["o"]
        step = max(1, BLOCK // max(1, layer.inputs * layer.taps))
        if whole or layer.groups > 1 or blocks[0] > 1 or layer.outputs <= step:
            return [self.all_rows]
        found: list[Rows] = []
        for start, own, size, copy, count in self.all_rows[1]:
            for k in range(0, size, step):
                n = min(step, size - k)
                found.append((slice(start + k, start + k + n), [(0, own + k, n, copy, count)]))
        return found

    def times_shares(self, x: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
        """The rows of the teacher, or those of the gradient."""
        if self.shares is None:
            return x if out is None or x is out else out.copy_(x)
        runs, shares = x.unflatten(2, (-1, self.run)), self.shares[:, rows[0], :, None]
        if out is None:
            return torch.flatten(runs * shares, 2, 3)
        torch.mul(runs, shares, out=out.unflatten(2, (-1, self.run)))
        return out

    def copies(self, rows: Rows, x: Tensor | None) -> list[Any]:
        """Every copy that the student's weight is made of: its number, of how many, the ``_part``
        of the student's weight that it stands for, what it is of a tensor like the teacher's rows,
        and of the shares if that is a mean by them."""
        mine = self.shares[:, rows[0]] if self.site.mean and self.shares is not None else None
        found: list[Any] = [(0, 1, (), x, mine)]
        for d, blocks in reversed([*enumerate(self.site.blocks.values())]):
            outer, run = blocks[0], self.run if d == 2 else 1
            if d == 1 or blocks[1] > blocks[2]:
                found = [
                    (
                        *(copy * of + number, count * of, (*where, (d, outer, own, size))),
                        _part(x, (d, outer, start, size)),
                        _part(share, (d, outer, start // run, max(1, size // run))),
                    )
                    for start, own, size, copy, count in (rows[1] if d == 1 else segments(blocks))
                    if self.site.mean or copy == 0
                    for number, of, where, x, share in found
                ]
        return sorted(found, key=itemgetter(0)) if self.site.mean else found

    def add(self, share: Tensor, where: Any) -> Tensor:
        """To the sum of those so far, which is returned."""
        known = self.sums.get(where)
        self.sums[where] = share if known is None else known + share
        return self.sums[where]

    def merge(self, total: Tensor, own: Tensor, rows: Rows) -> None:
        """First copies of some rows, or their running mean: exact while they are equal."""
        own = self.site.narrow.by_taps(own)
        for number, _, where, part, share in self.copies(rows, total):
            target = _part(own, *where)
            weight = 1 / (number + 1) if share is None else share / self.add(share, where)
            if number == 0:
                target.copy_(part)
            else:
                target.lerp_(part, weight)

    def add_all(self, blocks: Sequence[Rows]) -> None:
        """The shares of all copies to their sums."""
        if self.site.mean and self.shares is not None:
            for rows in blocks:
                for _, _, where, _, share in self.copies(rows, None):
                    self.add(share, where)

    def spread(self, own: Tensor, grad: Tensor, rows: Rows, fresh: bool) -> None:
        """The gradient of ``merge``, added to that of the rows; ``fresh``: nothing is there yet."""
        own = self.site.narrow.by_taps(own)
        for _, count, where, target, share in self.copies(rows, grad):
            part = _part(own, *where)
            mean = 1 / count if self.site.mean else 1
            weight = mean if share is None else share / self.sums[where]
            if fresh:
                torch.mul(part, weight, out=target)
            elif share is None:
                target.add_(part, alpha=weight)
            else:
                target.addcmul_(part, weight)

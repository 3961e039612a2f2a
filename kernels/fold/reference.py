"""The fold of one layer in plain torch, forward and backward.

    W = s_0 origin + sum_b s_b K_b     teacher: W * shares     student: first copies of W, or mean

K_b is what a ``Term`` says; without terms W is the origin. With G the gradient of W, and p the
carrier of a term, in which K is linear,

    m = (dK/dp)^T G        dp = s m        ds[o] = sum of p m over what belongs to row o

and the gradient of a factor is that of K along s p. Rows of a large weight are taken in blocks that
stay in the processor's cache from the first term to the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import wraps
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...branches.term import Term, aligned, flat
from .site import Site, Tensors, room, segments

BLOCK = 2**21
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
    if not teacher and site.apart:
        return None, forward(*alone(site, tensors), True, False, half)[0]
    one, origin = _Layer(site, tensors), tensors[0]
    wide = room(site.layer, origin) if teacher else None
    own = room(site.narrow, origin) if student and (site.distinct or not teacher) else None
    for rows in one.blocks():
        total = one.of(origin, rows)
        if site.terms:
            base, total = total, torch.empty_like(total) if wide is None else one.of(wide, rows)
            torch.mul(base, one.scales[0][:, rows[0]], out=total)
        for k, term in enumerate(site.terms):
            _add(term, total, one.scales[k + 1], one.operands[k], rows[0], half)
        if own is not None:
            one.merge(total, own, rows)
        if wide is not None:
            one.times_shares(total, total if site.terms else one.of(wide, rows), rows)
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
    if teacher is None and site.apart:
        parts = backward(*alone(site, tensors), student, None, half)
        return _pulled_back(site, tensors, lambda own: alone(site, own)[1], parts)
    one, (origin, *rest) = _Layer(site, tensors), tensors
    found: list[Any] = [room(site.layer, origin)]
    both = zip(rest, site.differentiable()[1:], strict=True)
    found += [t.new_empty(t.shape) if trains else None for t, trains in both]
    targets = _paired(site, found[site.first :])
    for _, factor in targets:
        if factor is not None:
            factor.zero_()
    one.add_shares()
    for rows in one.blocks():
        grad = one.of(found[0], rows)
        if teacher is not None:
            one.times_shares(one.of(teacher, rows), grad, rows)
        elif not site.mean:
            grad.zero_()
        if student is not None:
            one.spread(student, grad, rows, fresh=teacher is None and site.mean)
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
    one, rest = _Layer(site, tensors), iter(tensors[site.first :])
    total = site.layer.by_taps(tensors[0])
    if site.terms:
        total = total * one.scales[0]
    for term, scale in zip(site.terms, one.scales[1:], strict=True):
        kernel = term.kernel(site.layer, {name: next(rest) for name in term.names})
        total = total + kernel.reshape(total.shape).to(total) * scale
    wide = own = None
    if teacher:
        wide = site.layer.store(total if one.shares is None else total * one.shares)
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
        profile = scale if factor is None else aligned(factor, term.others)[:, rows] * scale
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
    moved = given = part if letters == "goix" else _over_taps(part)
    many = term.summed and term.letters.startswith("goi") and letters == "goix"
    if many:  # small products, one an input: with rows side by side they take half as long
        given, letters = given.permute(0, 2, 3, 1).contiguous(), "gixo"
    if factor is not None and term.summed:
        given = given if half is None else given.to(half)
        moved = torch.einsum(f"{letters},{term.others}->{term.letters}", given, factor.to(given))
    elif factor is not None:
        moved = torch.matmul(given, factor[:, rows].unsqueeze(3)).squeeze(3)
    size = term.gained(scale[:, rows]).view(*moved.shape[:2], *[1] * (moved.ndim - 2))
    carrier, target = carrier[:, rows], d_carrier[:, rows].copy_(moved)
    sums = _dot(target, carrier)
    target.mul_(size)
    if d_factor is not None:
        scaled, own = (carrier * size).to(given), term.letters
        if many:
            scaled, own = scaled.permute(0, 2, 3, 1).contiguous(), f"gi{own[3]}o"
        d_factor += torch.einsum(f"{letters},{own}->{term.others}", given, scaled)
    return term.gained(sums)


def _diagonal(part: Tensor, rows: slice) -> Tensor:
    """Where o = i, of some rows: (groups, outputs)."""
    return part[..., 0].diagonal(rows.start, 1, 2)


def _over_taps(x: Tensor) -> Tensor:
    """Summed over the last dimension; for few elements side by side a product is faster."""
    if x.stride(-1) != 1 or x.dtype not in (torch.float32, torch.float64):
        return x.sum(-1)
    return torch.mv(x.reshape(-1, x.shape[-1]), x.new_ones(x.shape[-1])).view(x.shape[:-1])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """(groups, outputs, ...) twice -> ``(x * y)`` summed over all but the first two."""
    if x.ndim == 4 and x.stride(3) > x.stride(2):  # as it lies in memory
        x, y = x.transpose(2, 3), y.transpose(2, 3)
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
class _Layer:
    """A site and its tensors: ``scales``, each (groups, outputs, 1, 1); ``operands`` of its terms;
    ``shares`` (groups, outputs, inputs, 1), a view as far as rows have the same; where the student
    is a mean by shares, their ``sums`` over copies so far, of the student's sizes."""

    def __init__(self, site: Site, tensors: Tensors) -> None:
        self.site, layer = site, site.layer
        self.all_rows: Rows = slice(0, layer.outputs), [*segments(site.blocks["o"])]
        shape = -1, layer.groups, layer.outputs, 1, 1
        self.scales: Any = tensors[1].reshape(shape) if site.terms else [None]
        pairs = zip(site.terms, _paired(site, tensors[site.first :]), strict=True)
        self.operands = [(p, f if f is None else t.second(f, layer.inputs)) for t, (p, f) in pairs]
        self.shares = self.sums = None
        if site.share is not None:
            table, classes = tensors[site.first - 2 : site.first]
            self.shares = shares = site.share.of_inputs(layer, table, classes, tensors[0])
            if site.mean:
                self.sums = shares.new_zeros((*site.narrow.shape[:3], 1))

    def of(self, stored: Tensor, rows: Rows) -> Tensor:
        """Some rows of the teacher's weight, (groups, outputs, inputs, taps)."""
        return self.site.layer.by_taps(stored)[:, rows[0]]

    def blocks(self) -> Iterator[Rows]:
        """Rows that are folded at once. A layer with groups, or with copies that do not stand side
        by side, is one block."""
        layer, blocks = self.site.layer, self.site.blocks["o"]
        step = max(1, BLOCK // max(1, layer.inputs * layer.taps))
        if layer.groups > 1 or blocks[0] > 1 or layer.outputs <= step:
            yield self.all_rows
            return
        for start, own, size, copy, count in self.all_rows[1]:
            for k in range(0, size, step):
                n = min(step, size - k)
                yield slice(start + k, start + k + n), [(0, own + k, n, copy, count)]

    def times_shares(self, x: Tensor, out: Tensor, rows: Rows) -> None:
        """The rows of the teacher, or those of the gradient."""
        if self.shares is not None:
            torch.mul(x, self.shares[:, rows[0]], out=out)
        elif x is not out:
            out.copy_(x)

    def copies(
        self, rows: Rows, *pairs: tuple[Tensor | None, Tensor | None]
    ) -> Iterator[tuple[int, int, list[tuple[Any, Any]]]]:
        """Every copy that the student's weight is made of: its number, of how many, and what it is
        of pairs of tensors, which are like the teacher's rows and like the student's weight."""
        blocks = self.site.blocks.values()
        parts = [[*segments(one)] for one in blocks]
        parts[1] = [*rows[1]]
        wide = [(d, outer) for d, (outer, a, b) in enumerate(blocks) if a > b or d == 1]

        def part(x: Tensor | None, starts: Sequence[int], sizes: Sequence[int]) -> Tensor | None:
            for d, outer in reversed(wide) if x is not None else ():
                x = x.unflatten(d, (outer, -1)) if outer > 1 else x  # type: ignore[union-attr]
                x = x.narrow(d + (outer > 1), starts[d], sizes[d])  # type: ignore[union-attr]
            return x

        for each in product(*parts):
            starts, its, sizes, numbers, counts = zip(*each, strict=True)
            number = (numbers[0] * counts[1] + numbers[1]) * counts[2] + numbers[2]
            if number == 0 or self.site.mean:
                count = counts[0] * counts[1] * counts[2] if self.site.mean else 1
                both = [(part(x, starts, sizes), part(y, its, sizes)) for x, y in pairs]
                yield number, count, both

    def _with_sums(self, rows: Rows, x: Tensor, y: Tensor) -> Any:
        mine = None if self.sums is None or self.shares is None else self.shares[:, rows[0]]
        return self.copies(rows, (x, y), (mine, self.sums))

    def merge(self, total: Tensor, own: Tensor, rows: Rows) -> None:
        """First copies of some rows, or their running mean: exact while they are equal."""
        own = self.site.narrow.by_taps(own)
        for number, _, ((part, target), (share, total_share)) in self._with_sums(rows, total, own):
            if total_share is not None:
                total_share.add_(share)
            if number == 0:
                target.copy_(part)
            else:
                weight = 1 / (number + 1) if share is None else share / total_share
                target.lerp_(part, weight)

    def add_shares(self) -> None:
        """All of them to the sums."""
        if self.sums is not None:
            for _, _, ((share, total),) in self.copies(self.all_rows, (self.shares, self.sums)):
                total.add_(share)

    def spread(self, own: Tensor, grad: Tensor, rows: Rows, fresh: bool) -> None:
        """The gradient of ``merge``, added to that of the rows; ``fresh``: nothing is there yet."""
        own = self.site.narrow.by_taps(own)
        for _, count, ((target, part), (share, total)) in self._with_sums(rows, grad, own):
            weight = 1 / count if share is None else share / total
            if fresh:
                torch.mul(part, weight, out=target)
            elif share is None:
                target.add_(part, alpha=weight)
            else:
                target.addcmul_(part, weight)

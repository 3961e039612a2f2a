"""Rules read like einops: ``"... i, o i, o? -> ... o"`` is all there is to say about ``linear``.

Left of the arrow one pattern per tensor argument (``?``: may be None), right of it one per result.

    name        an axis; where a name recurs its axes unify
    (g i)       a product of axes, outer first
    ...         any number of leading or middle dimensions, broadcast between operands
    *s          any number of dimensions along which positions matter (spatial, kernel)
    name!       the op depends on how many indices there are

A name that stands only on the left is contracted: one operand (the last that holds it, a weight
if there is one) is multiplied by shares. A name only on the right is fresh and fixed. A name bound
to an integer argument (``g="groups"``) has that argument's size and is recomputed when it widens.
Where an axis under ``*`` or ``!`` would widen, the op sees it at the student's width, and what
comes out along it is copied again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import fx

from ...algebra.axes import Axis, product
from ...algebra.frozen import share_table
from ...calls.sizes import is_free
from ...errors import AxisConflict
from ...kernels import copies
from ..program import shape, value
from .base import Axes, Op, Rule, Writer, broadcast

Dim = tuple[str, ...]  # the names of one dimension; a starred or dotted name stands alone
_TOKEN = re.compile(r"\(([^)]*)\)|(\S+)")


@dataclass(frozen=True)
class Signature:
    inputs: tuple[tuple[Dim, ...], ...]
    optional: tuple[bool, ...]
    outputs: tuple[tuple[Dim, ...], ...]
    fixed: frozenset[str]

    @property
    def contracted(self) -> list[str]:
        left = [n for dims in self.inputs for dim in dims for n in dim]
        right = {n for dims in self.outputs for dim in dims for n in dim}
        names = dict.fromkeys(n for n in left if n not in right and n not in self.fixed)
        return [n for n in names if n[0] not in "*."]


class SignatureError(ValueError):
    """A signature that cannot be read; shows the place."""

    def __init__(self, message: str, text: str, at: int) -> None:
        super().__init__(f"{message}\n    {text}\n    {' ' * at}^")


def parse(text: str) -> Signature:
    """Parse a signature; raises ``SignatureError`` that shows the offending part."""
    arrow = text.find("->")
    if text.count("->") != 1:
        raise SignatureError("a signature has one ->", text, text.rfind("->") % (len(text) + 1))
    fixed: set[str] = set()

    def dims(start: int, end: int) -> tuple[Dim, ...]:
        found: list[Dim] = []
        for token in _TOKEN.finditer(text, start, end):
            group, single = token.groups()
            names = (single,) if group is None else tuple(group.split())
            fixed.update(n.rstrip("!") for n in names if n.endswith("!"))
            names = tuple(n.rstrip("!") for n in names)
            bad = [n for n in names if not re.fullmatch(r"\.\.\.|\*?[A-Za-z_]\w*", n)]
            if bad or not names or (len(names) > 1 and any(n[0] in "*." for n in names)):
                raise SignatureError(f"cannot read {token.group()!r}", text, token.start())
            if names[0][0] in "*." and any(dim[0][0] in "*." for dim in found):
                raise SignatureError("one ... or *name per operand", text, token.start())
            found.append(names)
        return tuple(found)

    def operands(start: int, end: int) -> Iterator[tuple[int, int]]:
        for pattern in text[start:end].split(","):
            yield start, start + len(pattern.rstrip())
            start += len(pattern) + 1

    left = [(a, b, text[a:b].endswith("?")) for a, b in operands(0, arrow)]
    return Signature(
        tuple(dims(a, b - optional) for a, b, optional in left),
        tuple(optional for *_, optional in left),
        tuple(dims(a, b) for a, b in operands(arrow + 2, len(text))),
        frozenset(fixed),
    )


def sig(text: str, names: str = "", **bound: str) -> Rule:
    """A rule from a signature. ``names``: the schema names of its operands (by default the
    tensor arguments in order); ``bound``: axis name -> integer argument with its size."""
    signature = parse(text)
    operands = tuple(names.split()) or None
    keys = tuple(bound.items())
    return Rule(
        partial(infer, signature, operands, keys), partial(widen, signature, operands, keys)
    )


def _operands(op: Op, signature: Signature, names: tuple[str, ...] | None) -> list[Any]:
    if names is None:
        schema = op.node.target._schema.arguments  # type: ignore[union-attr]
        names = tuple(a.name for a in schema if "Tensor" in str(a.type))
    given = [op[name] for name in names[: len(signature.inputs)]]
    for x, optional in zip(given, signature.optional, strict=False):
        if x is None and not optional:
            op.conflict("a tensor argument is missing")
    return given


def infer(
    signature: Signature, names: tuple[str, ...] | None, bound: tuple[tuple[str, str], ...], op: Op
) -> Any:
    env = op.env
    rest: dict[str, Axes] = {}
    for name, argument in bound:
        if isinstance(op[argument], fx.Node):
            op.conflict(f"{argument} is computed by the network")
        env[name] = op.free(int(op[argument]))
        op.solver.mark(op.solver.outer, env[name])
    moving: set[int] = set()  # which starred dimensions may widen, counted from the first
    given = list(zip(_operands(op, signature, names), signature.inputs, strict=False))
    free = {
        n for x, dims in given if x is not None and not op.is_static(x) for dim in dims for n in dim
    }
    for x, dims in given:
        if x is not None:  # a weight's own axis under ! stays, the one that it meets need not
            apart = free & signature.fixed if op.is_static(x) else set()
            _match(op, x, dims, rest, moving, apart)
            _hold(op, signature, x, dims)
    for name in signature.contracted:
        if name in env:
            op.solver.mark(op.solver.contracted, env[name])
    values = op.node.meta["val"]
    many = isinstance(values, tuple | list)
    sizes = [list(shape(v)) for v in (values if many else [values])]
    outputs = [
        _output(op, dims, rest, size, moving)
        for dims, size in zip(signature.outputs, sizes, strict=False)
    ]
    return outputs if many else outputs[0]


def _layout(dims: tuple[Dim, ...], rank: int) -> list[tuple[Dim, int]]:
    """For every dimension of a tensor its pattern, and its place under it from the right."""
    many = next((k for k, dim in enumerate(dims) if dim[0][0] in "*."), len(dims))
    extra = rank - len(dims) + 1 if many < len(dims) else 0
    if extra < 0 or (many == len(dims) and rank != len(dims)):
        raise AxisConflict(f"an operand has {rank} dimensions, its pattern {len(dims)}")
    single = [(dim, 0) for dim in dims]
    middle = [(dims[many], extra - 1 - k) for k in range(extra)]
    return [*single[:many], *middle, *single[many + 1 :]]


def _hold(op: Op, signature: Signature, x: fx.Node, dims: tuple[Dim, ...]) -> None:
    """Names with ``!``: see the axis at the student's width, spread the output's again."""
    result = _layout(signature.outputs[0], len(op.out_shape)) if signature.fixed else []
    for d, place in enumerate(_layout(dims, len(op.axes(x)))):
        if place[0][0] in signature.fixed:
            out = result.index(place) if place in result else None
            op.hold(x, d, "statistics along it are contracted", out)


def _match(
    op: Op,
    x: fx.Node,
    dims: tuple[Dim, ...],
    rest: dict[str, Axes],
    moving: set[int],
    apart: set[str],
) -> None:
    """Bind the names of one operand, but for those that it has ``apart`` from the others."""
    axes = op.axes(x)
    layout = _layout(dims, len(axes))
    for name in {dim[0] for dim in dims if dim[0][0] in "*."}:
        middle = tuple(a for a, (dim, _) in zip(axes, layout, strict=True) if dim[0] == name)
        if name == "...":
            rest[name] = broadcast(op, rest.get(name, ()), middle)
            continue
        rest[name] = middle
        for d, (dim, right) in enumerate(layout):
            if dim[0] == name and op.is_static(x):
                op.fix(axes[d], "kernel")
            elif dim[0] == name and op.hold(x, d, "the op slides along it"):
                moving.add(right)
    for axis, (dim, _) in zip(axes, layout, strict=True):
        if dim[0][0] not in "*." and not apart.intersection(dim):
            _bind_product(op, axis, dim)


def _bind_product(op: Op, axis: Axis, dim: Dim) -> None:
    unknown = [n for n in dim if n not in op.env]
    known = 1
    for n in dim:
        known *= op.env[n].size if n in op.env else 1
    if len(unknown) > 1 or (known and axis.size % known):
        op.conflict(f"a dimension of size {axis.size} does not read as ({' '.join(dim)})")
    if len(dim) == 1 and unknown:
        op.env[dim[0]] = axis
        return
    for n in unknown:
        op.env[n] = op.free(axis.size // known)
    whole = product(*(op.env[n] for n in dim))
    if whole.size != axis.size and axis.size == 1:
        return  # broadcasts
    op.unify(axis, whole)


def _output(
    op: Op, dims: tuple[Dim, ...], rest: dict[str, Axes], sizes: list[int], moving: set[int]
) -> Axes:
    result: list[Axis] = []
    for d, (dim, right) in enumerate(_layout(dims, len(sizes))):
        name = dim[0]
        if name in rest:
            result.append(rest[name][-1 - right])
            op.spread |= {d} if name[0] == "*" and right in moving else set()
        elif name[0] == "*":
            result.append(op.free(sizes[d]) if right in moving else op.fixed(sizes[d]))
            op.spread |= {d} if right in moving else set()
        else:
            for n in dim:
                if n not in op.env:
                    op.env[n] = op.fixed(sizes[d], "fresh")
            result.append(product(*(op.env[n] for n in dim)))
    return tuple(result)


def widen(
    signature: Signature,
    names: tuple[str, ...] | None,
    bound: tuple[tuple[str, str], ...],
    w: Writer,
) -> fx.Node:
    op = w.op
    changes: dict[str, Any] = {}
    for name, argument in bound:
        if w.wide(op.env[name]):
            changes[argument] = w.frozen(op.env[name]).teacher
    given = _operands(op, signature, names)
    schema = names or tuple(
        a.name
        for a in op.node.target._schema.arguments  # type: ignore[union-attr]
        if "Tensor" in str(a.type)
    )
    for name in signature.contracted:
        if name in op.env and w.wide(op.env[name]):
            holders = [
                k
                for k, dims in enumerate(signature.inputs[: len(given)])
                if given[k] is not None and any(name in dim for dim in dims)
            ]
            weights = [k for k in holders if op.is_static(given[k])]
            k = (weights or holders)[-1]
            operand = changes.get(schema[k], w[schema[k]])
            outputs = {n for dims in signature.outputs for dim in dims for n in dim}
            rows = outputs if weights else set()
            changes[schema[k]] = apply_share(w, operand, given[k], signature.inputs[k], name, rows)
    return w.copy(**changes)


def apply_share(
    w: Writer, operand: Any, student: fx.Node, dims: tuple[Dim, ...], name: str, rows: set[str]
) -> fx.Node:
    """``operand * shares`` along the axis ``name``, one set of shares per index of ``rows``, but
    for those along a size that is known at run time (a parameter expanded to the batch)."""
    axes, env, free = w.op.axes(student), w.op.env, list(map(is_free, value(student).shape))
    sizes: list[int] = []  # of the table, before its class dimension is expanded
    at = place = 0
    split = None
    for d, (dim, _) in enumerate(_layout(dims, len(axes))):
        if name in dim:
            place, at = d, len(sizes) + dim.index(name)
            split = [w.frozen(env[n]).teacher for n in dim] if len(dim) > 1 else None
            sizes += [w.frozen(env[n]).teacher if n in rows else 1 for n in dim]
        else:
            sizes.append(w.frozen(axes[d]).teacher if rows & set(dim) and not free[d] else 1)
    return share_along(w, operand, student, env[name], sizes, at, place, split)


def share_along(
    w: Writer,
    operand: Any,
    student: fx.Node,
    axis: Axis,
    sizes: list[int],
    at: int,
    dim: int,
    split: list[int] | None = None,
) -> fx.Node:
    """The node that multiplies by shares. ``sizes``: the table's, ``at``: its class dimension;
    ``split``: the factors of the operand's dimension ``dim``, if it is a product."""
    frozen = w.static(axis)
    classes, run = frozen.classes[0], frozen.run
    if run > 1:  # neighbours share a class: multiply by (runs, 1) instead of one by one
        inside = at - dim if split else 0
        split = [*(split or [frozen.teacher])]
        split[inside : inside + 1] = [frozen.teacher // run, run]
        sizes = [*sizes[: at + 1], 1, *sizes[at + 1 :]]
    rows = [*sizes[:at], *sizes[at + 1 :]]

    def table(draw: Any) -> Any:
        return np.ascontiguousarray(np.moveaxis(share_table(frozen, rows, draw), -1, at))

    layout = (at, tuple(sizes), len(frozen.classes[1]))
    key = w.target.share_key(w.mode, student, w.op.node, layout)
    shares = w.target.share(w.mode, key, table)
    index = w.constant(classes[::run])
    return w.call(copies.share, operand, shares, index, at - len(sizes), dim, split)

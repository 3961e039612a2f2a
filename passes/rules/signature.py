"""Rules read like einops: ``"... i, o i, o? -> ... o"`` is all there is to say about ``linear``.

Left of the arrow one pattern per tensor argument (``?``: may be None), right of it one per result.

    name        an axis; where a name recurs its axes unify (sizes of one broadcast)
    (g i)       a product of axes, outer first
    ...         any number of leading or middle dimensions, broadcast between operands
    *s          any number of dimensions along which positions matter (spatial, kernel); beside
                ``...`` it is one dimension, counted from the right: ``... *h *w -> ... *y *x``
    name!       the op depends on how many indices there are
    name^       heads, groups: widens before other factors of its product
    name#kind   does not widen, for a reason of that kind

A name that stands only on the left is contracted: one operand (the last that holds it, a weight
if there is one) is multiplied by shares. A name only on the right is fresh and fixed. A name bound
to an integer argument (``g="groups"``) has that argument's size and is recomputed when it widens
(``a="kernel_size.0"``: one of a list, an axis that stays).
Where an axis under ``*`` or ``!`` would widen, the op sees it at the student's width, and what
comes out along it is copied again. Of signatures with ``|`` between them the first counts that has
the operands' ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import fx

from ...algebra.axes import Axis, product
from ...algebra.frozen import share_table
from ...calls.sizes import is_free
from ...errors import AxisConflict
from ...kernels import copies
from ..program import is_tensor, shape, value
from .op import Axes, Op, broadcast, outputs
from .writer import Rule, Writer

Dim = tuple[str, ...]  # the names of one dimension; a starred or dotted name stands alone
Pattern = tuple[Dim, ...]
_TOKEN = re.compile(r"\(([^)]*)\)|(\S+)")
_NAME = re.compile(r"(\.\.\.|\*?[A-Za-z_]\w*)([!^]*)(?:#(\w+))?")


@dataclass(frozen=True)
class Signature:
    """``fixed``: names with ``!``; ``outer``: with ``^``; ``stays``: name -> kind after ``#``."""

    inputs: tuple[Pattern, ...]
    optional: tuple[bool, ...]
    outputs: tuple[Pattern, ...]
    fixed: frozenset[str]
    outer: frozenset[str]
    stays: dict[str, str]

    @property
    def results(self) -> set[str]:
        """Every name on the right."""
        return {n for dims in self.outputs for dim in dims for n in dim}

    @property
    def contracted(self) -> list[str]:
        left = [n for dims in self.inputs for dim in dims for n in dim]
        gone = dict.fromkeys(n for n in left if n not in self.results and n not in self.fixed)
        return [n for n in gone if n[0] not in "*."]


class SignatureError(ValueError):
    """A signature that cannot be read; shows the place."""

    def __init__(self, message: str, text: str, at: int) -> None:
        super().__init__(f"{message}\n    {text}\n    {' ' * at}^")


@lru_cache(maxsize=1024)
def parse(text: str) -> Signature:
    """Parse a signature; raises ``SignatureError`` that shows the offending part."""
    arrow = text.find("->")
    if text.count("->") != 1:
        raise SignatureError("a signature has one ->", text, text.rfind("->") % (len(text) + 1))
    marked: dict[str, set[str]] = {"!": set(), "^": set()}
    stays: dict[str, str] = {}

    def dims(start: int, end: int) -> Pattern:
        found: list[Dim] = []
        many: list[int] = []  # where ... and *name stand
        for token in _TOKEN.finditer(text, start, end):
            group, single = token.groups()
            words = [_NAME.fullmatch(n) for n in ([single] if group is None else group.split())]
            names = tuple(word[1] for word in words if word)
            if not names or None in words or (len(names) > 1 and any(n[0] in "*." for n in names)):
                raise SignatureError(f"cannot read {token.group()!r}", text, token.start())
            for name, marks, kind in (word.groups() for word in words if word):
                for mark in marks:
                    marked[mark].add(name)
                stays.update({name: kind} if kind else {})
            many += [token.start()] if names[0][0] in "*." else []
            found.append(names)
        if len(many) > 1 and found.count(("...",)) != 1:
            raise SignatureError("one ... or *name per operand", text, many[1])
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
        frozenset(marked["!"]),
        frozenset(marked["^"]),
        stays,
    )


def sig(text: str, names: str = "", **bound: str) -> Rule:
    """A rule from a signature. ``names``: the schema names of its operands (by default the
    tensor arguments in order); ``bound``: axis name -> integer argument with its size."""
    several = tuple(map(parse, text.split("|")))
    operands = tuple(names.split())
    return replace(by(partial(_of_ranks, several, operands), names, **bound), text=text)


def by(choose: Callable[[Op], Signature], names: str = "", **bound: str) -> Rule:
    """As ``sig``, where the signature follows from the node."""
    rest = tuple(names.split()), tuple(bound.items())
    return Rule(lambda op: infer(choose(op), *rest, op), lambda w: widen(choose(w.op), *rest, w))


def rows(table: dict[str, Rule | str]) -> dict[Any, Rule]:
    """Names of ATen overloads -> their rule, or its signature. ``amax`` is ``amax.default``."""
    found: dict[Any, Rule] = {}
    for names, said in table.items():
        rule = sig(said) if isinstance(said, str) else said
        for name in names.split():
            packet, _, overload = name.partition(".")
            found[getattr(getattr(torch.ops.aten, packet), overload or "default")] = rule
    return found


def _of_ranks(several: tuple[Signature, ...], names: tuple[str, ...], op: Op) -> Signature:
    def fits(signature: Signature) -> bool:
        try:
            given = _operands(op, signature, names).values()
            return all(_layout(dims, len(op.axes(x))) is not None for x, dims in given)
        except AxisConflict:
            return False

    return next(filter(fits, several[:-1]), several[-1])


def _operands(
    op: Op, signature: Signature, names: tuple[str, ...]
) -> dict[str, tuple[fx.Node, Pattern]]:
    """The tensors that are given, by schema name, with their patterns."""
    if not names:
        schema = op.node.target._schema.arguments  # type: ignore[union-attr]
        names = tuple(a.name for a in schema if "Tensor" in str(a.type))
    given = {}
    for name, dims, optional in zip(names, signature.inputs, signature.optional, strict=False):
        if is_tensor(op[name]):
            given[name] = op[name], dims
        elif not optional:
            op.conflict("a tensor argument is missing")
    return given


# --------------------------------------------------------------------------- to infer
Stretch = dict[tuple[str, int], Axis]
"""What ``...`` and ``*name`` stand for: name and place from the right -> axis."""


def infer(
    signature: Signature, names: tuple[str, ...], bound: tuple[tuple[str, str], ...], op: Op
) -> Any:
    many: Stretch = {}
    for name, argument in bound:
        argument, _, place = argument.partition(".")
        size = op[argument][int(place)] if place else op[argument]
        if isinstance(size, fx.Node):
            op.conflict(f"{argument} is computed by the network")
        op.env[name] = _new(op, signature, name, int(size))
        if name not in signature.stays:
            op.solver.mark(op.solver.outer, op.env[name])
    moving: set[int] = set()  # which starred dimensions may widen, counted from the right
    given = _operands(op, signature, names).values()
    free = {n for x, dims in given if not op.is_static(x) for dim in dims for n in dim}
    for x, dims in given:  # a weight's own axis under ! stays, the one that it meets need not
        apart = free & signature.fixed if op.is_static(x) else set()
        _match(op, signature, x, dims, many, moving, apart)
        _hold(op, signature, x, dims)
    for marks, marked in (
        (op.solver.contracted, signature.contracted),
        (op.solver.outer, signature.outer),
    ):
        for name in marked:
            for axis in [op.env[name]] if name in op.env else _stretch(many, name):
                op.solver.mark(marks, axis)
    shapes = map(shape, outputs(op.node))
    results = [
        _output(op, signature, dims, many, list(sizes), moving)
        for dims, sizes in zip(signature.outputs, shapes, strict=False)
    ]
    return results if isinstance(value(op.node), tuple | list) else results[0]


def _new(op: Op, signature: Signature, name: str, size: int, fresh: str = "") -> Axis:
    kind = signature.stays.get(name, fresh)
    return op.fixed(size, kind) if kind else op.free(size)


def _stretch(many: Stretch, name: str) -> Axes:
    places = sorted((right for n, right in many if n == name), reverse=True)
    return tuple(many[name, right] for right in places)


def _layout(dims: Pattern, rank: int) -> list[tuple[Dim, int]]:
    """For every dimension of a tensor its pattern, and its place under it from the right."""
    stars = [dim[0][0] == "*" for dim in dims]
    at = dims.index(("...",)) if ("...",) in dims else stars.index(True) if any(stars) else None
    extra = rank - len(dims) + 1
    if extra < 0 or (at is None and extra != 1):
        raise AxisConflict(f"an operand has {rank} dimensions, its pattern {len(dims)}")
    single = [(dim, sum(stars[k + 1 :]) if stars[k] else 0) for k, dim in enumerate(dims)]
    if at is not None:
        single[at : at + 1] = [(dims[at], right) for right in reversed(range(extra))]
    return single


def _hold(op: Op, signature: Signature, x: fx.Node, dims: Pattern) -> None:
    """Names with ``!``: see the axis at the student's width, spread the output's again."""
    result = _layout(signature.outputs[0], len(op.out_shape)) if signature.fixed else []
    for d, place in enumerate(_layout(dims, len(op.axes(x)))):
        if place[0][0] in signature.fixed:
            out = result.index(place) if place in result else None
            op.hold(x, d, "statistics along it are contracted", out)


def _match(
    op: Op,
    signature: Signature,
    x: fx.Node,
    dims: Pattern,
    many: Stretch,
    moving: set[int],
    apart: set[str],
) -> None:
    """Bind the names of one operand, but for those that it has ``apart`` from the others."""
    axes = op.axes(x)
    layout = _layout(dims, len(axes))
    dotted = tuple(a for a, (dim, _) in zip(axes, layout, strict=True) if dim[0] == "...")
    dotted = broadcast(op, _stretch(many, "..."), dotted)
    many.update({("...", right): axis for right, axis in enumerate(reversed(dotted))})
    for d, (dim, right) in enumerate(layout):
        if dim[0][0] == "*":
            many[dim[0], right] = axes[d]
            if op.is_static(x):
                op.fix(axes[d], "kernel")
            elif op.hold(x, d, "the op slides along it"):
                moving.add(right)
    for axis, (dim, _) in zip(axes, layout, strict=True):
        if dim[0][0] not in "*." and not apart.intersection(dim):
            _bind_product(op, signature, axis, dim)


def _bind_product(op: Op, signature: Signature, axis: Axis, dim: Dim) -> None:
    unknown = [n for n in dim if n not in op.env]
    known = product(*(op.env[n] for n in dim if n in op.env)).size
    if len(dim) == 1 and (unknown or known == 1):
        op.env[dim[0]] = axis
    elif axis.size == 1 and not unknown:
        return  # broadcasts
    elif len(unknown) > 1 or (known and axis.size % known):
        op.conflict(f"a dimension of size {axis.size} does not read as ({' '.join(dim)})")
    else:
        for n in unknown:
            op.env[n] = _new(op, signature, n, axis.size // known)
        op.unify(axis, product(*(op.env[n] for n in dim)))


def _output(
    op: Op, signature: Signature, dims: Pattern, many: Stretch, sizes: list[int], moving: set[int]
) -> Axes:
    result: list[Axis] = []
    for d, (dim, right) in enumerate(_layout(dims, len(sizes))):
        name = dim[0]
        if name[0] == "*":
            if (name, right) not in many:
                many[name, right] = op.free(sizes[d]) if right in moving else op.fixed(sizes[d])
            op.spread |= {d} if right in moving else set()
        if name[0] in "*.":
            result.append(many[name, right])
            continue
        for n in dim:
            if n not in op.env:
                op.env[n] = _new(op, signature, n, sizes[d], "fresh")
        result.append(product(*(op.env[n] for n in dim)))
    return tuple(result)


# --------------------------------------------------------------------------- to widen
def widen(
    signature: Signature, names: tuple[str, ...], bound: tuple[tuple[str, str], ...], w: Writer
) -> fx.Node:
    sizes = {a: w.frozen(w.op.env[n]).teacher for n, a in bound if w.wide(w.op.env[n])}
    return w.copy(**sizes, **shared(signature, names, w))


def shared(signature: Signature, names: tuple[str, ...], w: Writer) -> dict[str, fx.Node]:
    """The operands that are multiplied by shares, by schema name."""
    changes: dict[str, fx.Node] = {}
    given = _operands(w.op, signature, names)
    for name in signature.contracted:
        if name in w.op.env and w.wide(w.op.env[name]):
            holders = [k for k, (_, dims) in given.items() if any(name in dim for dim in dims)]
            weights = [k for k in holders if w.op.is_static(given[k][0])]
            k = (weights or holders)[-1]
            rows = signature.results if weights else set()
            changes[k] = apply_share(w, changes.get(k, w[k]), *given[k], name, rows)
    return changes


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

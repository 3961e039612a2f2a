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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import fx

from ...algebra.axes import Axis, Leaf, product
from ...algebra.frozen import share_table
from ...calls.held import has_gradient
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
    several = [parse(one) for one in text.split("|")]

    def choose(op: Op) -> Signature:
        fitting = (signature for signature in several[:-1] if _fits(op, signature, names.split()))
        return next(fitting, several[-1])

    return replace(by(choose, names, **bound), text=text)


def by(choose: Callable[[Op], Signature], names: str = "", **bound: str) -> Rule:
    """As ``sig``, where the signature follows from the node."""
    return Rule(lambda op: infer(op, choose(op), names.split(), bound), partial(widen, bound=bound))


def rows(table: dict[str, Rule | str]) -> dict[Any, Rule]:
    """Names of ATen overloads -> their rule, or its signature. ``amax`` is ``amax.default``."""
    found: dict[Any, Rule] = {}
    for names, said in table.items():
        rule = sig(said) if isinstance(said, str) else said
        for name in names.split():
            packet, _, overload = name.partition(".")
            found[getattr(getattr(torch.ops.aten, packet), overload or "default")] = rule
    return found


# --------------------------------------------------------------------------- operands
Layout = Sequence[tuple[Dim, int]]
"""For every dimension of a tensor its pattern, and its place under it from the right."""


def _fits(op: Op, signature: Signature, names: list[str]) -> bool:
    try:
        Match(op, signature, names)
    except AxisConflict:
        return False
    return True


def layout(dims: Pattern, rank: int) -> Layout:
    stars = [dim[0][0] == "*" for dim in dims]
    at = dims.index(("...",)) if ("...",) in dims else stars.index(True) if any(stars) else None
    extra = rank - len(dims) + 1
    if extra < 0 or (at is None and extra != 1):
        raise AxisConflict(f"an operand has {rank} dimensions, its pattern {len(dims)}")
    single = [(dim, sum(stars[k + 1 :]) if stars[k] else 0) for k, dim in enumerate(dims)]
    if at is not None:
        single[at : at + 1] = [(dims[at], right) for right in reversed(range(extra))]
    return single


class Match:
    """A signature laid on the operands of an op.

    ``given``: schema name -> the tensor and its layout; ``many``: what ``...`` and ``*name`` stand
    for, by name and place from the right; ``moving``: starred dimensions that may widen.
    """

    def __init__(self, op: Op, signature: Signature, names: Sequence[str]) -> None:
        self.op, self.signature, self.env = op, signature, op.env
        self.given: dict[str, tuple[fx.Node, Layout]] = {}
        self.many: dict[tuple[str, int], Axis] = {}
        self.moving: set[int] = set()
        names = names or tensor_arguments(op.node.target)
        for name, dims, optional in zip(names, signature.inputs, signature.optional, strict=False):
            if is_tensor(op[name]):
                self.given[name] = op[name], layout(dims, len(op.axes(name)))
            elif not optional:
                op.conflict("a tensor argument is missing")

    def new(self, name: str, size: int, fresh: str = "") -> Axis:
        kind = self.signature.stays.get(name, fresh)
        return self.op.fixed(size, kind) if kind else self.op.free(size)

    def stretch(self, name: str) -> Axes:
        places = sorted((right for n, right in self.many if n == name), reverse=True)
        return tuple(self.many[name, right] for right in places)

    def mark(self, marks: dict[Leaf, bool], names: Iterable[str]) -> None:
        for name in names:
            for axis in [self.env[name]] if name in self.env else self.stretch(name):
                self.op.solver.mark(marks, axis)

    def bind(self, x: fx.Node, places: Layout, apart: set[str]) -> None:
        """Bind the names of one operand, but for those that it has ``apart`` from the others."""
        op, axes = self.op, self.op.axes(x)
        dotted = tuple(a for a, (dim, _) in zip(axes, places, strict=True) if dim[0] == "...")
        dotted = broadcast(op, self.stretch("..."), dotted)
        self.many.update({("...", right): axis for right, axis in enumerate(reversed(dotted))})
        for d, (dim, right) in enumerate(places):
            if dim[0][0] == "*":
                self.many[dim[0], right] = axes[d]
                if op.is_static(x):
                    op.fix(axes[d], "kernel")
                elif op.hold(x, d, "the op slides along it"):
                    self.moving.add(right)
        for axis, (dim, _) in zip(axes, places, strict=True):
            if dim[0][0] not in "*." and not apart.intersection(dim):
                self.bind_product(axis, dim)

    def bind_product(self, axis: Axis, dim: Dim) -> None:
        env = self.env
        unknown = [n for n in dim if n not in env]
        known = product(*(env[n] for n in dim if n in env)).size
        if len(dim) == 1 and (unknown or known == 1):
            env[dim[0]] = axis
        elif axis.size == 1 and not unknown:
            return  # broadcasts
        elif len(unknown) > 1 or (known and axis.size % known):
            self.op.conflict(f"a dimension of size {axis.size} does not read as ({' '.join(dim)})")
        else:
            for n in unknown:
                env[n] = self.new(n, axis.size // known)
            self.op.unify(axis, product(*(env[n] for n in dim)))

    def hold(self, x: fx.Node, places: Layout) -> None:
        """Names with ``!``: see the axis at the student's width, spread the output's again."""
        fixed = self.signature.fixed
        result = layout(self.signature.outputs[0], len(self.op.out_shape)) if fixed else []
        for d, place in enumerate(places):
            if place[0][0] in fixed:
                out = result.index(place) if place in result else None
                self.op.hold(x, d, "statistics along it are contracted", out)

    def result(self, dims: Pattern, sizes: tuple[int, ...]) -> Axes:
        axes: list[Axis] = []
        for d, (dim, right) in enumerate(layout(dims, len(sizes))):
            if dim[0][0] == "*":
                make = self.op.free if right in self.moving else self.op.fixed
                if (dim[0], right) not in self.many:
                    self.many[dim[0], right] = make(sizes[d])
                self.op.spread |= {d} if right in self.moving else set()
            if dim[0][0] in "*.":
                axes.append(self.many[dim[0], right])
                continue
            for n in dim:
                if n not in self.env:
                    self.env[n] = self.new(n, sizes[d], "fresh")
            axes.append(product(*(self.env[n] for n in dim)))
        return tuple(axes)


def tensor_arguments(op: Any) -> list[str]:
    """Their schema names."""
    return [a.name for a in op._schema.arguments if "Tensor" in str(a.type)]


# --------------------------------------------------------------------------- to infer
def infer(op: Op, signature: Signature, names: Sequence[str], bound: dict[str, str]) -> Any:
    op.match = match = Match(op, signature, names)
    for name, argument in bound.items():
        argument, _, place = argument.partition(".")
        size = op[argument][int(place)] if place else op[argument]
        if isinstance(size, fx.Node):
            op.conflict(f"{argument} is computed by the network")
        op.env[name] = match.new(name, int(size))
        if name not in signature.stays:
            op.solver.mark(op.solver.outer, op.env[name])
    given = match.given.values()
    free = {n for x, places in given if not op.is_static(x) for dim, _ in places for n in dim}
    for x, places in given:  # a weight's own axis under ! stays, the one that it meets need not
        match.bind(x, places, free & signature.fixed if op.is_static(x) else set())
        match.hold(x, places)
    match.mark(op.solver.contracted, signature.contracted)
    match.mark(op.solver.outer, signature.outer)
    shapes = map(shape, outputs(op.node))
    results = [match.result(*one) for one in zip(signature.outputs, shapes, strict=False)]
    return results if isinstance(value(op.node), tuple | list) else results[0]


# --------------------------------------------------------------------------- to widen
def widen(w: Writer, bound: dict[str, str]) -> fx.Node:
    sizes = {a: w.frozen(w.op.env[n]).teacher for n, a in bound.items() if w.wide(w.op.env[n])}
    return w.copy(**sizes, **shared(w))


def shared(w: Writer) -> dict[str, fx.Node]:
    """The operands that are multiplied by shares, by schema name."""
    changes: dict[str, fx.Node] = {}
    given, signature = w.op.match.given, w.op.match.signature
    for name in signature.contracted:
        if name in w.op.env and w.wide(w.op.env[name]):
            holders = [k for k, (_, places) in given.items() if any(name in d for d, _ in places)]
            holders = [k for k in holders if has_gradient(value(given[k][0]))] or holders
            weights = [k for k in holders if w.op.is_static(given[k][0])]
            k = (weights or holders)[-1]
            x, places = given[k]
            rows = signature.results if weights else set()
            changes[k] = apply_share(w, changes.get(k, w[k]), x, places, name, rows)
    return changes


def apply_share(
    w: Writer, operand: Any, student: fx.Node, places: Layout, name: str, rows: set[str]
) -> fx.Node:
    """``operand * shares`` along the axis ``name``, one set of shares per index of ``rows``, but
    for those along a size that is known at run time (a parameter expanded to the batch)."""
    axes, env, free = w.op.axes(student), w.op.env, list(map(is_free, value(student).shape))
    sizes: list[int] = []  # of the table, before its class dimension is expanded
    at = place = 0
    split = None
    for d, (dim, _) in enumerate(places):
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
    ``split``: the factors of the operand's dimension ``dim``, if it is a product. Raises
    ``AxisConflict`` for integers (a count of what is positive), which are bridged."""
    dtype = value(student).dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        w.op.conflict("integers cannot be multiplied by shares")
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

"""Run an op to see whether it bears out its rule.

What a rule claims of an axis is that the op on copies gives copies, whichever index is copied how
often (a contracted one after multiplying by shares). So the op is run as it is, and once more with
the axis widened by a random surjection, by the very code that writes teachers: for each axis in
turn, then for all together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from ..algebra.axes import ONE, Axis, Leaf, leaves
from ..algebra.frozen import Frozen, compose
from ..algebra.gather import gather
from ..algebra.solver import Solver
from ..passes.infer import Inference
from ..passes.program import size_hint
from ..passes.rules.base import Axes, Op, Rule, Target, parts
from ..passes.widen import GraphWriter
from .observe import difference, keep_rng


@dataclass(frozen=True)
class Fault:
    """What is wrong with a rule. ``untried``: nothing, perhaps; the op could not be run."""

    text: str
    remedy: str
    untried: bool = False


def check_rule(
    rule: Rule, op: Any, args: Any, kwargs: Any, static: Sequence[bool], strict: bool
) -> Fault | None:
    """The first fault of a rule for ``op`` on random tensors like these, if it has any.

    The tensors may be fake ones. ``static``: which of them, in order, come from weights alone (the
    one that shares multiply is chosen by that); ``strict``: a named axis of size one, of which
    nothing would show, is a fault.
    """
    with torch.no_grad(), keep_rng():
        sample = _sample(op, args, kwargs)
        if isinstance(sample, Fault):
            return sample
        return _OpCheck(rule, op, *sample, static).fault(strict)


def shown(x: Any) -> str:
    """An argument, a tensor by shape and type."""
    if not isinstance(x, Tensor):
        return repr(x)
    return " x ".join(str(size_hint(s)) for s in x.shape) + f" {str(x.dtype).split('.')[-1]}"


# --------------------------------------------------------------------------- values
def _sample(op: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any] | Fault:
    """Arguments like these, and what the op makes of them: finite, and not zero. In float64 if
    the op can; normal values, positive ones, or the arguments' own."""
    why = "its results are zero, or not finite"
    for double, values in itertools.product((True, False), ("normal", "positive", "own")):
        draw = torch.Generator().manual_seed(0)

        def like(x: Any, draw: Any = draw, double: Any = double, values: Any = values) -> Any:
            return _like(x, draw, double, values) if isinstance(x, Tensor) else x

        new_args, new_kwargs = pytree.tree_map(like, (args, kwargs))
        try:
            result = _seeded(op, new_args, new_kwargs)
        except Exception as error:  # whatever the user's op raises
            why = str(error).strip().split("\n")[0] or type(error).__name__
            continue
        floating = [y for y in pytree.tree_leaves(result) if not _integral(y)]
        if all(y.isfinite().all() and y.any() for y in floating):
            return new_args, new_kwargs, result
    remedy = "pass arguments that it takes: gpdfx.rule(op, signature, example=(...))"
    return Fault(f"the op cannot be run: {why}", remedy, untried=True)


def _seeded(op: Any, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(0)
    return op(*args, **kwargs)


def _like(x: Tensor, draw: torch.Generator, double: bool, values: str) -> Tensor:
    """Values in the shape of ``x``. Integers are its own if it has any, else 0 and 1."""
    if double and not _integral(x):
        dtype = torch.complex128 if x.is_complex() else torch.float64
    else:
        dtype = x.dtype
    if not isinstance(x, FakeTensor) and (values == "own" or _integral(x)):
        return x.detach().to(dtype)
    size = [size_hint(s) for s in x.shape]
    if _integral(x):
        new = torch.randint(0, 2, size, generator=draw)
    elif values == "positive":
        new = torch.rand(size, generator=draw, dtype=torch.float64) + 0.5
    else:
        new = torch.randn(size, generator=draw, dtype=torch.float64)
    return new.to(x.device, dtype)


def _integral(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


# --------------------------------------------------------------------------- the trial
_SHAPES = "name every dimension, one name each; ... stands for any number of them"
_COPIES = (
    "write c! or *c for an axis along which order or number matter; bind one whose size an "
    "argument states: gpdfx.rule(op, signature, c='argument'); or give the op no rule: it then "
    "runs at the student's width"
)


class _OpCheck:
    """One call of an op as a graph in which every axis is free."""

    def __init__(
        self, rule: Rule, op: Any, args: Any, kwargs: Any, result: Any, static: Sequence[bool]
    ) -> None:
        self.rule, self.result, self.solver = rule, result, Solver()
        graph, self.inputs = fx.Graph(), list[fx.Node]()
        self.axes: dict[fx.Node, Any] = {}
        flat, spec = pytree.tree_flatten((args, kwargs))
        for k, x in enumerate(flat):
            if isinstance(x, Tensor):
                node = flat[k] = graph.placeholder(f"x{k}")
                node.meta["val"] = x
                self.axes[node] = tuple(self.solver.leaf(s) for s in x.shape)
                self.inputs.append(node)
        self.node = graph.call_function(op, *pytree.tree_unflatten(flat, spec))
        self.node.meta["val"] = result
        weights = {x: True for x, yes in zip(self.inputs, static, strict=False) if yes}
        self.op = Op(self.node, self.solver, self.axes, weights)

    def fault(self, strict: bool) -> Fault | None:
        try:
            self.axes[self.node] = self.rule.infer(self.op)
        except Exception as error:  # axes that conflict, or a rank that no pattern has
            return Fault(f"it does not fit these shapes: {error}", _SHAPES)
        have = [list(y.shape) for y in pytree.tree_leaves(self.result)]
        said = [[a.size for a in axes] for axes in parts(self.axes[self.node])]
        if have != said:
            return Fault(f"the result should have the sizes {said}, it has {have}", _SHAPES)
        one = [name for name, axis in self.op.env.items() if self.solver.resolve(axis) == ONE]
        if strict and one:
            text = f"{one[0]} has size one in the example, where nothing would show"
            return Fault(text, "pass an example with sizes of two or more")
        free = dict.fromkeys(
            x for node in self.inputs for a in self.op.axes(node) for x in leaves(a)
        )
        free = {x: None for x in free if x not in self.solver.reason}
        for some in ([x] for x in free):
            if text := self._widen(some):
                return Fault(f"with {self._name(some[0])} {text}", _COPIES)
        text = self._widen(list(free)) if len(free) > 1 else ""
        return Fault(f"with all axes {text}", _COPIES) if text else None

    def _name(self, leaf: Leaf) -> str:
        for name, axis in self.op.env.items():
            if leaf in leaves(self.solver.resolve(axis)):
                return name
        return "a dimension under ... or *"

    def _widen(self, some: list[Leaf]) -> str:
        """What goes wrong if these leaves widen; empty if nothing does."""
        draw = np.random.default_rng(0)
        maps = {leaf: _surjection(leaf.size, draw) for leaf in some}
        target = Target({"": fx.Graph()}, self.axes, partial(self._frozen, maps), lambda key: draw)
        for x in self.inputs:
            if x.meta["val"].is_floating_point():
                target.dtype, target.device = x.meta["val"].dtype, x.meta["val"].device
        inference = Inference(self.solver, self.axes, {}, {self.node: self.op})
        writer = GraphWriter([*self.inputs, self.node], inference, target, "", {})
        writer.run()
        what = f"widened from {some[0].size} to {len(maps[some[0]])}" if len(some) == 1 else "wide"
        if self.node in inference.bridges:
            return f"{what} {inference.bridges[self.node]}"
        target.graphs[""].output(writer.env[self.node])
        teacher = fx.GraphModule(target.constants | target.shares, target.graphs[""])
        inputs = [self._gather(x.meta["val"], self.op.axes(x), maps) for x in self.inputs]
        try:
            results = pytree.tree_leaves(_seeded(teacher, inputs, {}))
        except Exception as error:  # whatever the user's op raises
            return f"{what} it fails: {error}"
        given = zip(pytree.tree_leaves(self.result), parts(self.axes[self.node]), strict=True)
        for y, (own, axes) in zip(results, given, strict=True):
            if problem := _compare(self._gather(own, axes, maps), y):
                return f"{what} its result {problem}"
        return ""

    def _frozen(self, maps: dict[Leaf, np.ndarray], axis: Axis) -> Frozen:
        axis = self.solver.resolve(axis)
        return compose(axis, lambda leaf: maps.get(leaf, np.arange(leaf.size)))

    def _gather(self, x: Tensor, axes: Axes, maps: dict[Leaf, np.ndarray]) -> Tensor:
        return gather(x, tuple(self._frozen(maps, a) for a in axes))


def _compare(expected: Tensor, y: Tensor) -> str:
    """How a result differs from what it should be, if it does. A wrong rule is wrong by far."""
    if y.shape != expected.shape:
        return f"has the shape {tuple(y.shape)}, not {tuple(expected.shape)}"
    allowed = 1e-4 if _integral(expected) else max(1e-4, 30 * torch.finfo(expected.dtype).eps)
    off = difference(expected, y)
    return "" if off <= allowed else f"differs by {off:.1e}, relative (allowed {allowed:.0e})"


def _surjection(size: int, draw: np.random.Generator) -> np.ndarray:
    """Every index once, some more often, in a random order; never all equally often."""
    more = draw.integers(0, size - 1, size // 2 + 1)
    return np.asarray(draw.permutation(np.concatenate([np.arange(size), more])))

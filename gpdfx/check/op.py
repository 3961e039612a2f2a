"""Run an op to see whether it bears out its rule.

What a rule claims of an axis is that the op on copies gives copies, whichever index is copied how
often (a contracted one after multiplying by shares). So the op is run as it is, and once more with
the axis widened by a random surjection, by the very code that writes teachers: for each axis in
turn, then for all together. Both times it is differentiated, too: what comes back to a student's
index is what comes back to all of its copies.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..algebra.axes import ONE, Axis, Leaf, leaves
from ..algebra.frozen import Frozen, compose
from ..algebra.gather import gather
from ..algebra.solver import Solver
from ..calls.held import has_gradient
from ..passes.infer import Inference
from ..passes.program import size_hint
from ..passes.rules.op import Axes, Op, parts
from ..passes.rules.writer import Rule, Target
from ..passes.widen import GraphWriter
from ..torch_private import is_fake, tree_flatten, tree_leaves, tree_map, tree_unflatten
from .facts import difference
from .observe import keep_rng

DRAWS = 32
"""Of arguments, to see whether a backward is linear; of gradients these, and their sum."""
PARTS = ((1,), (2,), (1, 2))


@dataclass
class Fault(Exception):
    """What is wrong with a rule. ``untried``: nothing, perhaps; the op could not be run."""

    text: str
    remedy: str
    untried: bool = False


def check_rule(
    rule: Rule,
    op: Any,
    args: Any,
    kwargs: Any,
    static: Sequence[bool],
    strict: bool,
    trivial: bool = False,
) -> Fault | None:
    """The first fault of a rule for ``op`` on random tensors like these, if it has any.

    The tensors may be fake ones. ``static``: which of them, in order, come from weights alone (the
    one that shares multiply is chosen by that); ``strict``: a named axis of size one, of which
    nothing would show, is a fault; ``trivial``: the op is known to make zeros, or nothing.
    """
    with torch.no_grad(), keep_rng():
        try:
            _OpCheck(rule, op, *_sample(op, args, kwargs, trivial), static).run(strict)
        except Fault as fault:
            return fault
    return None


def draws(op: Any, args: Any) -> bool:
    """Whether a call of an op on tensors like these moves torch's generator; if it cannot be run,
    it might."""
    with torch.no_grad(), keep_rng():
        try:
            args, kwargs, _ = _sample(op, args, {}, True)
        except Fault:
            return True
        torch.manual_seed(0)
        before = torch.get_rng_state()
        _run(op, args, kwargs)
        return not torch.equal(before, torch.get_rng_state())


def linear(op: Any, args: Any) -> bool:
    """Whether the backward of an op is linear in what comes back to its results: to copies comes
    back in parts what comes back to one. A gate may show in no single draw: it may be open for
    every element (a bound that is drawn, too, and lies low)."""
    with torch.no_grad(), keep_rng(), contextlib.suppress(Exception):  # it cannot be run, perhaps
        for seed in range(DRAWS):
            given, _, result = _sample(op, args, {}, True, seed)
            sources = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
            parts = [_gradients(tree_leaves(result), sources, seeds) for seeds in PARTS]
            for one, other, both in zip(*parts, strict=True):
                if difference(both, one + other, floor=1e-5) > 1e-4:
                    return False
    return True


def shown(x: Any) -> str:
    """An argument, a tensor by shape and type."""
    if not isinstance(x, Tensor):
        return repr(x)
    return " x ".join(str(size_hint(s)) for s in x.shape) + f" {str(x.dtype).split('.')[-1]}"


# --------------------------------------------------------------------------- values
def _sample(op: Any, args: Any, kwargs: Any, trivial: bool, seed: int = 0) -> tuple[Any, Any, Any]:
    """Arguments like these, and what the op makes of them: finite, and not zero. In float64 if
    the op can; normal values, positive ones, or the arguments' own; with a gradient if it can."""
    why = "its results are zero, or not finite"
    choices = itertools.product((True, False), ("normal", "positive", "own"), (True, False))
    for double, values, grad in choices:
        like = partial(_like, torch.Generator().manual_seed(seed), double, values, grad)
        given = _map_tensors(like, (args, kwargs))
        try:
            result = _run(op, *given)
        except Exception as error:  # whatever the user's op raises
            why = str(error).strip().split("\n")[0] or type(error).__name__
            continue
        floating = [y for y in tree_leaves(result) if not _integral(y)]
        if trivial or all(y.isfinite().all() and y.any() for y in floating if y.numel()):
            return *given, result
    remedy = "pass arguments that it takes: gpdfx.rule(op, signature, example=(...))"
    raise Fault(f"the op cannot be run: {why}", remedy, untried=True)


def _run(op: Any, args: Any, kwargs: Any) -> Any:
    """A seeded call on copies, which it may write to."""
    torch.manual_seed(0)
    with torch.enable_grad():
        args, kwargs = _map_tensors(torch.clone, (args, kwargs))
        return op(*args, **kwargs)


def _like(draw: torch.Generator, double: bool, values: str, grad: bool, x: Tensor) -> Tensor:
    """Values in the shape of ``x``. Integers are its own if it has any, else 0 and 1."""
    dtype, size = x.dtype, [size_hint(s) for s in x.shape]
    if double and not _integral(x):
        dtype = torch.complex128 if x.is_complex() else torch.float64
    if not is_fake(x) and (values == "own" or _integral(x)):
        new = x.detach()
    elif _integral(x):
        new = torch.randint(0, 2, size, generator=draw)
    elif values == "positive":
        new = torch.rand(size, generator=draw, dtype=torch.float64) + 0.5
    else:
        new = torch.randn(size, generator=draw, dtype=torch.float64)
    return new.to(x.device, dtype, copy=True).requires_grad_(grad and not _integral(x))


def _map_tensors(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, arguments)


def _integral(x: Tensor) -> bool:
    return not has_gradient(x)


# --------------------------------------------------------------------------- the check
_SHAPES = "name every dimension, one name each; ... stands for any number of them"
_COPIES = (
    "write c! or *c for an axis along which order or number matter; bind one whose size an "
    "argument states: gpdfx.rule(op, signature, c='argument'); or give the op no rule: it then "
    "runs at the student's width"
)
_BACKWARD = (
    "mend the op's backward, or give the op no rule: it then runs, forward and backward, at the "
    "student's width"
)


class _OpCheck:
    """One call of an op as a graph in which every axis is free."""

    def __init__(
        self, rule: Rule, op: Any, args: Any, kwargs: Any, result: Any, static: Sequence[bool]
    ) -> None:
        self.results, self.solver = tree_leaves(result), Solver()
        graph, self.inputs = fx.Graph(), list[fx.Node]()
        self.axes: dict[fx.Node, Any] = {}
        flat, spec = tree_flatten((args, kwargs))
        for k, x in enumerate(flat):
            if isinstance(x, Tensor):
                node = flat[k] = graph.placeholder(f"x{k}")
                node.meta["val"] = x
                self.axes[node] = tuple(self.solver.leaf(s) for s in x.shape)
                self.inputs.append(node)
        self.node = graph.call_function(op, *tree_unflatten(flat, spec))
        self.node.meta["val"] = result
        weights = {x: True for x, yes in zip(self.inputs, static, strict=False) if yes}
        self.op = Op(self.node, self.solver, self.axes, weights, rule)

    def run(self, strict: bool) -> None:
        """Raise the first fault."""
        try:
            self.axes[self.node] = self.op.rule.infer(self.op)
        except Exception as error:  # axes that conflict, or a rank that no pattern has
            raise Fault(f"it does not fit these shapes: {error}", _SHAPES) from error
        have = [list(y.shape) for y in self.results]
        said = [[a.size for a in axes] for axes in parts(self.axes[self.node])]
        if have != said:
            raise Fault(f"the result should have the sizes {said}, it has {have}", _SHAPES)
        env = {name: self.solver.resolve(axis) for name, axis in self.op.env.items()}
        for name in (name for name, axis in env.items() if strict and axis == ONE):
            text = f"{name} has size one in the example, where nothing would show"
            raise Fault(text, "pass an example with sizes of two or more")
        every = [a for x in (*self.inputs, self.node) for axes in parts(self.axes[x]) for a in axes]
        known = dict.fromkeys(x for a in every for x in leaves(self.solver.resolve(a)))
        draw, reason = np.random.default_rng(0), self.solver.reason
        free = {x: _surjection(x.size, draw) for x in known if x.size and x not in reason}
        for leaf, index in free.items():
            names = [name for name, axis in env.items() if leaf in leaves(axis)]
            name = [*names, "a dimension under ... or *"][0]
            self._widen({leaf: index}, f"with {name} widened from {leaf.size} to {len(index)}")
        for maps in (free, {x: np.arange(2 * x.size) % x.size for x in free}):
            self._widen(maps, "with all axes wide")

    def _widen(self, maps: dict[Leaf, np.ndarray], what: str) -> None:
        """Raise what goes wrong if these leaves widen."""

        def frozen(axis: Axis) -> Frozen:
            axis = self.solver.resolve(axis)
            return compose(axis, lambda leaf: maps.get(leaf, np.arange(leaf.size)))

        def wide(x: Tensor, axes: Axes) -> Tensor:
            return gather(x, tuple(map(frozen, axes)))

        graph = fx.Graph()
        target = Target({"": graph}, self.axes, frozen, lambda key: np.random.default_rng(0))
        values = [x.meta["val"] for x in self.inputs]
        for x in (x for x in values if x.is_floating_point()):
            target.dtype, target.device = x.dtype, x.device
        inference = Inference(self.solver, self.axes, {}, {self.node: self.op})
        writer = GraphWriter([*self.inputs, self.node], inference, target, "", {})
        writer.run()
        if self.node in inference.bridges:
            raise Fault(f"{what} {inference.bridges[self.node]}", _COPIES)
        graph.output(writer.env[self.node])
        teacher = fx.GraphModule(target.constants | target.shares, graph)
        with torch.enable_grad():
            inputs = [wide(x, self.axes[n]) for x, n in zip(values, self.inputs, strict=True)]
            expected = list(map(wide, self.results, parts(self.axes[self.node])))
        try:
            results = tree_leaves(_run(teacher, inputs, {}))
        except Exception as error:  # whatever the user's op raises
            raise Fault(f"{what} it fails: {error}", _COPIES) from error
        for one, other in zip(expected, results, strict=True):
            _compare(one, other, f"{what} its result", _COPIES)
        sources = [x for x in values if x.requires_grad]
        try:
            wanted = _gradients(expected, sources)
        except Exception:  # the op has no gradient
            return
        try:
            found = _gradients(results, sources)
        except Exception as error:
            raise Fault(f"{what} its gradient fails: {error}", _BACKWARD) from error
        for x, one, other in zip(sources, wanted, found, strict=True):
            _compare(one, other, f"{what} its gradient for {shown(x)}", _BACKWARD)


def _gradients(
    results: list[Tensor], sources: list[Tensor], seeds: Sequence[int] = (1,)
) -> tuple[Tensor, ...]:
    """Of a random projection of wide results (of the sum of some), with respect to the student's
    tensors."""
    draws, total = [torch.Generator().manual_seed(s) for s in seeds], torch.zeros(())
    for y in results:
        weights = [torch.randn(y.shape, generator=d, dtype=torch.float64) for d in draws]
        with torch.enable_grad():
            total = (
                total + (y * torch.stack(weights).sum(0).to(y)).real.sum()
                if y.requires_grad
                else total
            )
    return torch.autograd.grad(total, sources, retain_graph=True, materialize_grads=True)


def _compare(expected: Tensor, y: Tensor, what: str, remedy: str) -> None:
    """Raise how a tensor differs from what it should be. A wrong rule is wrong by far."""
    if y.shape != expected.shape:
        raise Fault(f"{what} has the shape {tuple(y.shape)}, not {tuple(expected.shape)}", remedy)
    eps = 0.0 if _integral(expected) else torch.finfo(expected.dtype).eps
    allowed = max(1e-4, 30 * eps)
    off = difference(expected, y, floor=min(1.0, 1e5 * eps))  # a gradient of zero has rounding
    if off > allowed:
        raise Fault(f"{what} differs by {off:.1e}, relative (allowed {allowed:.0e})", remedy)


def _surjection(size: int, draw: np.random.Generator) -> np.ndarray:
    """Every index once, some more often, in a random order; never all equally often. Half as many
    more, an even number: there are kernels that want rows of 16 bytes."""
    more = draw.integers(0, size - 1, (size + 2) // 4 * 2)
    return np.asarray(draw.permutation(np.concatenate([np.arange(size), more])))
